"""What an evaluation runs. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.evaluation.benchmark_options import BenchmarkOptions
from jquant.io.process_options import ProcessOptions


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
    mesh: str = ""
    """Devices by axis, as `data=2,tensor=4`: windows over data, weights over fsdp and tensor; empty for one."""
    benchmark: Annotated[BenchmarkOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=BenchmarkOptions)
    """In the place of the text."""
    hosts: Annotated[ProcessOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ProcessOptions)
    """Several processes."""
    json: Path | None = None
    """Also write the result to this file."""
