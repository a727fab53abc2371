"""The search of ranges in one kernel: a group stays on chip while all shrunken ranges are tried on it.

    p* = argmin_p Σ h·|x − dequantize(quantize(x; p · range))|^e        as core/range_search.py, which is its reference

XLA takes the tries side by side, and sums of all groups and tries go through memory at every element. What a try loses
is computed from approximate quotients: at a tie both neighbours lose the same, so only the last bits of sums differ,
and another range is chosen only where two are equally good.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jquant.core.formats import Element, Float, Int
from jquant.core.qtensor import Parameters, parameters_of_range, tile_range
from jquant.core.range_search import RangeSearch, count_of_tries, factor_of_step, shrunk
from jquant.core.scales import SMALLEST_SCALE, FloatScale
from jquant.core.scheme import Scheme
from jquant.kernels.columns import load, load_column
from jquant.kernels.options import assembles, lanes, triton_options
from jquant.kernels.rounding import nearest_code, to_whole

_ROWS, _WARPS = 32, 2


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
    x, high = load(columns, assembly=assembly), next(given)[...]
    low = next(given)[...] if has_low else None
    weight = load_column(next(given), columns.shape[1], assembly=assembly) if weighted else None
    best = next(given)

    def one(step: Any, found: tuple[Array, Array]) -> tuple[Array, Array]:
        factor = 1 - step.astype(jnp.float32) * jnp.float32(1 / config.grid)
        scale, missed = _missed(x, high * factor, None if low is None else low * factor, element, assembly)
        if config.exponent == 2:
            lost, unit = missed * missed, scale * scale
        else:
            lost, unit = (jnp.exp(config.exponent * jnp.log(jnp.maximum(each, 1e-30))) for each in (missed, scale))
        error = unit * jnp.sum(lost if weight is None else lost * weight, axis=0, keepdims=True)
        least, chosen = found
        return jnp.minimum(error, least), jnp.where(error < least, step, chosen)

    start = (jnp.full(high.shape, jnp.inf, jnp.float32), jnp.zeros(high.shape, jnp.int32))
    best[...] = jax.lax.fori_loop(0, count_of_tries(config), one, start)[1]


def _missed(x: Array, high: Array, low: Array | None, element: Element, assembly: bool) -> tuple[Array, Array]:
    """The scale of a range a row [1, rows], and by how many of it values x [group, rows] are missed."""
    if low is not None:
        assert isinstance(element, Int), "others have no zero point"
        scale = jnp.maximum((high - low) * jnp.float32(1 / element.highest_code), SMALLEST_SCALE)
        inverse = 1 / scale
        zero = jnp.clip(to_whole(-low * inverse), 0, element.highest_code)
        lowest, highest = -zero, element.highest_code - zero
    else:
        scale = jnp.maximum(high * jnp.float32(1 / element.reach), SMALLEST_SCALE)  # pyright: ignore[reportAttributeAccessIssue]
        inverse = 1 / scale
        if isinstance(element, Int):
            lowest, highest = element.lowest_code - element.offset, element.highest_code - element.offset
    ratio = x * inverse
    if isinstance(element, Int):
        near = jnp.clip(ratio, lowest, highest)  # pyright: ignore[reportPossiblyUnboundVariable]
        return scale, jnp.abs(ratio - to_whole(near, assembly=assembly))
    return scale, jnp.abs(ratio - nearest_code(ratio, element)[1])
