"""Ranges of static inputs: the one scale of a layer's input, chosen over all calibration data.

minmax        the smallest and the largest value, of integers with zero points too
percentile    the magnitude that so many percent do not exceed (calib/percentile.py)
mse           the magnitude that loses least when what is beyond is clipped (calib/mse_range.py)

SmoothQuant's search takes the range of each call that it tries, whatever is chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jquant.calib import histogram, mse_range, percentile
from jquant.core.config_check import check_fields
from jquant.core.errors import InputError
from jquant.core.scheme import Scheme, Tensor
from jquant.nn.w8a8 import static_parameters

Calls = Iterable[tuple[Array, Array | None]]  # inputs [*batch, in] and the mask [*batch] of those that count


@dataclass(frozen=True, kw_only=True)
class MinMaxConfig:
    """There is nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class MSEConfig:
    """There is nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class PercentileConfig:
    """How much is left outside."""

    percent: float = 99.99

    def __post_init__(self) -> None:
        check_fields(self, "percentile")
        if not 0 < self.percent <= 100:
            raise InputError(f"percentile percent {self.percent}: it must be in (0, 100], as 99.99")


class Range(NamedTuple):
    """One way to choose."""

    ends: Callable[[Calls, Scheme, Any], tuple[Array, Array]]  # lowest and highest value that scales are made for
    config: Any
    of_magnitudes: bool = True  # not for schemes with zero points


def parameters(calls: Calls, activation: Scheme, name: str, config: Any) -> tuple[Array, Array | None]:
    """Scale and zero point (None where symmetric) of a layer's input.

    Args:
        calls: at least one.
        activation: int8:tensor and the like.
        name: of `RANGES`.
        config: of that way.

    Raises:
        InputError: inputs are NaN or infinite; or all zero, and the range is one of magnitudes.
    """
    lowest, highest = RANGES[name].ends(calls, activation, config)
    return static_parameters(lowest, highest, activation)


def check_range(name: str, activation: str | None, scheme: Scheme | None) -> None:
    """Raises InputError where a range was asked for that the scheme of the input has no use for."""
    if name == "minmax":
        return
    if scheme is None or not isinstance(scheme.granularity, Tensor):
        given = "none" if activation is None else f"in {activation}, whose scales are each token's own"
        raise InputError(f"activation_range {name}: it is for static activations, as int8:tensor; they are {given}")
    if scheme.zero_point != "none" and RANGES[name].of_magnitudes:
        raise InputError(f"activation_range {name} for {activation}: it serves schemes without zero points; use minmax")


def _minmax(calls: Calls, activation: Scheme, config: MinMaxConfig) -> tuple[Array, Array]:
    ends = [_ends(x, mask) for x, mask in calls]
    if not all(bool(finite) for *_, finite in ends):
        raise InputError(
            "its input: activations hold a NaN or an infinity; give calibration text that the model handles"
        )
    return jnp.min(jnp.stack([end[0] for end in ends])), jnp.max(jnp.stack([end[1] for end in ends]))


@jax.jit
def _ends(x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """The smallest and largest value of rows that count, and whether all are finite."""
    if mask is None:
        return jnp.min(x), jnp.max(x), jnp.all(jnp.isfinite(x))
    counts = mask[..., None]
    finite = jnp.all(jnp.isfinite(x) | ~counts)
    return jnp.min(jnp.where(counts, x, jnp.inf)), jnp.max(jnp.where(counts, x, -jnp.inf)), finite


def _percentile(calls: Calls, activation: Scheme, config: PercentileConfig) -> tuple[Array, Array]:
    magnitude = percentile.finalize(_histogram(calls), config.percent)
    return -magnitude, magnitude


def _mse(calls: Calls, activation: Scheme, config: MSEConfig) -> tuple[Array, Array]:
    magnitude = mse_range.finalize(_histogram(calls), activation)
    return -magnitude, magnitude


def _histogram(calls: Calls) -> histogram.HistogramState:
    state = histogram.init()
    for x, mask in calls:
        state = _update(state, x, mask)
    histogram.check(state, "its input")
    return state


_update = jax.jit(histogram.update)

RANGES: dict[str, Range] = {
    "minmax": Range(_minmax, MinMaxConfig(), of_magnitudes=False),
    "percentile": Range(_percentile, PercentileConfig()),
    "mse": Range(_mse, MSEConfig()),
}
