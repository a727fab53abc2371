"""Linear layers with plain [out, in] weights, and stacks of them for experts, in floats and packed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from jquant.core.qtensor import QTensor, dequantize
from jquant.kernels.dispatch import multiply_packed
from jquant.nn.product import einsum, ragged_product


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

    def packed(self, weight: QTensor) -> QuantizedLinear:
        """The layer that takes this one's place, with the weight given."""
        return QuantizedLinear(weight, None if self.bias is None else self.bias.get_value())


class ExpertLinear(nnx.Module):
    """One matrix an expert, W[experts, out, in]; rows of x come sorted by expert. Quantized each expert for itself."""

    def __init__(
        self, experts: int, in_features: int, out_features: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        shape = (experts, out_features, in_features)
        self.weight = nnx.Param(in_features**-0.5 * jax.random.normal(rngs.params(), shape, dtype))

    def __call__(self, x: Float[Array, "rows in"], counts: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """Row r times the matrix of its expert: the first counts[0] rows are of expert 0, and so on."""
        return grouped_matmul_transposed(x, self.weight.get_value(), counts)

    def packed(self, weight: QTensor) -> QuantizedExpertLinear:
        """The layer that takes this one's place, with the weight given."""
        return QuantizedExpertLinear(weight)


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
        weight, dtype = self.weight.get_value(), x.dtype if dtype is None else dtype
        product = multiply_packed(x, weight, dtype=dtype if bias is None else jnp.float32)
        if product is None:
            return matmul_transposed(x, dequantize(weight, x.dtype), bias, dtype=dtype)
        return _with_bias(product, bias, dtype)


class QuantizedExpertLinear(nnx.Module):
    """`ExpertLinear` with a packed weight [experts, out, in]."""

    def __init__(self, weight: QTensor) -> None:
        self.weight = Quantized(weight)

    def __call__(self, x: Float[Array, "rows in"], counts: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """As `ExpertLinear`."""
        return grouped_matmul_transposed(x, dequantize(self.weight.get_value(), x.dtype), counts)


def grouped_matmul_transposed(
    x: Float[Array, "rows in"], weight: Float[Array, "experts out in"], counts: Int[Array, " experts"]
) -> Float[Array, "rows out"]:
    """x_r · W_eᵀ for rows sorted by expert e, accumulated in float32, in the dtype of x."""
    return ragged_product(x, weight.astype(x.dtype), counts).astype(x.dtype)


def matmul_transposed(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """x · Wᵀ + b, accumulated in float32, then rounded to `dtype`, by default that of x."""
    product = einsum("...i,oi->...o", x, weight.astype(x.dtype))
    return _with_bias(product, bias, x.dtype if dtype is None else dtype)


def _with_bias(product: Float32[Array, "*batch out"], bias: Array | None, dtype: DTypeLike) -> Array:
    return (product if bias is None else product + bias.astype(jnp.float32)).astype(dtype)
