"""The Gram matrix of a layer's input: all that second-order methods know of the data.

    H = (2 / N) · Σ xᵀx        over the N rows that are not masked

Layers that read the same input share it. The state holds sums, so batches stream through it and shards add up.

Reference: GPTQ (Frantar et al., 2210.17323), 2: the Hessian of ‖WX − ŴX‖² in a row of W, the same for all rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.core.errors import InputError


class GramState(NamedTuple):
    """Sums so far, float32."""

    products: Float[Array, "*experts in in"]  # Σ xᵀx
    rows: Float[Array, "*experts"]


class Gram(NamedTuple):
    """The finished matrix and what it rests on."""

    matrix: Float[Array, "*batch in in"]
    rows: Float[Array, "*batch"]


def init(dim: int, experts: int | None = None) -> GramState:
    """Nothing seen yet; with `experts` one matrix for each."""
    batch = () if experts is None else (experts,)
    return GramState(jnp.zeros((*batch, dim, dim), jnp.float32), jnp.zeros(batch, jnp.float32))


def update(state: GramState, x: Float[Array, "*batch in"], mask: Bool[Array, "*batch"] | None = None) -> GramState:
    """Adds rows.

    Args:
        state: sums so far.
        x: float32 or bfloat16; products of the input's dtype are summed in float32.
        mask: True for the rows that count; padding is False.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = jnp.float32(len(rows))
    if mask is not None:
        keep = mask.reshape(-1)
        rows, count = jnp.where(keep[:, None], rows, 0), jnp.sum(keep, dtype=jnp.float32)
    return GramState(state.products + _products(rows), state.rows + count)


def update_grouped(state: GramState, x: Float[Array, "rows in"], counts: Int[Array, " experts"]) -> GramState:
    """Adds rows that are sorted by expert: the first counts[0] are of expert 0, and so on."""
    expert = jnp.repeat(jnp.arange(len(counts)), counts, total_repeat_length=len(x))

    def one(carry: None, index: Array) -> tuple[None, Array]:
        rows = jnp.where((expert == index)[:, None], x, 0)
        return carry, _products(rows)

    _, products = jax.lax.scan(one, None, jnp.arange(len(counts)))
    return GramState(state.products + products, state.rows + counts)


def _products(rows: Float[Array, "rows in"]) -> Float[Array, "in in"]:
    return jnp.einsum("ri,rj->ij", rows, rows, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def merge(*states: GramState) -> GramState:
    """The sums of several states over the same input."""
    return jax.tree.map(lambda *sums: functools.reduce(jnp.add, sums), *states)


def finalize(state: GramState) -> Gram:
    """H; NaN where no row was seen, but 0 for an expert that no row reached."""
    rows = jnp.maximum(state.rows, 1) if state.rows.ndim else state.rows
    return Gram(state.products * (2 / rows)[..., None, None], state.rows)


def check(gram: Gram, what: str) -> None:
    """Raises InputError naming `what` where the data cannot serve: no rows, NaN or infinite, or all zero."""
    if not bool(jnp.all(jnp.isfinite(gram.matrix))):
        reason = "no rows were seen" if not bool(jnp.all(gram.rows > 0)) else "activations hold a NaN or an infinity"
        raise InputError(f"{what}: {reason}; give calibration text that the model handles")
    if not bool(jnp.any(jnp.diagonal(gram.matrix, axis1=-2, axis2=-1) > 0)):
        raise InputError(f"{what}: all activations are zero; no method can learn from them")
