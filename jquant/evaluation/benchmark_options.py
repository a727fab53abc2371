"""Which benchmarks are run and how, for every command that runs some. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jquant.core.errors import InputError
from jquant.core.options import Names


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Benchmarks of lm-eval (needs jquant[eval])."""

    tasks: Names = ()
    """arc_easy,hellaswag,mmlu,gsm8k,…, of lm-eval's own or in `task_path`; groups such as mmlu too."""
    limit: int | None = None
    """Ask only the first items of each task."""
    task_path: Path | None = None
    """A folder of task definitions, which go before lm-eval's own; without a network they must read local files."""
    few_shot: int | None = None
    """Solved examples before each question; by default as the task says."""
    max_length: int | None = None
    """Tokens that a question may have; longer ones lose their start. By default the model's context."""
    chat: bool = False
    """Write questions in the model's chat template."""
    allow_code: bool = False
    """Let tasks such as humaneval run what the model wrote, on this machine."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit of {self.limit} items leaves nothing to ask; give at least 1, or none for all")
        if self.tasks:
            return
        for name in ("limit", "task_path", "few_shot", "max_length", "chat", "allow_code"):
            if getattr(self, name) not in (None, False):
                raise InputError(
                    f"{name.replace('_', '-')} is for benchmarks: name some, as --tasks arc_easy,hellaswag"
                )
