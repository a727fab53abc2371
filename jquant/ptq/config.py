"""What a quantization run does. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.core.options import Names


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Rounds a model's linear layers to a scheme and saves it packed; eval and generate load the folder."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """`demo`, the path of a GGUF file or a Hugging Face folder, or a hub id."""
    scheme: str
    """Spec string: int4:g64, nf4:g64:dq, mxfp4, …"""
    out: Path
    """A new folder; it appears whole or not at all."""
    layers: Names = (r"^blocks\.",)
    """Regular expressions: which linear layers are quantized."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the tensors that stay unquantized."""
