"""What a generation runs. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from jquant.io.process_options import ProcessOptions


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continues a prompt, so that a person can read what a quantized model says."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """`demo`, the path of a GGUF file, of a Hugging Face folder or of a folder of `jquant quantize`, or a hub id."""
    prompt: str
    """The text to continue."""
    max_tokens: int = 64
    """How many tokens at most; generation also ends at the model's end-of-text token."""
    temperature: float = 0.0
    """0 is greedy; higher is more random."""
    top_k: int | None = None
    """Choose among this many most likely tokens."""
    top_p: float | None = None
    """Choose among the most likely tokens that together reach this probability."""
    seed: int = 0
    """Of the random choices."""
    scheme: str | None = None
    """Round the linear layers of the blocks to this scheme first, as int4:g64."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the unquantized weights and of computation."""
    mesh: str = ""
    """Devices by axis, as `data=2,tensor=4`: rows of weights over fsdp and tensor; empty for one."""
    hosts: Annotated[ProcessOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ProcessOptions)
    """Several processes."""
