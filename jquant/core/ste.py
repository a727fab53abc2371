"""Fake quantization: quantize and dequantize at once, in floats, with a gradient (SPEC 8).

Scales here follow the range of the values and are constants to the gradient. Those that are trained themselves are in
core/learned_scale.py; PACT's bound of activations in core/pact.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray

from jquant.core.division import exact_ratio, whole_ratio
from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.ggml_rows import decode_rows, encode_rows
from jquant.core.qtensor import Parameters, _check_input, choose_parameters, given_parameters, ratio_to_round
from jquant.core.scales import DoubleQuantizedScale, FloatScale
from jquant.core.scheme import Scheme
from jquant.core.stochastic import round_stochastically
from jquant.core.tiles import Axis, from_tiles, spread, to_tiles

GradientRule = Callable[[Array, Array], Array]
Keep = Literal["mask", "input"]


def clipped_ste(gradient: Float[Array, "..."], in_range: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Straight through where the code was not clipped, 0 where it was. Reference: Bengio et al., 1308.3432; SPEC 8."""
    return jnp.where(in_range, gradient, jnp.zeros_like(gradient))


def ste(gradient: Float[Array, "..."], in_range: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Straight through everywhere. Reference: Bengio et al., 1308.3432."""
    return gradient


def fake_quantize(
    x: Float[Array, "*batch _ _"],
    scheme: Scheme,
    *,
    gradient: GradientRule = clipped_ste,
    key: PRNGKeyArray | None = None,
    scale: Float[Array, "*batch row_tiles column_tiles"] | None = None,
    zero_point: Array | None = None,
    outer: Float[Array, "*batch 1 1"] | None = None,
    keep: Keep = "mask",
    axis: Axis = -1,
) -> Float[Array, "*batch _ _"]:
    """dequantize(quantize(x, scheme)), bit for bit, with a straight-through gradient in place of zero.

    Args:
        x: any float dtype, [..., out, in], or [..., in, out] where the axis is −2; the result has its dtype.
        scheme: static under jit.
        gradient: `clipped_ste`, `ste`, or any function of (cotangent, in_range) of its own.
        key: rounds stochastically instead of to nearest; not for ggml's block types.
        scale: as `quantize` takes it; by default scales follow the range of x. Constants to the gradient either way.
        zero_point: as `quantize` takes it.
        outer: the second level of a nested scale, where x shares it with others; a constant too.
        keep: what the gradient's `in_range` is known from: a `mask` of a byte an element, or the `input` and its
            scales. The latter takes no memory where the input lives on anyway, as a weight does.
        axis: of the inputs.

    Raises:
        InputError: x is no float matrix, the scheme does not fit it, or it is a block type of ggml and a key or scales
            are given.
    """
    _check_input(x, scheme)
    if scheme.block is not None and not (key is None and scale is None and zero_point is None):
        raise InputError(f"{scheme} searches its codes and scales itself: give no scales, and round to nearest")
    # Where the order of scales counts, the matrix is turned for it.
    turned = axis == -2 and (
        scheme.block is not None or scale is not None or isinstance(scheme.scale, DoubleQuantizedScale)
    )
    plan = _Plan(scheme, gradient, keep, -1 if turned else axis)
    value: Array = _fake_quantize(plan, x.swapaxes(-1, -2) if turned else x, key, scale, zero_point, outer)
    return value.swapaxes(-1, -2) if turned else value


def clips(scheme: Scheme) -> bool:
    """Whether scales from the range can leave a value outside the codes; then `in_range` has to be known."""
    if scheme.block is not None:
        return False  # scales follow from the values: nothing to speak of is clipped
    exact = isinstance(scheme.scale, DoubleQuantizedScale) or scheme.scale == FloatScale()
    full = isinstance(scheme.element, Int) and not scheme.element.symmetric
    return full or not exact or not scheme.element.symmetric


def round_tiles(tiles: Array, scheme: Scheme, parameters: Parameters, key: PRNGKeyArray | None) -> tuple[Array, Array]:
    """The levels that tiles go to, and whether these were reached without clipping."""
    zero = None if parameters.zero_point is None else spread(parameters.zero_point)
    element = scheme.element
    if isinstance(element, Int) and key is None:
        whole = ratio_to_round(tiles, scheme, parameters)
        return element.clip(whole, zero), element.holds(whole, zero)
    y = exact_ratio(tiles, spread(parameters.scale))
    in_range = element.in_range(y, zero) if isinstance(element, Int) else element.in_range(y)
    levels = element.round(y) if key is None else round_stochastically(y, element, key, zero_point=zero)
    return levels, in_range


class Bounds(NamedTuple):
    """The smallest and the largest value of each tile that is not clipped."""

    low: Array
    high: Array


def bounds(element: Int, scale: Float32[Array, "..."], zero_point: Float32[Array, "..."] | None = None) -> Bounds:
    """Between which values nothing is clipped: `element.holds(whole_ratio(x, scale))`, for a division a tile.

    round(x / s) rises with x, so what it takes to codes is an interval. It ends within 1.5 units in the last place of
    (largest code − z + ½)·s, and likewise below: of the floats around, the last that is in range is looked for.
    """
    zero = element.offset if zero_point is None else zero_point
    lowest = element.lowest_code if zero_point is None else 0

    def near(magnitude: Array) -> Array:
        steps = jnp.arange(-2, 3).reshape(-1, *[1] * magnitude.ndim)
        bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32) + steps
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    low, high = -near((zero - lowest + 0.5) * scale), near((element.highest_code - zero + 0.5) * scale)
    values = jnp.stack([low, high])
    held = jnp.where(element.holds(whole_ratio(values, scale), zero_point), values, 0.0)
    return Bounds(jnp.min(held[0], axis=0), jnp.max(held[1], axis=0))


class _Plan(NamedTuple):
    """What is static."""

    scheme: Scheme
    gradient: GradientRule
    keep: Keep
    axis: Axis


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quantize(
    plan: _Plan, x: Array, key: Array | None, scale: Array | None, zero_point: Array | None, outer: Array | None
) -> Array:
    return _forward(plan, x, key, scale, zero_point, outer)[0]


_Kept = Array | tuple[Array, Parameters] | None


def _forward(
    plan: _Plan, x: Array, key: Array | None, scale: Array | None, zero_point: Array | None, outer: Array | None
) -> tuple[Array, _Kept]:
    scheme, gradient, keep, axis = plan
    if scheme.block is not None:
        value = decode_rows(encode_rows(x.astype(jnp.float32), scheme.block), scheme.block, x.shape[-1])
        return value.astype(x.dtype), None
    tiles = to_tiles(x.astype(jnp.float32), scheme, axis)
    ranged = scale is None
    if ranged:
        parameters = choose_parameters(tiles, scheme, outer=outer)
    else:
        parameters = given_parameters(x, scheme, scale, zero_point, outer=outer)
    levels, in_range = round_tiles(tiles, scheme, parameters, key)
    shape = (x.shape[-2], x.shape[-1])
    value = from_tiles(levels * spread(scheme.scale.load(parameters.stored)), shape).astype(x.dtype)
    if gradient is ste or not (clips(scheme) or not ranged):
        return value, None  # nothing is clipped, or it does not matter
    return value, from_tiles(in_range, shape) if keep == "mask" else (x, parameters)


def _backward(plan: _Plan, kept: _Kept, cotangent: Array) -> tuple[Array, None, None, None, None]:
    if kept is None:
        in_range = jnp.ones(cotangent.shape, bool)
    elif isinstance(kept, tuple):
        in_range = _in_range(plan, *kept)
    else:
        in_range = kept
    return plan.gradient(cotangent, in_range), None, None, None, None


def _in_range(plan: _Plan, x: Array, parameters: Parameters) -> Array:
    scheme = plan.scheme
    tiles = to_tiles(x.astype(jnp.float32), scheme, plan.axis)
    if isinstance(scheme.element, Int):
        low, high = bounds(scheme.element, parameters.scale, parameters.zero_point)
        found = (tiles >= spread(low)) & (tiles <= spread(high))
    else:
        found = round_tiles(tiles, scheme, parameters, None)[1]
    return from_tiles(found, (x.shape[-2], x.shape[-1]))


_fake_quantize.defvjp(_forward, _backward)
