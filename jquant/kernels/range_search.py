"""The search of ranges in one kernel: a group stays on chip while all shrunken ranges are tried on it.

    p* = argmin_p Σ h·|x − dequantize(quantize(x; p · range))|^e        as core/range_search.py, which is its reference

XLA takes the tries side by side, and sums of all groups and tries go through memory at every element. What a try loses
is computed from approximate quotients: at a tie both neighbours lose the same, so only the last bits of sums differ,
and another range is chosen only where two are equally good.

What lies beyond the levels of a range is missed by that much, and by more in every narrower one: once that alone loses
more than the best try did, a group is done, and a program when all its groups are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jquant.core.formats import Codebook, Element, Float, Int
from jquant.core.qtensor import Parameters, parameters_of_range, tile_range
from jquant.core.range_search import RangeSearch, count_of_tries, factor_of_step, power_of, shrunk
from jquant.core.scales import SMALLEST_SCALE, FloatScale
from jquant.core.scheme import Scheme
from jquant.kernels.columns import load, load_column
from jquant.kernels.options import assembles, lanes, triton_options
from jquant.kernels.rounding import beyond_nearest_whole, multiply_add, nearest_code, to_whole

_ROWS, _WARPS = 8, 1  # few rows, as a program is done when the last of them is; four threads share one
_PIECE = 32  # columns whose losses are summed side by side, or the group's, which are less
_LOOKED_UP_AFTER = 8  # tries after which a program may be done


def fits(scheme: Scheme, group: int, tile_rows: int) -> bool:
    """Whether the kernel searches for such groups: of one row, with float32 scales."""
    element = scheme.element
    known = isinstance(element, Int | Float) or (element.bits <= 4 and hasattr(element, "midpoints"))
    wide = 16 <= group <= 256 and group & (group - 1) == 0
    return known and wide and tile_rows == 1 and scheme.scale == FloatScale()


def search_parameters(
    columns: Float32[Array, "in out"],
    group: int,
    scheme: Scheme,
    *,
    importance: Float32[Array, " in"] | None = None,
    config: RangeSearch | None = None,
    interpret: bool = False,
) -> Parameters:
    """`core.range_search.search_parameters` of whole groups of columns; parameters are [out, 1 or groups].

    Args:
        columns: whole groups, one after another.
        group: columns of each; `fits(scheme, group, 1)` must hold.
        scheme: integers, floats, or a codebook of up to 16 levels.
        importance: weights ≥ 0 of the errors; by default all alike.
        config: by default IST-DASLab's grid.
        interpret: run the kernel's operations one by one, on any platform.
    """
    config = RangeSearch() if config is None else config
    inputs, out = columns.shape
    span = tile_range(columns.T.reshape(out, 1, inputs // group, group), scheme)
    steps = best_steps(
        columns, importance, span.high.T, None if span.low is None else span.low.T, scheme.element, config, interpret
    )
    return parameters_of_range(shrunk(span, factor_of_step(steps.T, config)), scheme)


def best_steps(
    columns: Float32[Array, "in out"],
    importance: Float32[Array, " in"] | None,
    high: Float32[Array, "groups out"],
    low: Float32[Array, "groups out"] | None,
    element: Element,
    config: RangeSearch,
    interpret: bool,
) -> Int32[Array, "groups out"]:
    """Which try loses least, for each group; of equal ones the first, which is the widest."""
    from jax.experimental import pallas as pl

    groups, out = high.shape
    group = len(columns) // groups
    rows = lanes(_ROWS)
    padded = -(-out // rows) * rows
    ranges = [high] if low is None else [high, low]
    operands = [jnp.pad(each, ((0, 0), (0, padded - out))) for each in (columns, *ranges)]
    operands[1:] = [each[:, None] for each in operands[1:]]  # a TPU wants whole lines
    line = pl.BlockSpec((None, 1, rows), lambda i, j: (i, 0, j))
    specs = [pl.BlockSpec((group, rows), lambda i, j: (i, j)), *[line] * len(ranges)]
    if importance is not None:
        operands.append(importance[:, None])
        specs.append(pl.BlockSpec((group, 1), lambda i, j: (i, 0)))
    found = pl.pallas_call(
        partial(_kernel, element, config, low is not None, importance is not None, assembles(interpret)),
        grid=(groups, padded // rows),
        in_specs=specs,
        out_specs=line,
        out_shape=jax.ShapeDtypeStruct((groups, 1, padded), jnp.int32),
        interpret=interpret,
        name="range_search",
        **triton_options(_WARPS, interpret),
    )(*operands)
    return found[:, 0, :out]


def _kernel(
    element: Element, config: RangeSearch, has_low: bool, weighted: bool, assembly: bool, columns: Any, *refs: Any
) -> None:
    given = iter(refs)
    piece = min(_PIECE, columns.shape[0])
    x, high = load(columns, piece, assembly=assembly), next(given)[...]
    low = next(given)[...] if has_low else None
    weight = load_column(next(given), high.shape[1], piece, assembly=assembly) if weighted else [None] * len(x)
    best = next(given)

    tries = count_of_tries(config)
    together = math.gcd(tries, _LOOKED_UP_AFTER)

    def lost(missed: Callable[[Array], Array], scale: Array) -> Array:
        """Of each row what it loses where its values are missed by so many times the scale."""
        power = partial(power_of, exponent=config.exponent)
        total = jnp.zeros(x[0].shape, jnp.float32)
        for part, by in zip(x, weight, strict=True):
            each = missed(part)
            if config.exponent != 2:
                total = total + power(jnp.abs(each)) * (1 if by is None else by)
            else:
                by = each if by is None else jnp.broadcast_to(by, each.shape) * each
                total = multiply_add(each, by, total, assembly=assembly)
        return power(scale) * jnp.sum(total, axis=0, keepdims=True)

    def levels_at(step: Any) -> _Levels:
        factor = 1 - step.astype(jnp.float32) * jnp.float32(1 / config.grid)
        return _levels(high * factor, None if low is None else low * factor, element)

    def one(step: Any, found: tuple[Array, Array]) -> tuple[Array, Array]:
        levels = levels_at(step)
        error = lost(_missed(levels, element, assembly), levels.scale)
        least, chosen = found
        return jnp.minimum(error, least), jnp.where(error < least, step, chosen)

    def some(begin: Any, found: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        least, chosen = jax.lax.fori_loop(0, together, lambda index, found: one(begin + index, found), found)
        levels = levels_at(begin + together - 1)
        inverse = 1 / levels.scale

        def beyond(x: Array) -> Array:
            ratio = x * inverse
            return ratio - jnp.clip(ratio, levels.lowest - levels.slack, levels.highest + levels.slack)

        hopeless = (lost(beyond, levels.scale) > 1.001 * least) | (least == 0)
        return jnp.sum(jnp.where(hopeless, 0, 1)), least, chosen

    def some_if_any_is_open(index: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Not a while loop, on which XLA's Triton crashes (jax 0.11).
        count, *found = state
        return jax.lax.cond(count > 0, lambda: some(index * together, (found[0], found[1])), lambda: state)

    nothing = (jnp.full(high.shape, jnp.inf, jnp.float32), jnp.zeros(high.shape, jnp.int32))
    best[...] = jax.lax.fori_loop(0, tries // together, some_if_any_is_open, (jnp.int32(1), *nothing))[2]


class _Levels(NamedTuple):
    """Of a range a row [1, rows]: the scale, and between which multiples of it the levels lie."""

    scale: Array
    lowest: Array | float
    highest: Array | float
    slack: int  # by how much these may be moved in a narrower range


def _levels(high: Array, low: Array | None, element: Element) -> _Levels:
    if low is not None:
        assert isinstance(element, Int), "others have no zero point"
        scale = jnp.maximum((high - low) * jnp.float32(1 / element.highest_code), SMALLEST_SCALE)
        zero = jnp.clip(to_whole(-low * (1 / scale)), 0, element.highest_code)
        return _Levels(scale, -zero, element.highest_code - zero, 1)
    scale = jnp.maximum(high * jnp.float32(1 / element.reach), SMALLEST_SCALE)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(element, Int):
        return _Levels(scale, element.lowest_code - element.offset, element.highest_code - element.offset, 0)
    values = element.levels()  # pyright: ignore[reportAttributeAccessIssue]
    return _Levels(scale, float(values.min()), float(values.max()), 0)


def _missed(levels: _Levels, element: Element, assembly: bool) -> Callable[[Array], Array]:
    """By how many times the scale values [columns, rows] are missed, with a sign or without."""
    inverse = 1 / levels.scale

    def missed(x: Array) -> Array:
        if isinstance(element, Int) and assembly:
            return beyond_nearest_whole(x, inverse, levels.lowest, levels.highest)
        ratio = x * inverse
        if isinstance(element, Int):
            return ratio - to_whole(jnp.clip(ratio, levels.lowest, levels.highest))
        if isinstance(element, Codebook):  # twice as fast as a comparison and a choice for each level
            return functools.reduce(jnp.minimum, (jnp.abs(ratio - level) for level in map(float, element.levels())))
        return ratio - nearest_code(ratio, element)[1]

    return missed
