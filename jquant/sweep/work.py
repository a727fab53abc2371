"""What a sweep has to do, whoever computes its cells, and what it tells while it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jquant.data.blocks import Windows
from jquant.models.checkpoint import Checkpoint
from jquant.sweep.config import SweepConfig
from jquant.sweep.grid import Point
from jquant.sweep.results import Cell
from jquant.sweep.store import Store

Listener = Callable[["Event"], None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a listener hears: a stage began, a part of it was done, or a cell was finished or found."""

    stage: str  # "load", "reference", "statistics", a cell's scheme and method or how many are under way, "outputs"
    done: int  # cells finished or found
    total: int  # cells of the grid
    share: float = 0.0  # of the current stage
    cell: Cell | None = None  # the one that was just finished or found
    seconds: float | None = None  # that statistics took, once they are gathered
    note: str | None = None  # what the user should know, as that a worker died and its cell is measured again


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What there is to do, and what it takes."""

    config: SweepConfig
    store: Store
    checkpoint: Checkpoint
    windows: Windows
    calibration: Windows | None  # where a method learns from data
    backend: str  # "cpu", "gpu", …: where cells are computed
    batch: int  # windows a forward pass
    points: Sequence[Point]
    ids: Mapping[Point, str]
    reference_id: str
    listen: Listener

    def tell(self, stage: str, done: int, **more: Any) -> None:
        """Tells the listener."""
        self.listen(Event(stage=stage, done=done, total=len(self.points), **more))

    def within(self, stage: str, done: int) -> Callable[[int], None]:
        """Tells the listener how many windows of a stage are done."""
        return lambda count: self.tell(stage, done, share=count / len(self.windows.tokens))
