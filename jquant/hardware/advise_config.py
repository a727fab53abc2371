"""What the advice on PTQ or QAT is asked with. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jquant.core.errors import InputError

_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True, kw_only=True)
class AdviseConfig:
    """Advises PTQ or QAT from a measured loss and what training would cost; without arguments asks, and recommends."""

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MODEL")] = None
    """Whose parameters are counted; or give --parameters."""
    scheme: str
    """Of the weights, as int3:g64."""
    ptq_loss: float | None = None
    """What the best PTQ method lost, in percent: increase of perplexity, or decrease of a score. None: not measured."""
    requirement: Literal["strict", "moderate", "relaxed"] = "moderate"
    """Tolerates a loss of 5 % where strict, 10 % otherwise."""
    tolerance: float | None = None
    """Another tolerance, in percent."""
    parameters: str | None = None
    """Of the model, as 135M or 7B."""
    tokens: str = "100M"
    """That QAT would train on; the default is an assumption."""
    device: str | None = None
    """To train on, as h100-sxm; an unknown name lists those known. The default is h100-sxm, or what --tflops says."""
    devices: int = 1
    """How many."""
    utilization: float = 0.4
    """Share of the device's peak rate that training reaches."""
    tflops: float | None = None
    """Rate that a training step of your own reached on one device, in place of --device."""
    memory: float | None = None
    """Of one such device, in GB."""
    distill: bool = True
    """Count the teacher's forward pass and weights."""
    budget: float | None = None
    """Hours that training may take."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        missing = tyro.MISSING
        if (self.model is None) == (self.parameters is None) and missing not in (self.model, self.parameters):
            raise InputError("advise needs the model's size: give either MODEL or --parameters, as --parameters 7B")
        if self.device is not None and self.tflops is not None and missing not in (self.device, self.tflops):
            raise InputError("give either --device or a measured rate with --tflops, not both")


def count(words: str, what: str) -> int:
    """A number as people write it: 135M, 7B, 1e9. Raises InputError naming `what`."""
    text = words.strip().lower().replace(",", "").replace("_", "")
    unit = _UNITS.get(text[-1:], 1.0)
    try:
        value = float(text[:-1] if text[-1:] in _UNITS else text) * unit
        return round(value)
    except (ValueError, OverflowError):
        raise InputError(f"{what} {words!r}: it must be a number, as 135M, 7B or 1e9") from None
