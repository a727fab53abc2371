"""The result of one benchmark: scores, and the score of every item, so that two models can be compared pair by pair."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jquant.core.errors import InputError

# What a benchmark is judged by, the first that it reports: length-normalised accuracy where choices differ in length.
PRIMARY = (
    "acc_norm",
    "acc",
    "exact_match,strict-match",
    "exact_match",
    "pass@1",
    "pass@1,create_test",
    "prompt_level_strict_acc",
)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task of lm-eval on one model. Equal `items_sha256`, few-shot count and version: the same questions."""

    task: str
    version: str
    few_shot: int
    scores: Mapping[str, float]  # by metric: mean over items, or what the task makes of them
    stderr: Mapping[str, float]
    items: Mapping[str, tuple[float, ...]]  # by metric, of those that give each item a number; in the order of the task
    answers: tuple[Any, ...]  # what the model said: the index of the choice, or its text
    items_sha256: str  # of the items as the task asks them

    def __post_init__(self) -> None:
        for name, values in self.items.items():
            if len(values) != len(self.answers):
                raise InputError(
                    f"{self.task}: {len(values)} scores of {name} for {len(self.answers)} answers: damaged record"
                )

    @property
    def count(self) -> int:
        """How many items were asked."""
        return len(self.answers)

    @property
    def primary(self) -> str:
        """The metric that the task is judged by."""
        known = [name for name in PRIMARY if name in self.scores]
        return known[0] if known else next(iter(self.scores))

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {**dataclasses.asdict(self), "primary": self.primary}

    @classmethod
    def from_json(cls, record: Any, source: str) -> TaskResult:
        """Raises InputError naming `source` where the record is not one of `as_json`."""
        try:
            return cls(
                task=str(record["task"]),
                version=str(record["version"]),
                few_shot=int(record["few_shot"]),
                scores={name: _number(value) for name, value in record["scores"].items()},
                stderr={name: _number(value) for name, value in record["stderr"].items()},
                items={name: tuple(map(_number, values)) for name, values in record["items"].items()},
                answers=tuple(record["answers"]),
                items_sha256=str(record["items_sha256"]),
            )
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{source}: is no task result of `jquant eval --tasks`: {reason}") from error


def items_hash(questions: Sequence[Any]) -> str:
    """Of everything that was asked, in order."""
    return hashlib.sha256(json.dumps(questions, ensure_ascii=False, default=str).encode()).hexdigest()


def _number(value: Any) -> float:
    """JSON has no NaN: null stands for it."""
    return math.nan if value is None else float(value)
