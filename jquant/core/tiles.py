"""Matrices cut into the tiles that share a scale, the inputs along either of their axes.

    axis −1: W[..., out, in]        tiles [..., row tiles, tile rows, column tiles, tile columns]
    axis −2: W[..., in, out]        tiles [..., column tiles, tile columns, row tiles, tile rows]

Rows are outputs and columns inputs. Arrays of one entry a tile lie as the tiles do: [..., row tiles, column tiles], and
of axis −2 the other way round. On CPU cutting a matrix where it lies takes a quarter of the time of turning it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from jquant.core.scheme import Scheme

Axis = Literal[-1, -2]  # of the inputs


def to_tiles(x: Array, scheme: Scheme, axis: Axis = -1) -> Array:
    """The tiles of a matrix; ragged edges padded with zeros."""
    rows, columns = x.shape[-3 - axis], x.shape[axis]
    tile = _in_order(scheme.tile(rows, columns), axis)
    short = tuple(-size % part for size, part in zip(x.shape[-2:], tile, strict=True))
    if any(short):
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, each) for each in short])
    return x.reshape(*x.shape[:-2], x.shape[-2] // tile[0], tile[0], x.shape[-1] // tile[1], tile[1])


def from_tiles(tiles: Array, matrix_shape: tuple[int, int]) -> Array:
    """The inverse of `to_tiles`, of either axis: the padding is cut off."""
    *batch, tiles_first, first, tiles_last, last = tiles.shape
    x = tiles.reshape(*batch, tiles_first * first, tiles_last * last)
    return x if x.shape[-2:] == matrix_shape else x[..., : matrix_shape[0], : matrix_shape[1]]


def spread(per_tile: Array) -> Array:
    """One entry a tile, to a shape that broadcasts against tiles."""
    return per_tile[..., :, None, :, None]


def over_tile(reduce: Callable[..., Array], tiles: Array) -> Array:
    """Tiles to one entry each."""
    if tiles.shape[-3] == 1:
        return reduce(tiles, axis=(-1,))[..., 0, :]
    if tiles.shape[-1] == 1:
        return reduce(tiles, axis=(-3,))[..., 0]
    return reduce(tiles, axis=(-3, -1))


def _in_order(of_rows_and_columns: tuple[int, int], axis: Axis) -> tuple[int, int]:
    rows, columns = of_rows_and_columns
    return (rows, columns) if axis == -1 else (columns, rows)
