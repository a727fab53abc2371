"""What `jquant qat` does. No jax here: the command line reads it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jquant.core.errors import InputError
from jquant.io.process_options import ProcessOptions
from jquant.qat.config import QATConfig


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is trained, on what, by which loss; a class of its own: help lists it before the trainer's options."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """`demo`, the path of a GGUF file or a Hugging Face folder, or a hub id."""
    out: Path
    """A new folder; it appears whole or not at all. The same command goes on where an earlier one was stopped."""
    recipe: str
    """A preset (int4-g128, int3-g64-lsq, w8a8, nf4, …) or a YAML file of rules."""
    data: str = "pydoc:calibration"
    """What the model is trained on: a file, a folder or the name of a text, as wikitext2:train."""
    window: int = 512
    """Tokens in a window of it."""
    windows: int | None = None
    """How many windows, from its start; None for all."""
    distillation_weight: float = 1.0
    """Of the float model's predictions in the loss, 0 to 1; the rest is the next token's cross entropy."""
    temperature: float = 1.0
    """Of the distillation."""
    hidden_weight: float = 0.0
    """Of the distance between the states behind each block and the float model's."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, a third more work."""
    eval_text: str | None = None
    """Also measure perplexity on this text: before, every `eval_every` steps and at the end. `best` is `perplexity`."""
    eval_window: int = 512
    """Tokens in a window of it."""
    eval_windows: int | None = 16
    """How many windows of it; None for all."""
    hosts: Annotated[ProcessOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ProcessOptions)
    """Several processes."""


@dataclass(frozen=True, kw_only=True)
class QATCommand(QATConfig, _Task):
    """Trains a model with quantization, distilled from its float self, and saves it packed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_text is None and (self.eval_every is not None or self.best is not None):
            raise InputError("--eval-every and --best need a text to evaluate on: give --eval-text")
        if self.best not in (None, "perplexity"):
            raise InputError(f"best is {self.best!r}; what is measured is perplexity")
        if self.windows is not None and self.windows < 1:
            raise InputError(f"windows is {self.windows}; it must be at least 1, or None for the whole text")

    def training(self) -> QATConfig:
        """The part that the trainer reads."""
        return QATConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(QATConfig)})
