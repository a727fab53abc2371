"""Products accumulated in float32, and how they are differentiated where the operands are narrower."""

from __future__ import annotations

from functools import partial
from typing import Any

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


def dot_general(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "in out"],
    dimension_numbers: jax.lax.DotDimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> Float[Array, "*batch out"]:
    """`jax.lax.dot_general` as `nnx.Linear` calls it, with a gradient of the weight that a CPU computes faster.

    That is xᵀ·g, in place of JAX's (gᵀ·x)ᵀ. There XLA fuses the turning of g with what made it, which then reads each
    of its operands column by column: at 1024 × 2048 behind a gated SiLU 35 ms, longer than the product itself.
    """
    if out_sharding is None and x.dtype == weight.dtype == jnp.float32:
        return _inputs_first(precision, preferred_element_type, x, weight)
    return jax.lax.dot_general(
        x,
        weight,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _inputs_first(precision: Any, dtype: Any, x: Array, weight: Array) -> Array:
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, weight, numbers, precision=precision, preferred_element_type=dtype)


def _inputs_first_forward(precision: Any, dtype: Any, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _inputs_first(precision, dtype, x, weight), (x, weight)


def _inputs_first_backward(precision: Any, dtype: Any, kept: tuple[Array, Array], cotangent: Array) -> Any:
    x, weight = kept
    product = {"precision": precision, "preferred_element_type": jnp.float32}
    of_x = jnp.einsum("...o,io->...i", cotangent, weight, **product)
    rows, g = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    return of_x, jnp.einsum("ri,ro->io", rows, g, **product)


_inputs_first.defvjp(_inputs_first_forward, _inputs_first_backward)


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
