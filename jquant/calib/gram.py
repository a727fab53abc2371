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
from jaxtyping import Array, Bool, Float

from jquant.core.errors import InputError


class GramState(NamedTuple):
    """Sums so far, float32."""

    products: Float[Array, "in in"]  # Σ xᵀx
    rows: Float[Array, ""]


class Gram(NamedTuple):
    """The finished matrix and what it rests on."""

    matrix: Float[Array, "*batch in in"]
    rows: Float[Array, "*batch"]


def init(dim: int) -> GramState:
    """Nothing seen yet."""
    return GramState(jnp.zeros((dim, dim), jnp.float32), jnp.float32(0))


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
    products = jnp.einsum(
        "ri,rj->ij", rows, rows, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return GramState(state.products + products, state.rows + count)


def merge(*states: GramState) -> GramState:
    """The sums of several states over the same input."""
    return jax.tree.map(lambda *sums: functools.reduce(jnp.add, sums), *states)


def finalize(state: GramState) -> Gram:
    """H, NaN where no row was seen."""
    return Gram(state.products * (2 / state.rows), state.rows)


def check(gram: Gram, what: str) -> None:
    """Raises InputError naming `what` where the data cannot serve: no rows, NaN or infinite, or all zero."""
    if not bool(jnp.all(jnp.isfinite(gram.matrix))):
        reason = "no rows were seen" if not bool(jnp.all(gram.rows > 0)) else "activations hold a NaN or an infinity"
        raise InputError(f"{what}: {reason}; give calibration text that the model handles")
    if not bool(jnp.any(jnp.diagonal(gram.matrix, axis1=-2, axis2=-1) > 0)):
        raise InputError(f"{what}: all activations are zero; no method can learn from them")
