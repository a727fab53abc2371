"""What `jquant export` and `jquant convert` write. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.core.errors import InputError

Format = Literal["hf", "compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "gguf"]


@dataclass(frozen=True, kw_only=True)
class _Options:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """`demo`, the path of a GGUF file, of a Hugging Face folder or of a folder of `jquant quantize`, or a hub id."""
    format: Format
    """hf: float weights, packed ones decoded; the others hold packed layers, as their tools write them. A gguf is one
    file, of block types of ggml (the recipe q4_k_m, the schemes q4_0, q6_k, …) and floats."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the float weights; by default float32, which is exact."""
    max_shard_gb: float = 5.0
    """Weight files larger than this are cut into several, with an index."""

    text: str | None = None
    """Measures the perplexity on this text and says it in the model card, which a gguf has none of."""
    window: int = 512
    """Tokens of its windows."""
    windows: int = 16
    """How many."""

    def __post_init__(self) -> None:
        if not self.max_shard_gb > 0:
            raise InputError(f"max_shard_gb is {self.max_shard_gb}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(_Options):
    """Writes a model as a folder that other tools load."""

    out: Path
    """A new folder, or file of a gguf; it appears whole or not at all."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(_Options):
    """Rewrites a checkpoint of one tool for another, packed layers as they are where both can hold them."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """A new folder, or file of a gguf; it appears whole or not at all."""
