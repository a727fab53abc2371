"""A block of GPTQ's columns in one kernel: a tile of rows stays on chip while all columns of the block are rounded.

    w̃_i = c_i + Σ_{k<i} (w_k − q_k)·R_ki / R_ii,   q_i = round(w̃_i)

XLA runs a column as several small kernels, which on an H100 take longer to start than to run. Here a program takes
`_ROWS` rows through the block; what they lost so far is a tile in registers.

Reference: GPTQ (Frantar et al., 2210.17323), 3.2 to 3.4; jquant/ptq/gptq.py for the form with R.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from jquant.core.formats import Element, Float, Int
from jquant.kernels.options import assembles, lanes, triton_options
from jquant.kernels.rounding import Divisor, divisor, nearest_code, quotient, whole_quotient

_ROWS, _WARPS = 32, 2  # on an H100 a column of 14336 rows takes 0.7 µs


class Block(NamedTuple):
    """What is known of the columns of a block, in the order in which they are rounded."""

    columns: Float32[Array, "n out"]  # compensated for all columns before the block
    weight: Float32[Array, "n out"]  # as they were
    scale: Float32[Array, "n out"]
    zero: Float32[Array, "n out"] | None  # zero points of integers that have some
    share: Float32[Array, "n n"]  # R_ki / R_ii, k first
    root: Float32[Array, " n"]  # R_ii


class Rounded(NamedTuple):
    """What became of them."""

    errors: Float32[Array, "n out"]  # w − q
    codes: UInt8[Array, "n out"]
    loss: Float32[Array, " out"]  # Σ (w̃ − q)²·R_ii²


def fits(element: Element, columns: int) -> bool:
    """Whether the kernel can round so many columns to this format."""
    known = isinstance(element, Int | Float) or (element.bits <= 4 and hasattr(element, "midpoints"))
    return known and 16 <= columns <= 256 and columns & (columns - 1) == 0


def round_block(block: Block, element: Element, *, interpret: bool = False) -> Rounded:
    """Rounds the columns of a block one after another, each compensated for those before it.

    Args:
        block: `fits(element, n)` must hold.
        element: integers, floats, or a codebook of up to 16 levels.
        interpret: run the kernel's operations one by one, on any platform.
    """
    from jax.experimental import pallas as pl

    n, out = block.columns.shape
    rows = lanes(_ROWS)
    padded = -(-out // rows) * rows
    tiles = [block.columns, block.weight, block.scale, *([] if block.zero is None else [block.zero])]
    # Rows of padding: 0 over a scale of 1.
    tiles = [jnp.pad(x, ((0, 0), (0, padded - out)), constant_values=float(i == 2)) for i, x in enumerate(tiles)]
    tile = pl.BlockSpec((n, rows), lambda i: (0, i))
    errors, codes, loss = pl.pallas_call(
        partial(_kernel, element, block.zero is not None, assembles(interpret)),
        grid=(padded // rows,),
        in_specs=[*[tile] * len(tiles), pl.BlockSpec((n, n), lambda i: (0, 0)), pl.BlockSpec((n,), lambda i: (0,))],
        out_specs=[tile, tile, pl.BlockSpec((rows,), lambda i: (i,))],
        out_shape=[
            jax.ShapeDtypeStruct((n, padded), jnp.float32),
            jax.ShapeDtypeStruct((n, padded), jnp.uint8),
            jax.ShapeDtypeStruct((padded,), jnp.float32),
        ],
        interpret=interpret,
        name="gptq_block",
        **triton_options(_WARPS, interpret),
    )(*tiles, block.share.T, block.root)
    return Rounded(errors[:, :out], codes[:, :out], loss[:out])


def round_block_reference(block: Block, element: Element) -> Rounded:
    """The same in jnp."""
    shape = block.columns.shape

    def one_column(index: Array, found: Rounded) -> Rounded:
        column = block.columns[index] + jnp.matmul(
            block.share[:, index], found.errors, precision=jax.lax.Precision.HIGHEST
        )
        zero = None if block.zero is None else block.zero[index]
        scale = block.scale[index]
        code, value = _round(column, scale, divisor(scale, assembly=False), zero, element=element)
        lost = (column - value) * block.root[index]
        return Rounded(
            found.errors.at[index].set(block.weight[index] - value),
            found.codes.at[index].set(code.astype(jnp.uint8)),
            found.loss + lost * lost,
        )

    nothing = Rounded(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.uint8), jnp.zeros(shape[1], jnp.float32))
    return jax.lax.fori_loop(0, shape[0], one_column, nothing)


def _kernel(
    element: Element, has_zero: bool, assembly: bool, columns: Any, weight: Any, scale: Any, *refs: Any
) -> None:
    zero, (share, root, errors_out, codes_out, loss_out) = (refs[0], refs[1:]) if has_zero else (None, refs)
    n, rows = columns.shape
    places = jax.lax.broadcasted_iota(jnp.int32, (n, rows), 0)

    def load(index: Any) -> tuple[Any, ...]:
        """What a column needs that does not depend on those before; loaded while the one before is rounded."""
        steps = scale[index, :]
        zeros = () if zero is None else (zero[index, :],)
        by = divisor(steps, assembly=assembly)
        return share[index, :], columns[index, :], weight[index, :], root[index], steps, by, *zeros

    def one_column(index: Any, carry: tuple[Array, Array, tuple[Any, ...]]) -> Any:
        errors, loss, (shares, start, original, height, *parameters) = carry
        following = load(jnp.minimum(index + 1, n - 1))
        column = start + jnp.sum(errors * shares[:, None], axis=0)
        code, value = _round(column, *parameters, element=element, assembly=assembly)
        codes_out[index, :] = code.astype(jnp.uint8)
        lost = (column - value) * height
        return jnp.where(places == index, (original - value)[None, :], errors), loss + lost * lost, following

    nothing = (jnp.zeros((n, rows), jnp.float32), jnp.zeros((rows,), jnp.float32))
    errors_out[...], loss_out[...], _ = jax.lax.fori_loop(0, n, one_column, (*nothing, load(0)))


def _round(
    column: Array, scale: Array, by: Divisor, zero: Array | None = None, *, element: Element, assembly: bool = False
) -> tuple[Array, Array]:
    """Codes (int32) and values."""
    if isinstance(element, Int):
        origin = jnp.float32(element.offset) if zero is None else zero
        lowest = element.lowest_code if zero is None else 0
        whole = whole_quotient(column, by, assembly=assembly)
        code = jnp.clip(whole + origin, lowest, element.highest_code)
        return code.astype(jnp.int32), (code - origin) * scale
    code, level = nearest_code(quotient(column, by, assembly=assembly), element)
    return code, level * scale
