"""What `jquant formats` lists. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FormatsConfig:
    """Lists the number formats: bits, range, levels, bits per weight with scales, hardware, sources."""

    json: bool = False
    """Print JSON."""
