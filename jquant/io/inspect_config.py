"""What `jquant inspect` lists. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Lists what a checkpoint holds: architecture, parameters, tensor types, bits per weight, sizes."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A GGUF file, a safetensors file, a Hugging Face folder, a folder of `jquant quantize`, or `demo`."""
    json: bool = False
    """Print JSON."""
