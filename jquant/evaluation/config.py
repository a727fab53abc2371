"""What an evaluation runs. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.core.errors import InputError
from jquant.core.options import Names


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measures a model's perplexity on a text, as it is or rounded to a scheme."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """`demo`, the path of a GGUF file, of a Hugging Face folder or of a folder of `jquant quantize`, or a hub id."""
    text: str = "pydoc"
    """A file, a folder or the name of a text; `pydoc` comes with Python."""
    window: int = 512
    """Tokens in a window."""
    windows: int | None = 16
    """How many windows; None for the whole text."""
    stride: int | None = None
    """Tokens from one window to the next; by default the window: no overlap."""
    batch: int | None = None
    """Windows a forward pass; by default 1 on CPU, 8 elsewhere."""
    scheme: str | None = None
    """Round the linear layers of the blocks to this scheme first, as int4:g64."""
    reference: str | None = None
    """Another MODEL to measure KL divergence and top-1 agreement against."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the unquantized weights and of computation."""
    tasks: Names = ()
    """Benchmarks of lm-eval in the place of the text: arc_easy,hellaswag,mmlu,gsm8k,… (needs jquant[eval])."""
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
    json: Path | None = None
    """Also write the result to this file."""

    def __post_init__(self) -> None:
        if self.tasks:
            return
        for name in ("limit", "task_path", "few_shot", "max_length", "chat", "allow_code"):
            if getattr(self, name) not in (None, False):
                raise InputError(
                    f"{name.replace('_', '-')} is for benchmarks: name some, as --tasks arc_easy,hellaswag"
                )
