"""PACT: activations clipped to a bound that is trained, then quantized uniformly up to it.

    y = clip(x, 0, α),   x̂ = round(y · (2^b − 1)/α) · α/(2^b − 1)

    ∂x̂/∂x = 1 for 0 < x < α, else 0;   ∂x̂/∂α = 1 for x ≥ α, else 0

An asymmetric scheme takes the paper's range [0, α], for what comes out of a ReLU. A symmetric one takes [−α, α], with
∂x̂/∂α = −1 for x ≤ −α too: an extension, for activations of both signs.

Reference: PACT (Choi et al., 1805.06085), 3 and equation 2.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jquant.core.division import exact_divide
from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.qtensor import _check_input, dequantize, quantize
from jquant.core.scheme import Scheme, Tensor


def pact(x: Float[Array, "*batch rows in"], bound: Float[Array, ""], scheme: Scheme) -> Float[Array, "*batch rows in"]:
    """dequantize(quantize(x, scheme, scale and zero point of the bound)), bit for bit, with PACT's gradients.

    Args:
        x: any float dtype; the result has its dtype.
        bound: α > 0.
        scheme: an integer one, one scale for all: int4:tensor:asym, int8:tensor.

    Raises:
        InputError: another scheme.
    """
    _check_input(x, scheme)
    if not isinstance(scheme.element, Int) or not isinstance(scheme.granularity, Tensor):
        raise InputError(f"PACT to {scheme}: it has one bound for all values; use intN:tensor or intN:tensor:asym")
    return _pact(scheme, x, bound)


def pact_parameters(bound: Float[Array, ""], scheme: Scheme) -> tuple[Float32[Array, ""], Float32[Array, ""] | None]:
    """Scale and zero point (None where symmetric) that spread the codes over [0, α], or [−α, α]."""
    assert isinstance(scheme.element, Int)
    alpha = bound.astype(jnp.float32)
    if scheme.zero_point == "integer":
        return exact_divide(alpha, scheme.element.highest_code), jnp.zeros((), jnp.float32)
    return exact_divide(alpha, scheme.element.reach), None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pact(scheme: Scheme, x: Array, bound: Array) -> Array:
    scale, zero = pact_parameters(bound, scheme)
    tile = (*x.shape[:-2], 1, 1)
    zero = None if zero is None else jnp.broadcast_to(zero, tile)
    return dequantize(quantize(x, scheme, scale=jnp.broadcast_to(scale, tile), zero_point=zero))


def _forward(scheme: Scheme, x: Array, bound: Array) -> tuple[Array, tuple[Array, Array]]:
    return _pact(scheme, x, bound), (x, bound)


def _backward(scheme: Scheme, kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, bound = kept
    wide, alpha, gradient = x.astype(jnp.float32), bound.astype(jnp.float32), cotangent.astype(jnp.float32)
    above = wide >= alpha
    below = wide <= (0.0 if scheme.zero_point == "integer" else -alpha)
    of_bound = jnp.sum(jnp.where(above, gradient, 0.0))
    if scheme.zero_point != "integer":
        of_bound = of_bound - jnp.sum(jnp.where(below, gradient, 0.0))
    return jnp.where(above | below, 0.0, gradient).astype(x.dtype), of_bound.astype(bound.dtype)


_pact.defvjp(_forward, _backward)
