"""The mean magnitude of every channel of a layer's input: what AWQ knows of the data.

    a_c = mean |x_c|        over the rows that are not masked

Reference: AWQ (Lin et al., 2306.00978), 3.2.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.core.errors import InputError


class AbsMeanState(NamedTuple):
    """Sums so far, float32."""

    total: Float[Array, "*experts channels"]
    rows: Float[Array, "*experts"]


def init(dim: int, experts: int | None = None) -> AbsMeanState:
    """Nothing seen yet; with `experts` one row of channels for each."""
    batch = () if experts is None else (experts,)
    return AbsMeanState(jnp.zeros((*batch, dim), jnp.float32), jnp.zeros(batch, jnp.float32))


def update(
    state: AbsMeanState, x: Float[Array, "*batch channels"], mask: Bool[Array, "*batch"] | None = None
) -> AbsMeanState:
    """Adds rows; those where the mask is False do not count."""
    rows = jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
    count = jnp.float32(len(rows))
    if mask is not None:
        keep = mask.reshape(-1)
        rows, count = jnp.where(keep[:, None], rows, 0), jnp.sum(keep, dtype=jnp.float32)
    return AbsMeanState(state.total + jnp.sum(rows, axis=0), state.rows + count)


def update_grouped(
    state: AbsMeanState, x: Float[Array, "rows channels"], counts: Int[Array, " experts"]
) -> AbsMeanState:
    """Adds rows that are sorted by expert: the first counts[0] are of expert 0, and so on."""
    expert = jnp.repeat(jnp.arange(len(counts)), counts, total_repeat_length=len(x))
    return AbsMeanState(state.total.at[expert].add(jnp.abs(x.astype(jnp.float32))), state.rows + counts)


def merge(*states: AbsMeanState) -> AbsMeanState:
    """The sums of several states over the same input."""
    return jax.tree.map(lambda *sums: functools.reduce(jnp.add, sums), *states)


def finalize(state: AbsMeanState) -> Float[Array, "*experts channels"]:
    """The means; 0 for an expert that no row reached, NaN where there are no experts and no rows."""
    if state.rows.ndim:
        return state.total / jnp.maximum(state.rows, 1)[:, None]
    return state.total / state.rows


def check(means: Float[Array, "*experts channels"], what: str) -> None:
    """Raises InputError naming `what` where the data cannot serve: NaN or infinite, or all zero, as where none came."""
    if not bool(jnp.all(jnp.isfinite(means))):
        raise InputError(f"{what}: activations hold a NaN or an infinity, or no rows were seen; give other text")
    if not bool(jnp.any(means > 0)):
        raise InputError(f"{what}: all activations are zero; no method can learn from them")
