"""A run's figures, step by step: lines of JSON that outlive a kill, and TensorBoard where it is asked for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jquant.core.errors import InputError
from jquant.io.atomic import replacing

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step."""

    step: int  # from 1: steps done
    steps: int
    loss: float
    parts: dict[str, float]  # what the loss function reports beside the loss
    grad_norm: float  # before clipping
    learning_rate: float
    per_second: float  # tokens where the data are tokens, else rows; over the time since the step before
    unit: str  # "tokens" or "rows"
    evaluation: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """One flat object; evaluation figures under names of their own."""
        return {
            "step": self.step,
            "loss": self.loss,
            **self.parts,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            f"{self.unit}_per_second": round(self.per_second, 1),
            **{f"eval_{name}": value for name, value in self.evaluation.items()},
        }


class MetricsLog:
    """Appends to `metrics.jsonl`, one line a step."""

    def __init__(self, folder: Path, *, done: int, tensorboard: bool) -> None:
        """
        Args:
            folder: of the run.
            done: steps of the state that the run goes on from; lines of later ones are dropped.
            tensorboard: whether to write its event files too.

        Raises:
            InputError: the file cannot be written, or tensorboardX is not installed.
        """
        self._writer = _tensorboard(folder / TENSORBOARD, done) if tensorboard else None
        path = folder / METRICS
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= done]
        with replacing(path) as file:
            file.writelines(kept)
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error

    def write(self, record: StepRecord) -> None:
        """Adds a line, at once. Raises InputError where it cannot be written, as on a full disk."""
        values = record.as_json()
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        try:
            self._file.write(json.dumps(finite).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self._file.name}: cannot be written: {error.strerror or error}; start the same command again to go "
                "on from the latest state"
            ) from error
        if self._writer is not None:
            for name, value in values.items():
                if name != "step":
                    self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _tensorboard(folder: Path, done: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard logs need the package 'tensorboardX': pip install 'jquant[qat]', or leave tensorboard out"
        ) from error
    return SummaryWriter(str(folder), purge_step=done + 1)
