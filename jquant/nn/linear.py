"""Linear layers with plain [out, in] weights, in floats and packed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jquant.core.qtensor import QTensor, dequantize


class Linear(nnx.Module):
    """y = x · Wᵀ + b with W[out, in], as checkpoints store it. Products accumulate in float32."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        scale = in_features**-0.5
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (out_features, in_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: DTypeLike | None = None) -> Float[Array, "*batch out"]:
        """The product in `dtype`; by default in that of x."""
        bias = None if self.bias is None else self.bias.get_value()
        return matmul_transposed(x, self.weight.get_value(), bias, dtype=dtype)


class Quantized(nnx.Variable[QTensor]):
    """A packed weight as an NNX variable: not a Param, because nothing trains it."""


class QuantizedLinear(nnx.Module):
    """y = x · dequantize(Q)ᵀ + b; the weight stays packed and is decoded where it is used, in the dtype of x."""

    def __init__(self, weight: QTensor, bias: Array | None = None) -> None:
        self.weight = Quantized(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: DTypeLike | None = None) -> Float[Array, "*batch out"]:
        """The product in `dtype`; by default in that of x."""
        bias = None if self.bias is None else self.bias.get_value()
        return matmul_transposed(x, dequantize(self.weight.get_value(), x.dtype), bias, dtype=dtype)


def matmul_transposed(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """x · Wᵀ + b, accumulated in float32, then rounded to `dtype`, by default that of x."""
    product = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        product = product + bias.astype(jnp.float32)
    return product.astype(x.dtype if dtype is None else dtype)
