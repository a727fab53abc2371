"""Packed layers whose input is quantized in floats: pairs of schemes that cannot be multiplied as codes, and Flax's.

    y = dequantize(quantize(x)) · dequantize(Q)ᵀ + b

They are what quantization-aware training converts to: the same values as its fake-quantized layers, bit for bit.
Pairs that can be multiplied as codes have nn/w8a8.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scales import NestedScale
from jquant.core.scheme import Channel, Group, Scheme, Tensor, Token
from jquant.nn.kernel_matrix import from_matrix, weight_name
from jquant.nn.linear import ExpertLinear, Linear, Quantized, grouped_matmul_transposed, matmul_transposed
from jquant.nn.w8a8 import InputScale, check_static, multipliable, w8a8_layer


class InputRounding(nnx.Module):
    """x̂ = dequantize(quantize(x)), with scales of each row's own, or the static one given."""

    def __init__(
        self, scheme: Scheme, input_scale: ArrayLike | None = None, input_zero_point: ArrayLike | None = None
    ) -> None:
        """Raises InputError where the scheme is none of inputs, or a scale is missing or one too many."""
        check_input_scheme(scheme)
        check_static("rounding of inputs", scheme, input_scale, input_zero_point)
        self.activation = scheme
        self.input_scale = _variable(input_scale)
        self.input_zero_point = _variable(input_zero_point)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """In the dtype of x."""
        rows = matrix_of_inputs(x, self.activation)
        if self.input_scale is None:
            return dequantize(quantize(rows, self.activation)).reshape(x.shape)
        zero = None if self.input_zero_point is None else self.input_zero_point.get_value().reshape(1, 1)
        scale = self.input_scale.get_value().reshape(1, 1)
        return dequantize(quantize(rows, self.activation, scale=scale, zero_point=zero)).reshape(x.shape)


class RoundedInputLinear(nnx.Module):
    """`Linear` with a packed weight and a rounded input."""

    def __init__(self, weight: QTensor, bias: Array | None, inputs: InputRounding) -> None:
        self.weight = Quantized(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.inputs = inputs

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: DTypeLike | None = None) -> Float[Array, "*batch out"]:
        """The product in `dtype`; by default in that of x."""
        bias = None if self.bias is None else self.bias.get_value()
        weight = dequantize(self.weight.get_value(), x.dtype)
        return matmul_transposed(self.inputs(x), weight, bias, dtype=dtype)


class RoundedInputExpertLinear(nnx.Module):
    """`ExpertLinear` with packed weights and a rounded input."""

    def __init__(self, weight: QTensor, inputs: InputRounding) -> None:
        self.weight = Quantized(weight)
        self.inputs = inputs

    def __call__(self, x: Float[Array, "rows in"], counts: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """As `ExpertLinear`."""
        return grouped_matmul_transposed(self.inputs(x), dequantize(self.weight.get_value(), x.dtype), counts)


class PackedLayer(nnx.Module):
    """A Flax layer (Linear, LinearGeneral, Einsum, Embed, Conv) whose weight is packed, and decoded for each call."""

    def __init__(self, layer: nnx.Module, weight: QTensor, inputs: InputRounding | None = None) -> None:
        name = weight_name(layer)
        kernel = getattr(layer, name).get_value()
        self.kernel_shape = tuple(kernel.shape)
        self.kernel_dtype = kernel.dtype
        self.layer = with_weight(layer, jnp.zeros((0,), kernel.dtype))
        self.weight = Quantized(weight)
        self.inputs = inputs

    def __call__(self, x: Array, *arguments: Any, **named: Any) -> Array:
        """As the layer's own call."""
        return self._unpacked()(x if self.inputs is None else self.inputs(x), *arguments, **named)

    def attend(self, query: Array, **named: Any) -> Array:
        """As `nnx.Embed.attend`."""
        return self._unpacked().attend(query, **named)

    def _unpacked(self) -> Any:
        matrix = dequantize(self.weight.get_value(), self.kernel_dtype)
        # The barrier: products of few rows would sum in another order if the kernel were read turned, as it lies here.
        kernel = jax.lax.optimization_barrier(from_matrix(self.layer, matrix, self.kernel_shape))
        return with_weight(self.layer, kernel)


def with_weight(layer: nnx.Module, weight: Array) -> Any:
    """A copy of a Flax layer that holds this weight in place of its own."""
    copy = nnx.clone(layer)
    setattr(copy, weight_name(layer), nnx.Param(weight))
    return copy


def input_quantized_layer(
    layer: Linear | ExpertLinear,
    weight: QTensor,
    *,
    activation: Scheme,
    input_scale: ArrayLike | None = None,
    input_zero_point: ArrayLike | None = None,
) -> nnx.Module:
    """The layer that takes this one's place: on codes where the schemes can be multiplied so, otherwise in floats.

    Raises:
        InputError: the input's scheme is none of inputs, or a scale is missing or one too many.
    """
    if multipliable(weight.scheme, activation, weight.matrix_shape[1]):
        return w8a8_layer(
            layer, weight, activation=activation, input_scale=input_scale, input_zero_point=input_zero_point
        )
    inputs = InputRounding(activation, input_scale, input_zero_point)
    if isinstance(layer, ExpertLinear):
        return RoundedInputExpertLinear(weight, inputs)
    return RoundedInputLinear(weight, None if layer.bias is None else layer.bias.get_value(), inputs)


def check_input_scheme(scheme: Scheme) -> None:
    """Raises InputError where inputs cannot have it: what one token gives would depend on the others."""
    if scheme.block is not None or not isinstance(scheme.granularity, Tensor | Token | Group | Channel):
        raise InputError(
            f"activations in {scheme}: their scales are per token or group, as int8:token and mxfp8, or static, "
            "as int8:tensor"
        )
    if isinstance(scheme.granularity, Tensor) and isinstance(scheme.scale, NestedScale):
        raise InputError(f"activations in {scheme}: one scale needs no second level; use fp32 scales")


def matrix_of_inputs(x: Float[Array, "*batch in"], scheme: Scheme) -> Float[Array, "..."]:
    """Inputs as the matrix that their scheme is of: [rows, in], or [rows, 1, in] where each row has an outer scale."""
    return x.reshape(-1, 1, x.shape[-1]) if isinstance(scheme.scale, NestedScale) else x.reshape(-1, x.shape[-1])


def _variable(value: ArrayLike | None) -> InputScale | None:
    return None if value is None else InputScale(jnp.asarray(value, jnp.float32).reshape(()))
