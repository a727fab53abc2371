"""Blocks of GPTQ's columns in one kernel: a tile of rows stays on chip while all columns of a block are rounded.

    w̃_i = c_i + Σ_{k<i} (w_k − q_k)·R_ki / R_ii,   q_i = round(w̃_i)

XLA runs a column as several small kernels, which on an H100 take longer to start than to run. Here a program takes
`_ROWS` rows through all columns, `_PART` at a time: what earlier parts lost comes in by tensor cores, in products of
bfloat16 parts, and within a part columns and what they lost share a tile of registers. Several schemes stand side by
side as more rows of one weight: while a program waits for a column, others of its multiprocessor run.

What limits is how long loads take: a thread has 252 registers, so that a multiprocessor holds eight warps, and of the
0.7 µs that a column of 32 rows takes issuing its 293 instructions is a fifth. Tried on an H100 (int4, 4096 to 14336,
512 columns): what eight columns lost and their shares in registers, a row a thread, 0.25 ms in place of 0.35, but a
first call of 13 s in place of 4, and of minutes where five formats stand side by side; four columns 0.31 ms, and 38 s
in place of 17 for the five. Not taken: a layer would save a millisecond.

Reference: GPTQ (Frantar et al., 2210.17323), 3.2 to 3.4; jquant/ptq/gptq.py for the form with R.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt8

from jquant.core.formats import Element, Float, Int
from jquant.kernels.error_parts import Errors, Parts
from jquant.kernels.options import assembles, lanes, triton_options
from jquant.kernels.rounding import Divisor, divisor, nearest_code, quotient, whole_quotient

_ROWS, _WARPS = 32, 1
_ROWS_OF_SEVERAL, _WARPS_OF_SEVERAL = 64, 2  # schemes: there is enough to wait for, and products have wider operands
_PART = 32  # columns, or all of fewer
_PRODUCT = 64  # columns of earlier parts that a product takes, and then the rest a part each
_MOST = 1024  # columns of a block


class Kind(NamedTuple):
    """To what the rows of a scheme are rounded."""

    element: Element
    has_zero: bool  # zero points of integers, a group


class Rows(NamedTuple):
    """n rows of a larger array, read where they stand: after so many times n others."""

    whole: Float32[Array, "m rows"]
    after: int = 0

    def taken(self, n: int) -> Array:
        """They alone."""
        return self.whole[self.after * n : (self.after + 1) * n]


class Block(NamedTuple):
    """What is known of the columns of a block, in the order in which they are rounded.

    `rows` are those of one weight [out, in] for scheme after scheme: schemes · out.
    """

    # Columns compensated for all before the block are the sum of these, of [n, rows], or [n, out] for every scheme.
    columns: Sequence[Rows]
    weight: Rows  # [n, out], columns as they were
    scale: Float32[Array, "groups rows"]
    zero: Float32[Array, "groups rows"] | None  # where any scheme has some
    place: Int32[Array, "schemes n"]  # the group of each column
    number: Int32[Array, " n"]  # the row of codes that is a column's
    share: Float32[Array, "n n"]  # R_ki / R_ii in row i and column k < i, 1 on the diagonal; the rest is not read
    root: Float32[Array, " n"]  # R_ii


class Rounded(NamedTuple):
    """What became of them."""

    errors: list[Errors]  # as given, with those of this block
    codes: UInt8[Array, "columns rows"]  # likewise
    loss: Float32[Array, " rows"]  # Σ (w̃ − q)²·R_ii²


def fits(element: Element, columns: int) -> bool:
    """Whether the kernel can round so many columns to this format."""
    known = isinstance(element, Int | Float) or (element.bits <= 4 and hasattr(element, "midpoints"))
    return known and columns <= _MOST and (columns == _PART // 2 or (columns > 0 and columns % _PART == 0))


def round_block(
    block: Block,
    kinds: Sequence[Kind],
    errors: Sequence[Errors],
    codes: UInt8[Array, "columns rows"] | int,
    *,
    interpret: bool = False,
) -> Rounded:
    """Rounds the columns of a block one after another, each compensated for those before it.

    Args:
        block: `fits(element, n)` must hold for every scheme.
        kinds: of the schemes, in the order of rows.
        errors: to each of which those of this block are added, in its memory.
        codes: of blocks before, to which this one's are added, in their memory; or of how many columns there will be.
        interpret: run the kernel's operations one by one, on any platform.
    """
    from jax.experimental import pallas as pl

    n, out, schemes = len(block.root), block.weight.whole.shape[1], len(kinds)
    width, warps = (_ROWS, _WARPS) if schemes == 1 else (_ROWS_OF_SEVERAL, _WARPS_OF_SEVERAL)
    rows = lanes(width)
    programs = -(-out // rows)  # of a scheme
    padded = programs * rows

    def whole_tiles(x: Array, value: float = 0.0) -> Array:
        """[…, schemes · out], or [m, out], with rows of padding after each scheme's."""
        if padded == out:
            return x
        each = x.reshape(len(x), -1, out)
        return jnp.pad(each, ((0, 0), (0, 0), (0, padded - out)), constant_values=value).reshape(len(x), -1)

    def without_padding(x: Array) -> Array:
        if padded == out:
            return x
        return x.reshape(*x.shape[:-1], schemes, padded)[..., :out].reshape(*x.shape[:-1], schemes * out)

    def spec(given: Rows) -> Any:
        """Of a tile of its rows, which are those of every scheme where it has no more."""
        return pl.BlockSpec((n, rows), lambda i: (given.after, i if given.whole.shape[1] > out else i % programs))

    # Rows of padding: 0 over a scale of 1.
    tables = [whole_tiles(block.scale, 1.0), *([] if block.zero is None else [whole_tiles(block.zero)])]
    table = pl.BlockSpec((len(block.scale), rows), lambda i: (0, i))
    kept = [*errors, *([] if errors else [Errors(None, 1)])]  # the first is read by later parts of the block
    outputs = [(each.whole, 3 * each.blocks * n, jnp.bfloat16) for each in kept]
    outputs.append((None, codes, jnp.uint8) if isinstance(codes, int) else (codes, len(codes), jnp.uint8))
    before = {place: whole for place, (whole, *_) in enumerate(outputs) if whole is not None}
    inputs = len(block.columns) + len(tables) + 7
    *filled, loss = pl.pallas_call(
        partial(_kernel, tuple(kinds), programs, (len(block.columns), len(tables), len(before)), assembles(interpret)),
        grid=(schemes * programs,),
        in_specs=[
            *(spec(each) for each in (*block.columns, block.weight)),
            *[table] * len(tables),
            pl.BlockSpec((None, 1, n), lambda i: (i // programs, 0, 0)),
            *[pl.BlockSpec((n, n), lambda i: (0, 0))] * 3,
            *[pl.BlockSpec((n,), lambda i: (0,))] * 2,
            *[pl.BlockSpec(memory_space=pl.ANY)] * len(before),
        ],
        out_specs=[
            *(pl.BlockSpec((3 * n, rows), lambda i, at=each.done: (at, i)) for each in kept),
            pl.BlockSpec((outputs[-1][1], rows), lambda i: (0, i)),
            pl.BlockSpec((rows,), lambda i: (i,)),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct((count, schemes * padded), dtype) for _, count, dtype in outputs),
            jax.ShapeDtypeStruct((schemes * padded,), jnp.float32),
        ],
        input_output_aliases={inputs + index: place for index, place in enumerate(before)},
        interpret=interpret,
        name="gptq_block",
        **triton_options(warps, interpret),
    )(
        *(whole_tiles(each.whole) for each in (*block.columns, block.weight)),
        *tables,
        block.place[:, None].astype(jnp.int32),
        block.share,
        *Parts.of(block.share),
        block.root,
        block.number.astype(jnp.int32),
        *(whole_tiles(each) for each in before.values()),
    )
    found = [
        Errors(without_padding(whole), each.blocks, each.done + 1) for each, whole in zip(errors, filled, strict=False)
    ]
    return Rounded(found, without_padding(filled[-1]), without_padding(loss))


def round_block_reference(block: Block, kinds: Sequence[Kind]) -> tuple[Array, Array, Array]:
    """The same in jnp, scheme after scheme: errors and codes [n, rows], in the order of columns, and loss."""
    weight = block.weight.taken(len(block.root))
    shape = weight.shape

    def of_scheme(index: int, kind: Kind) -> tuple[Array, Array, Array]:
        def own(rows: Array) -> Array:
            return rows[:, index * shape[1] : (index + 1) * shape[1]] if rows.shape[1] > shape[1] else rows

        columns = jnp.zeros(shape, jnp.float32)
        for each in block.columns:
            columns += own(each.taken(shape[0]))
        scale, zero = own(block.scale), None if block.zero is None else own(block.zero)

        def one_column(at: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            errors, codes, loss = found
            column = columns[at] + jnp.matmul(share[at], errors, precision=jax.lax.Precision.HIGHEST)
            step = scale[block.place[index, at]]
            origin = zero[block.place[index, at]] if zero is not None and kind.has_zero else None
            code, value = _round(column, step, divisor(step, assembly=False), origin, element=kind.element)
            lost = (column - value) * block.root[at]
            errors, codes = errors.at[at].set(weight[at] - value), codes.at[at].set(code.astype(jnp.uint8))
            return errors, codes, loss + lost * lost

        nothing = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.uint8), jnp.zeros(shape[1], jnp.float32)
        return jax.lax.fori_loop(0, shape[0], one_column, nothing)

    share = jnp.tril(block.share, -1)
    found = [of_scheme(index, kind) for index, kind in enumerate(kinds)]
    return jax.tree.map(lambda *each: jnp.concatenate(each, axis=-1), *found)


def _kernel(kinds: tuple[Kind, ...], programs: int, counts: tuple[int, int, int], assembly: bool, *refs: Any) -> None:
    from jax.experimental import pallas as pl

    columns, tables, before = counts
    left = iter(refs)

    def some(count: int) -> list[Any]:
        return list(itertools.islice(left, count))

    given, (weight, scale, *zero), known = some(columns), some(1 + tables), some(6)
    some(before)  # the same memory as of what comes
    *errors, codes, loss = left
    tile = _Refs(given, weight, scale, zero[0] if zero else None, _Known(*known), errors, codes, loss)
    distinct = list(dict.fromkeys(kinds))
    if len(distinct) == 1:
        _round_rows(distinct[0], assembly, tile)
        return
    scheme = pl.program_id(0) // programs
    for kind in distinct:
        places = [index for index, each in enumerate(kinds) if each == kind]
        here = functools.reduce(jnp.logical_or, (scheme == index for index in places))
        pl.when(here)(partial(_round_rows, kind, assembly, tile))


class _Known(NamedTuple):
    """What serves all rows, as in `Block`."""

    place: Any
    share: Any
    share_high: Any
    share_low: Any
    root: Any
    number: Any


class _Refs(NamedTuple):
    """Of a tile of rows."""

    columns: Sequence[Any]  # as in `Block`
    weight: Any
    scale: Any
    zero: Any | None
    known: _Known
    errors: Sequence[Any]
    codes: Any
    loss: Any


def _round_rows(kind: Kind, assembly: bool, refs: _Refs) -> None:
    from jax.experimental import pallas as pl

    (n, rows), errors, known = refs.weight.shape, refs.errors[0], refs.known
    size = min(n, _PART)
    many = _PRODUCT // size if n >= _PRODUCT else 1  # parts in a product
    numbers = jax.lax.broadcasted_iota(jnp.int32, (size, rows), 0)
    line = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)

    def one_part(part: Any, loss: Array) -> Array:
        here = pl.ds(part * size, size)

        def left_by(width: int, index: Any, total: Array) -> Array:
            there = pl.ds(index * width, width)
            shares = Parts(known.share_high[here, there], known.share_low[here, there])
            low = errors[pl.ds(n + index * width, width), :]
            return total + shares.times(Parts(errors[there, :], low))

        def place(index: Any) -> Any:
            return known.place[0, part * size + jnp.minimum(index, size - 1)]

        def load(index: Any, group: Any) -> tuple[Any, ...]:
            at = part * size + jnp.minimum(index, size - 1)
            zeros = (refs.zero[group, :],) if refs.zero is not None and kind.has_zero else ()
            first = known.number[at], known.share[at, here], refs.weight[at, :], known.root[at]
            return *first, refs.scale[group, :], *zeros

        def one_column(index: Any, carry: Any) -> Any:
            # In the tile: what columns before lost, and from this one on what they were when the part began.
            # What does not depend on columns before is loaded two columns ahead, its place three: nothing waits for it.
            tile, loss, by, (number, shares, original, height, *parameters), following, group = carry
            next_by, after = divisor(following[4], assembly=assembly), load(index + 2, group)
            column = jnp.sum(tile * jnp.where(line <= index, shares, 0)[:, None], axis=0)
            code, value = _round(column, parameters[0], by, *parameters[1:], element=kind.element, assembly=assembly)
            refs.codes[number, :] = code.astype(jnp.uint8)
            lost = (column - value) * height
            tile = jnp.where(numbers == index, (original - value)[None, :], tile)
            return tile, loss + lost * lost, next_by, following, after, place(index + 3)

        start = functools.reduce(jnp.add, (each[here, :] for each in refs.columns))
        if many > 1:
            start = jax.lax.fori_loop(0, part // many, partial(left_by, many * size), start)
        singly = part // many * many if many > 1 else 0
        start = jax.lax.fori_loop(singly, part, partial(left_by, size), start)
        at_hand, following = load(0, place(0)), load(1, place(1))
        carry = (start, loss, divisor(at_hand[4], assembly=assembly), at_hand, following, place(2))
        lost, loss, *_ = jax.lax.fori_loop(0, size, one_column, carry)
        high, low = Parts.inside(lost)
        for each in refs.errors:
            for index, found in enumerate((high, low, high)):
                each[pl.ds(index * n + part * size, size), :] = found
        if assembly:
            _wait_for_all_threads()
        return loss

    refs.loss[...] = jax.lax.fori_loop(0, n // size, one_part, jnp.zeros((rows,), jnp.float32))


def _wait_for_all_threads() -> None:
    """Of a program, which then see what each other wrote."""
    from jax.experimental.pallas import triton

    triton.debug_barrier()


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
