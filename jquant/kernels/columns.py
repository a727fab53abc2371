"""Stretches of columns [columns, rows] in a kernel, every thread of a line at a row of its own.

Triton chooses how a tile is spread over threads by how its loads are widest: four neighbours of a line a thread. Of a
line of eight rows two threads then hold all, and sixteen share a sum over columns. Here places in a line are what no
compiler can see through, so that each thread loads single numbers: eight share a line, and four a sum.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


def load(ref: Any, piece: int, *, assembly: bool) -> list[Array]:
    """All of `ref` [columns, rows], in pieces of so many columns, which a kernel adds up one after another."""
    return [ref[_places(begin, piece, ref.shape[1], assembly)] for begin in range(0, ref.shape[0], piece)]


def load_column(ref: Any, rows: int, piece: int, *, assembly: bool) -> list[Array]:
    """All of `ref` [count, 1] for all rows, in pieces [piece, 1 or rows]."""
    found = []
    for begin in range(0, ref.shape[0], piece):
        column, _ = _places(begin, piece, rows, assembly)
        found.append(ref[column, jnp.zeros_like(column)] if assembly else ref[column, :])
    return found


def _places(begin: int, count: int, rows: int, assembly: bool) -> tuple[Any, Any]:
    if not assembly:
        return slice(begin, begin + count), slice(None)
    column, row = (
        _hidden(begin * (1 - axis) + jax.lax.broadcasted_iota(jnp.int32, shape, axis))
        for axis, shape in enumerate(((count, 1), (1, rows)))
    )
    return jnp.broadcast_to(column, (count, rows)), jnp.broadcast_to(row, (count, rows))


def _hidden(x: Int32[Array, "..."]) -> Int32[Array, "..."]:
    from jax.experimental.pallas import triton

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return triton.elementwise_inline_asm(
        "mov.b32 $0, $1;", args=[x], constraints="=r,r", pack=1, result_shape_dtypes=[shape]
    )[0]
