"""The largest magnitude of every channel of a layer's input: what SmoothQuant and static scales know of the data.

    a_c = max |x_c|        over the rows that are not masked

Reference: SmoothQuant (Xiao et al., 2211.10438), 4.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.core.errors import InputError


class AbsMaxState(NamedTuple):
    """Largest magnitudes so far, float32; 0 where nothing was seen."""

    largest: Float[Array, "*experts channels"]


def init(dim: int, experts: int | None = None) -> AbsMaxState:
    """Nothing seen yet; with `experts` one row of channels for each."""
    return AbsMaxState(jnp.zeros((dim,) if experts is None else (experts, dim), jnp.float32))


def update(
    state: AbsMaxState, x: Float[Array, "*batch channels"], mask: Bool[Array, "*batch"] | None = None
) -> AbsMaxState:
    """Adds rows; those where the mask is False do not count. A NaN stays."""
    rows = jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
    if mask is not None:
        rows = jnp.where(mask.reshape(-1, 1), rows, 0)
    return AbsMaxState(jnp.maximum(state.largest, jnp.max(rows, axis=0)))


def update_grouped(state: AbsMaxState, x: Float[Array, "rows channels"], counts: Int[Array, " experts"]) -> AbsMaxState:
    """Adds rows that are sorted by expert: the first counts[0] are of expert 0, and so on."""
    expert = jnp.repeat(jnp.arange(len(counts)), counts, total_repeat_length=len(x))
    return AbsMaxState(state.largest.at[expert].max(jnp.abs(x.astype(jnp.float32))))


def merge(*states: AbsMaxState) -> AbsMaxState:
    """Of several states over the same input."""
    return AbsMaxState(functools.reduce(jnp.maximum, (state.largest for state in states)))


def finalize(state: AbsMaxState) -> Float[Array, "*experts channels"]:
    """The maxima."""
    return state.largest


def check(largest: Float[Array, "*experts channels"], what: str) -> None:
    """Raises InputError naming `what` where the data cannot serve: NaN or infinite, or all zero, as where none came."""
    if not bool(jnp.all(jnp.isfinite(largest))):
        raise InputError(f"{what}: activations hold a NaN or an infinity, or no rows were seen; give other text")
    if not bool(jnp.any(largest > 0)):
        raise InputError(f"{what}: all activations are zero; no method can learn from them")
