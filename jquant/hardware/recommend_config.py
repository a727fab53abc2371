"""What a recommendation and the list of devices are asked with. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.core.errors import InputError
from jquant.core.options import Names


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Lists devices with memory, bandwidth, rates and native formats; of one its sources; measures the local one."""

    device: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    """One device of the list, as h100-sxm, with the source of each figure."""
    measure: bool = False
    """Measure the local device: bandwidth by a copy, rates by products of matrices."""
    side: int | None = None
    """With --measure: rows and columns of the matrices; by default 1024 on CPU, 8192 elsewhere."""
    copy_mb: int | None = None
    """With --measure: megabytes that are copied; by default 256 on CPU, 2048 elsewhere."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.device is not None and self.measure and self.device is not tyro.MISSING:
            raise InputError("give either the NAME of a device in the list, or --measure for the local one")
        for name in ("side", "copy_mb"):
            value = getattr(self, name)
            if value is not None and value is not tyro.MISSING and value < 1:
                raise InputError(f"{name.replace('_', '-')} {value}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Recommends schemes and methods for a model on a device: what fits, how fast at best, what it loses, and why."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """`demo`, a GGUF file, a checkpoint folder, a config.json, a hub id; or without any file a published model by name
    (llama-3-70b, qwen3-8b, …; an unknown name lists them), or a size, as 70B."""
    family: str = "llama-3"
    """Of a MODEL that is a size: whose shape it has."""
    device: str | None = None
    """As h100-sxm; an unknown name lists those known. Without it the local device is measured."""
    devices: int = 1
    """How many, tensor-parallel."""
    memory: float | None = None
    """GB of one device, in place of what the list of devices says; needed for CPUs of the list."""
    batch: int = 1
    """Sequences at once; with --first throughput at least so many."""
    prompt: int = 2048
    """Tokens of a prompt."""
    output: int = 256
    """New tokens a sequence."""
    max_loss: float = 5.0
    """Percent of perplexity that may be lost."""
    first: Literal["latency", "throughput"] = "latency"
    """What options are ranked by."""
    cache: str | None = None
    """Scheme of keys and values, as int8:token; by default they are floats of 16 bits."""
    results: Path | None = None
    """Folder of a `jquant sweep` of this model: its losses are taken, and its schemes are considered."""
    schemes: Names = ()
    """Consider these alone, by rtn unless a method follows: int4:g64, int8:channel by smoothquant@int8:token."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        for name in ("devices", "batch", "prompt", "output"):
            value = getattr(self, name)
            if value is not tyro.MISSING and value < 1:
                raise InputError(f"{name} {value}: it must be at least 1")
