"""A large symmetric matrix, worked on strip by strip: where the caller donates it, no second one is ever there.

A strip is some rows or columns that stand side by side. What one step reads of the matrix it has read before it
writes, so XLA writes into the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

_STRIP, _STRIPS = 128, 16  # columns of a strip at least; strips of a matrix at most
_FEW, _WORTH_FEW = 4, 2048  # strips of a matrix up to that size, in whose products a CPU is twice as fast


def mirrored(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """What stands above the diagonal also below it."""
    size = matrix.shape[-1]

    def one(matrix: Array, begin: Array | int, width: int) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(matrix, begin, width, axis=-2)
        columns = jax.lax.dynamic_slice_in_dim(matrix, begin, width, axis=-1)
        below = jnp.arange(size)[:, None] > begin + jnp.arange(width)
        return jax.lax.dynamic_update_slice_in_dim(
            matrix, jnp.where(below, rows.swapaxes(-1, -2), columns), begin, axis=-1
        )

    return _strip_by_strip(matrix, one)


def reordered(matrix: Float[Array, "n n"], order: Int[Array, " n"]) -> Float[Array, "n n"]:
    """matrix[order, order], of rows and of columns: first the rows, then the columns."""

    def rows(matrix: Array, begin: Array | int, width: int) -> Array:
        strip = jax.lax.dynamic_slice_in_dim(matrix, begin, width, axis=1)
        moved = strip.at[order].get(mode="promise_in_bounds")
        return jax.lax.dynamic_update_slice_in_dim(matrix, moved, begin, axis=1)

    def columns(matrix: Array, begin: Array | int, width: int) -> Array:
        strip = jax.lax.dynamic_slice_in_dim(matrix, begin, width, axis=0)
        moved = strip.at[:, order].get(mode="promise_in_bounds")
        return jax.lax.dynamic_update_slice_in_dim(matrix, moved, begin, axis=0)

    return _strip_by_strip(_strip_by_strip(matrix, rows), columns)


def square(
    rows: Float[Array, "out n"],
    above: Float[Array, "n n"],
    diagonal: Float[Array, " n"],
    *,
    factors: DTypeLike = jnp.float32,
) -> Float[Array, ""]:
    """tr(E·H·Eᵀ) = Σ_i H_ii·|e_i|² + 2·Σ_{i<j} H_ij·e_iᵀ·e_j over the columns e of E: half the multiplications.

    Args:
        rows: E.
        above: H where it stands above the diagonal; what is on it and below is not read.
        diagonal: of H.
        factors: what E and H are rounded to beside the diagonal; sums are float32. Where E avoids directions in which H
            is large, as that of GPTQ does, rounding it is seen in them.
    """
    by_strips, by_tiles = partial(_beside_by_strips, factors=factors), partial(_beside_by_tiles, factors=factors)
    beside = jax.lax.platform_dependent(rows, above, cpu=by_strips, default=by_tiles)
    return jnp.sum(jnp.sum(rows * rows, axis=0) * diagonal) + 2 * beside


def _beside_by_strips(rows: Array, above: Array, factors: DTypeLike) -> Array:
    """Σ_{i<j} of `square`, by strips of columns down to the diagonal."""
    size = len(above)
    if size > _WORTH_FEW:
        return _beside_by_tiles(rows, above, factors)
    width, total = -(-size // _FEW), jnp.float32(0)
    for begin in range(0, size, width):
        end = min(begin + width, size)
        strip = jnp.triu(above[:end, begin:end], 1 - begin)
        found = _product(rows[:, :end], strip, factors)
        total += jnp.sum(found * rows[:, begin:end])
    return total


def _beside_by_tiles(rows: Array, above: Array, factors: DTypeLike) -> Array:
    """The same by tiles, one after another: in little memory, and with one product to compile."""
    size = len(above)
    width = _width(size)
    count = -(-size // width)
    tiles = [(row, column) for row in range(count) for column in range(row, count)]

    def one_tile(total: Array, tile: Array) -> tuple[Array, None]:
        begins = jnp.minimum(
            tile * width, size - width
        )  # the last one may begin earlier: what is another's is left out
        left, right = (jax.lax.dynamic_slice_in_dim(rows, begin, width, axis=1) for begin in begins)
        row, column = (begins[:, None] + jnp.arange(width))[:, :, None]
        own = (row < column.T) & (row >= tile[0] * width) & (tile[1] * width <= column.T)
        values = jnp.where(own, jax.lax.dynamic_slice(above, begins, (width, width)), 0)
        return total + jnp.sum(_product(left, values, factors) * right), None

    return jax.lax.scan(one_tile, jnp.float32(0), jnp.asarray(tiles))[0]


def _product(a: Array, b: Array, factors: DTypeLike) -> Array:
    a, b = a.astype(factors), b.astype(factors)
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _strip_by_strip(matrix: Array, one: Callable[[Array, Array | int, int], Array]) -> Array:
    """Applies `one`, of (matrix, where a strip begins, its width), from the first strip to the last."""
    size = matrix.shape[-1]
    width = _width(size)
    count = size // width
    matrix = jax.lax.fori_loop(0, count, lambda index, matrix: one(matrix, index * width, width), matrix)
    return matrix if count * width == size else one(matrix, count * width, size - count * width)


def _width(size: int) -> int:
    return min(size, max(_STRIP, -(-size // _STRIPS)))
