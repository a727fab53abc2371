"""A training run's progress on the terminal: loss, pace, time to the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jquant.qat.metrics import StepRecord


@contextlib.contextmanager
def shown_progress(console: Any) -> Iterator[Callable[[StepRecord], None]]:
    """A listener that keeps one line up to date, and prints one for each evaluation.

    Args:
        console: rich's.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("preparing", total=None, loss="…", pace="")

        def listen(record: StepRecord) -> None:
            pace = f"{record.per_second:,.0f} {record.unit}/s"
            progress.update(task, description="training", completed=record.step, total=record.steps)
            progress.update(task, loss=f"{record.loss:.4f}", pace=pace)
            if record.evaluation:
                figures = "  ".join(f"{name} {value:.6g}" for name, value in record.evaluation.items())
                progress.console.print(f"step {record.step}: loss {record.loss:.4f}  {figures}", highlight=False)

        yield listen
