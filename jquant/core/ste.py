"""Fake quantization: quantize and dequantize at once, in floats, with a gradient (SPEC 8)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jquant.core.division import exact_ratio
from jquant.core.ggml_rows import decode_rows, encode_rows
from jquant.core.qtensor import _check_input, _integer, choose_parameters, from_tiles, spread, to_tiles
from jquant.core.scheme import Scheme

GradientRule = Callable[[Array, Array], Array]


def clipped_ste(gradient: Float[Array, "..."], in_range: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Straight through where the code was not clipped, 0 where it was. Reference: Bengio et al., 1308.3432; SPEC 8."""
    return jnp.where(in_range, gradient, jnp.zeros_like(gradient))


def ste(gradient: Float[Array, "..."], in_range: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Straight through everywhere. Reference: Bengio et al., 1308.3432."""
    return gradient


def fake_quantize(
    x: Float[Array, "*batch out in"], scheme: Scheme, *, gradient: GradientRule = clipped_ste
) -> Float[Array, "*batch out in"]:
    """dequantize(quantize(x, scheme)), bit for bit, with a straight-through gradient in place of zero.

    Args:
        x: any float dtype, [..., out, in]; the result has its dtype.
        scheme: static under jit.
        gradient: `clipped_ste`, `ste`, or any function of (cotangent, in_range) of its own.

    Scales follow the range of x and are constants to the gradient.
    """
    _check_input(x, scheme)
    return _fake_quantize(scheme, gradient, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fake_quantize(scheme: Scheme, gradient: GradientRule, x: Array) -> Array:
    return _forward(scheme, gradient, x)[0]


def _forward(scheme: Scheme, gradient: GradientRule, x: Array) -> tuple[Array, Array]:
    if scheme.block is not None:  # scales follow from the values: nothing to speak of is clipped
        value = decode_rows(encode_rows(x.astype(jnp.float32), scheme.block), scheme.block, x.shape[-1])
        return value.astype(x.dtype), jnp.ones(x.shape, bool)
    tiles = to_tiles(x.astype(jnp.float32), scheme)
    parameters = choose_parameters(tiles, scheme)
    y = exact_ratio(tiles, spread(parameters.scale))
    shape = (x.shape[-2], x.shape[-1])
    if parameters.zero_point is None:
        levels, in_range = scheme.element.round(y), scheme.element.in_range(y)
    else:
        zero, element = spread(parameters.zero_point), _integer(scheme.element)
        levels, in_range = element.round(y, zero), element.in_range(y, zero)
    value = levels * spread(scheme.scale.load(parameters.stored))
    return from_tiles(value, shape).astype(x.dtype), from_tiles(in_range, shape)


def _backward(scheme: Scheme, gradient: GradientRule, in_range: Array, cotangent: Array) -> tuple[Array]:
    return (gradient(cotangent, in_range),)


_fake_quantize.defvjp(_forward, _backward)
