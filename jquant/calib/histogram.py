"""A histogram of magnitudes with a range that grows: what percentile.py and mse_range.py make their ranges of.

    counts_b = #{ x : ⌊|x| · bins / 2^k⌋ = b }        2^k the smallest power of two that no |x| exceeds

When a larger value comes, k grows and neighbouring bins are summed: ⌊⌊y⌋/2⌋ = ⌊y/2⌋, so the counts are those that
all data at once would give, in whatever order and parts they came. A bin is at most 2·max|x| / bins wide.

Counts are float32, exact up to 2²⁴ a bin; beyond, each update may lose 6·10⁻⁸ of a bin's count.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.core.errors import InputError

_LOWEST = -126  # exponent of a range that nothing was seen in


class HistogramState(NamedTuple):
    """Counts so far, of all values or of each channel's."""

    counts: Float[Array, "*channels bins"]
    exponent: Int[Array, "*channels"]  # k
    largest: Float[Array, "*channels"]  # max |x|, float32
    seen: Float[Array, "*channels"]  # values that count
    bad: Float[Array, "*channels"]  # of those, NaN or infinite: they are in no bin


def init(channels: int | None = None, *, bins: int = 2048) -> HistogramState:
    """Nothing seen yet; with `channels` one histogram for each. Raises InputError for fewer than 2 bins."""
    if bins < 2:
        raise InputError(f"histogram of {bins} bins: it needs at least 2, as 2048")
    batch = () if channels is None else (channels,)
    zero = jnp.zeros(batch, jnp.float32)
    return HistogramState(jnp.zeros((*batch, bins)), jnp.full(batch, _LOWEST, jnp.int32), zero, zero, zero)


def update(
    state: HistogramState, x: Float[Array, "*batch channels"], mask: Bool[Array, "*batch"] | None = None
) -> HistogramState:
    """Adds rows; those where the mask is False do not count."""
    magnitude = jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
    keep = jnp.ones(magnitude.shape[:1], bool) if mask is None else mask.reshape(-1)
    keep = jnp.broadcast_to(keep[:, None], magnitude.shape)
    finite = jnp.isfinite(magnitude)
    magnitude = jnp.where(keep & finite, magnitude, 0.0)
    axes = (0,) if state.exponent.ndim else (0, 1)
    largest = jnp.max(magnitude, axis=axes, initial=0.0)
    exponent = jnp.maximum(state.exponent, _ceil_log2(largest))
    bins = state.counts.shape[-1]
    # Halved twice over, lest the factor of a tiny range overflow.
    half = exponent // 2
    place = (magnitude * jnp.exp2(-half) * jnp.exp2(half - exponent) * bins).astype(jnp.int32)
    place = jnp.minimum(place, bins - 1)
    if state.exponent.ndim:
        place = place + bins * jnp.arange(magnitude.shape[1])
    added = jnp.zeros(state.counts.size, jnp.float32).at[place.reshape(-1)].add((keep & finite).reshape(-1))
    return HistogramState(
        counts=_widened(state, exponent).counts + added.reshape(state.counts.shape),
        exponent=exponent,
        largest=jnp.maximum(state.largest, largest),
        seen=state.seen + jnp.sum(keep, axis=axes, dtype=jnp.float32),
        bad=state.bad + jnp.sum(keep & ~finite, axis=axes, dtype=jnp.float32),
    )


def merge(*states: HistogramState) -> HistogramState:
    """The counts of several states over the same input."""
    exponent = functools.reduce(jnp.maximum, (state.exponent for state in states))
    counts = functools.reduce(jnp.add, (_widened(state, exponent).counts for state in states))
    largest = functools.reduce(jnp.maximum, (state.largest for state in states))
    seen, bad = sum(state.seen for state in states), sum(state.bad for state in states)
    return HistogramState(counts, exponent, largest, jnp.asarray(seen), jnp.asarray(bad))


def check(state: HistogramState, what: str) -> None:
    """Raises InputError naming `what` where the data cannot serve: no rows, NaN or infinite, or all zero."""
    if not bool(jnp.all(state.seen > 0)):
        raise InputError(f"{what}: no rows were seen; give calibration text that the model handles")
    if bool(jnp.any(state.bad > 0)):
        raise InputError(f"{what}: activations hold a NaN or an infinity; give calibration text that the model handles")
    if not bool(jnp.any(state.largest > 0)):
        raise InputError(f"{what}: all activations are zero; no method can learn from them")


def edges(state: HistogramState) -> Float[Array, "*channels bins"]:
    """The upper edge of each bin; that of the last value at most the largest magnitude."""
    bins = state.counts.shape[-1]
    edge = jnp.arange(1, bins + 1) / bins * jnp.exp2(state.exponent.astype(jnp.float32))[..., None]
    return jnp.minimum(edge, state.largest[..., None])


def unusable(state: HistogramState) -> Bool[Array, "*channels"]:
    """Where nothing was seen, or a NaN or an infinity was."""
    return (state.seen == 0) | (state.bad > 0)


def _widened(state: HistogramState, exponent: Array) -> HistogramState:
    """The counts with ranges up to 2^exponent."""
    bins = state.counts.shape[-1]
    place = jnp.arange(bins) >> jnp.minimum(exponent - state.exponent, 31)[..., None]
    if state.exponent.ndim:
        place = place + bins * jnp.arange(len(state.exponent))[:, None]
    counts = jnp.zeros(state.counts.size, jnp.float32).at[place.reshape(-1)].add(state.counts.reshape(-1))
    return state._replace(counts=counts.reshape(state.counts.shape), exponent=exponent)


def _ceil_log2(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.maximum((bits >> 23) - 127 + ((bits & 0x7FFFFF) > 0), _LOWEST)
