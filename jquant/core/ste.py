"""Fake quantization: quantize and dequantize at once, in floats, with a gradient (SPEC 8).

Scales here follow the range of the values and are constants to the gradient. Those that are trained themselves are in
core/learned_scale.py; PACT's bound of activations in core/pact.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jquant.core.division import exact_ratio
from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.ggml_rows import decode_rows, encode_rows
from jquant.core.qtensor import (
    Parameters,
    _check_input,
    choose_parameters,
    from_tiles,
    given_parameters,
    ratio_to_round,
    spread,
    to_tiles,
)
from jquant.core.scales import DoubleQuantizedScale, FloatScale
from jquant.core.scheme import Scheme
from jquant.core.stochastic import round_stochastically

GradientRule = Callable[[Array, Array], Array]
Keep = Literal["mask", "input"]


def clipped_ste(gradient: Float[Array, "..."], in_range: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Straight through where the code was not clipped, 0 where it was. Reference: Bengio et al., 1308.3432; SPEC 8."""
    return jnp.where(in_range, gradient, jnp.zeros_like(gradient))


def ste(gradient: Float[Array, "..."], in_range: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Straight through everywhere. Reference: Bengio et al., 1308.3432."""
    return gradient


def fake_quantize(
    x: Float[Array, "*batch out in"],
    scheme: Scheme,
    *,
    gradient: GradientRule = clipped_ste,
    key: PRNGKeyArray | None = None,
    scale: Float[Array, "*batch row_tiles column_tiles"] | None = None,
    zero_point: Array | None = None,
    keep: Keep = "mask",
) -> Float[Array, "*batch out in"]:
    """dequantize(quantize(x, scheme)), bit for bit, with a straight-through gradient in place of zero.

    Args:
        x: any float dtype, [..., out, in]; the result has its dtype.
        scheme: static under jit.
        gradient: `clipped_ste`, `ste`, or any function of (cotangent, in_range) of its own.
        key: rounds stochastically instead of to nearest; not for ggml's block types.
        scale: as `quantize` takes it; by default scales follow the range of x. Constants to the gradient either way.
        zero_point: as `quantize` takes it.
        keep: what the gradient's `in_range` is known from: a `mask` of a byte an element, or the `input` and its
            scales. The latter takes no memory where the input lives on anyway, as a weight does.

    Raises:
        InputError: x is no float matrix, the scheme does not fit it, or it is a block type of ggml and a key or scales
            are given.
    """
    _check_input(x, scheme)
    if scheme.block is not None and not (key is None and scale is None and zero_point is None):
        raise InputError(f"{scheme} searches its codes and scales itself: give no scales, and round to nearest")
    return _fake_quantize(scheme, gradient, keep, x, key, scale, zero_point)


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fake_quantize(
    scheme: Scheme,
    gradient: GradientRule,
    keep: Keep,
    x: Array,
    key: Array | None,
    scale: Array | None,
    zero_point: Array | None,
) -> Array:
    return _forward(scheme, gradient, keep, x, key, scale, zero_point)[0]


_Kept = Array | tuple[Array, Parameters] | None


def _forward(
    scheme: Scheme,
    gradient: GradientRule,
    keep: Keep,
    x: Array,
    key: Array | None,
    scale: Array | None,
    zero_point: Array | None,
) -> tuple[Array, _Kept]:
    if scheme.block is not None:
        value = decode_rows(encode_rows(x.astype(jnp.float32), scheme.block), scheme.block, x.shape[-1])
        return value.astype(x.dtype), None
    tiles = to_tiles(x.astype(jnp.float32), scheme)
    ranged = scale is None
    parameters = choose_parameters(tiles, scheme) if ranged else given_parameters(x, scheme, scale, zero_point)
    levels, in_range = round_tiles(tiles, scheme, parameters, key)
    shape = (x.shape[-2], x.shape[-1])
    value = from_tiles(levels * spread(scheme.scale.load(parameters.stored)), shape).astype(x.dtype)
    if gradient is ste or not (clips(scheme) or not ranged):
        return value, None  # nothing is clipped, or it does not matter
    return value, from_tiles(in_range, shape) if keep == "mask" else (x, parameters)


def _backward(
    scheme: Scheme, gradient: GradientRule, keep: Keep, kept: _Kept, cotangent: Array
) -> tuple[Array, None, None, None]:
    if kept is None:
        in_range = jnp.ones(cotangent.shape, bool)
    elif isinstance(kept, tuple):
        x, parameters = kept
        tiles = round_tiles(to_tiles(x.astype(jnp.float32), scheme), scheme, parameters, None)[1]
        in_range = from_tiles(tiles, (x.shape[-2], x.shape[-1]))
    else:
        in_range = kept
    return gradient(cotangent, in_range), None, None, None


_fake_quantize.defvjp(_forward, _backward)
