"""Products accumulated in float32, and how they are differentiated where the operands are narrower."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

# Products of float32 are float32's: left to itself XLA rounds their factors to TF32 on GPU and to bfloat16 on TPU. On
# bfloat16 it changes nothing.
PRECISION = jax.lax.Precision.HIGHEST


def einsum(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float32[Array, "..."]:
    """einsum of two arrays of one dtype, accumulated and given in float32.

    Under differentiation a cotangent is first rounded to the operands' dtype. Otherwise the products with it would be
    of float32 by bfloat16, which has no fast path: on an H100 (jax 0.11.2) a training step took six times as long.
    """
    return _einsum(equation, a, b) if a.dtype == jnp.float32 else _narrow_einsum(equation, a, b)


def ragged_product(
    x: Float[Array, "rows in"], weights: Float[Array, "experts out in"], counts: Int[Array, " experts"]
) -> Float32[Array, "rows out"]:
    """x_r · W_eᵀ for rows sorted by expert, of one dtype; accumulated and differentiated as `einsum`."""
    counts = counts.astype(jnp.int32)
    return _ragged(x, weights, counts) if x.dtype == jnp.float32 else _narrow_ragged(x, weights, counts)


def _einsum(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, precision=PRECISION, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_einsum(equation: str, a: Array, b: Array) -> Array:
    return _einsum(equation, a, b)


def _einsum_forward(equation: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, a, b), (a, b)


def _einsum_backward(equation: str, kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, ...]:
    _, pull = jax.vjp(partial(jnp.einsum, equation, precision=PRECISION), *kept)
    return pull(cotangent.astype(kept[0].dtype))


_narrow_einsum.defvjp(_einsum_forward, _einsum_backward)


def _ragged(x: Array, weights: Array, counts: Array, dtype: DTypeLike = jnp.float32) -> Array:
    turned = weights.swapaxes(-1, -2)
    return jax.lax.ragged_dot(x, turned, counts, precision=PRECISION, preferred_element_type=dtype)


@jax.custom_vjp
def _narrow_ragged(x: Array, weights: Array, counts: Array) -> Array:
    return _ragged(x, weights, counts)


def _ragged_forward(x: Array, weights: Array, counts: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _ragged(x, weights, counts), (x, weights, counts)


def _ragged_backward(kept: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    x, weights, counts = kept
    _, pull = jax.vjp(lambda x, weights: _ragged(x, weights, counts, x.dtype), x, weights)
    return *pull(cotangent.astype(x.dtype)), None


_narrow_ragged.defvjp(_ragged_forward, _ragged_backward)
