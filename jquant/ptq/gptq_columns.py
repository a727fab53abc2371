"""Columns of GPTQ's weight, read a few at a time: so no turned copy of the matrix stands beside it.

Reference: as gptq.py.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

# From the one at a place on so many columns of a matrix [out, in]: [n, out] float32.
Columns = Callable[[Array | int, int], Array]


def columns_of(matrix: Array, *, axis: int) -> Columns:
    """Of a matrix whose columns run along `axis`: 1 of [out, in], 0 of one that is turned."""

    def some(begin: Array | int, size: int) -> Array:
        found = jax.lax.dynamic_slice_in_dim(matrix, begin, size, axis=axis).astype(jnp.float32)
        return found.T if axis else found

    return some


def ordered(w: Array, order: Array, importance: Array) -> Columns:
    """Columns of W in order, 0 where the input is dead, and where there is none.

    Args:
        w: [out, in].
        order: [columns] of them; an entry beyond the last column is of padding.
        importance: [columns], H_jj in that order; 0 of dead inputs and of padding.
    """

    def some(at: Array | int, size: int) -> Array:
        chosen, here = (jax.lax.dynamic_slice_in_dim(each, at, size) for each in (order, importance))
        return alive(w.at[:, chosen].get(mode="clip").T.astype(jnp.float32), here)

    return some


def ordered_copy(w: Array, order: Array, diagonal: Array) -> Array:
    """All that `ordered` gives, [columns, out]: for GPUs, which read rows that stand side by side.

    Args:
        w: [out, in].
        order: as there.
        diagonal: [in], H_jj in the order of W.
    """
    turned = alive(w.astype(jnp.float32).T, diagonal)
    turned = jnp.pad(turned, ((0, len(order) - len(turned)), (0, 0)))
    turned = jax.lax.optimization_barrier(turned)  # or numbers far apart would be gathered
    return turned.at[order].get(mode="promise_in_bounds")


def within(columns: Array, start: Array | int) -> Columns:
    """Those of a part that begins at `start`, which stand side by side: so each is gathered once."""
    return lambda at, size: jax.lax.dynamic_slice_in_dim(columns, at - start, size)


def alive(columns: Array, importance: Array) -> Array:
    """Columns [n, out], 0 where the input was: where they are read, or all would be copied once more."""
    return jnp.where(importance[:, None] == 0, 0.0, columns)
