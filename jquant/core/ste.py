"""Fake quantization: quantize and dequantize at once, in floats, with a gradient (SPEC 8).

Scales here follow the range of the values and are constants to the gradient. Those that are trained themselves are in
core/learned_scale.py; PACT's bound of activations in core/pact.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    _integer,
    choose_parameters,
    from_tiles,
    given_parameters,
    spread,
    to_tiles,
)
from jquant.core.scales import DoubleQuantizedScale, FloatScale
from jquant.core.scheme import Scheme
from jquant.core.stochastic import round_stochastically

GradientRule = Callable[[Array, Array], Array]


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
) -> Float[Array, "*batch out in"]:
    """dequantize(quantize(x, scheme)), bit for bit, with a straight-through gradient in place of zero.

    Args:
        x: any float dtype, [..., out, in]; the result has its dtype.
        scheme: static under jit.
        gradient: `clipped_ste`, `ste`, or any function of (cotangent, in_range) of its own.
        key: rounds stochastically instead of to nearest; not for ggml's block types.
        scale: as `quantize` takes it; by default scales follow the range of x. Constants to the gradient either way.
        zero_point: as `quantize` takes it.

    Raises:
        InputError: x is no float matrix, the scheme does not fit it, or it is a block type of ggml and a key or scales
            are given.
    """
    _check_input(x, scheme)
    if scheme.block is not None and not (key is None and scale is None and zero_point is None):
        raise InputError(f"{scheme} searches its codes and scales itself: give no scales, and round to nearest")
    return _fake_quantize(scheme, gradient, x, key, scale, zero_point)


def clips(scheme: Scheme) -> bool:
    """Whether scales from the range can leave a value outside the codes; then `in_range` has to be known."""
    if scheme.block is not None:
        return False  # scales follow from the values: nothing to speak of is clipped
    exact = isinstance(scheme.scale, DoubleQuantizedScale) or scheme.scale == FloatScale()
    full = isinstance(scheme.element, Int) and not scheme.element.symmetric
    return full or not exact or not scheme.element.symmetric


def round_tiles(
    tiles: Array, scheme: Scheme, parameters: Parameters, key: PRNGKeyArray | None
) -> tuple[Array, Array, Array]:
    """Tiles over their scale y, the levels they go to, and whether these were reached without clipping."""
    y = exact_ratio(tiles, spread(parameters.scale))
    zero = None if parameters.zero_point is None else spread(parameters.zero_point)
    if key is not None:
        levels = round_stochastically(y, scheme.element, key, zero_point=zero)
    elif zero is None:
        levels = scheme.element.round(y)
    else:
        levels = _integer(scheme.element).round(y, zero)
    in_range = scheme.element.in_range(y) if zero is None else _integer(scheme.element).in_range(y, zero)
    return y, levels, in_range


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fake_quantize(
    scheme: Scheme, gradient: GradientRule, x: Array, key: Array | None, scale: Array | None, zero_point: Array | None
) -> Array:
    return _forward(scheme, gradient, x, key, scale, zero_point)[0]


def _forward(
    scheme: Scheme, gradient: GradientRule, x: Array, key: Array | None, scale: Array | None, zero_point: Array | None
) -> tuple[Array, Array | None]:
    if scheme.block is not None:
        value = decode_rows(encode_rows(x.astype(jnp.float32), scheme.block), scheme.block, x.shape[-1])
        return value.astype(x.dtype), None
    tiles = to_tiles(x.astype(jnp.float32), scheme)
    ranged = scale is None
    parameters = choose_parameters(tiles, scheme) if ranged else given_parameters(x, scheme, scale, zero_point)
    _, levels, in_range = round_tiles(tiles, scheme, parameters, key)
    value = levels * spread(scheme.scale.load(parameters.stored))
    shape = (x.shape[-2], x.shape[-1])
    # What is never clipped needs no mask: then nothing is kept for the way back.
    masked = gradient is not ste and (clips(scheme) or not ranged)
    return from_tiles(value, shape).astype(x.dtype), from_tiles(in_range, shape) if masked else None


def _backward(
    scheme: Scheme, gradient: GradientRule, in_range: Array | None, cotangent: Array
) -> tuple[Array, None, None, None]:
    if in_range is None:
        in_range = jnp.ones(cotangent.shape, bool)
    return gradient(cotangent, in_range), None, None, None


_fake_quantize.defvjp(_forward, _backward)
