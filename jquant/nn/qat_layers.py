"""Layers for quantization-aware training: they take a float layer's place, with the same call.

    y = x̂ · Ŵᵀ + b        x̂ and Ŵ fake-quantized (nn/fake_quant.py), the output left alone

Ours (`Linear`, `ExpertLinear`, an embedding's table) are rewritten. Flax's are kept and called with the quantized
weight in place of their own, so that all they are told (dtypes, strides, groups, padding, a dot_general) holds.

Where both operands can be multiplied as codes (int8 by int8, fp8 by fp8; nn/w8a8.py) the forward pass does so: then the
trained model gives the bits of the converted one. The backward pass multiplies x̂ and Ŵ.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jquant.core.qtensor import QTensor, quantize
from jquant.core.scheme import Token
from jquant.kernels import dispatch
from jquant.nn.fake_quant import STRAIGHT, FakeQuantModule, InputQuantizer, WeightQuantizer
from jquant.nn.kernel_matrix import from_matrix, inputs_first, to_matrix, weight_name
from jquant.nn.linear import ExpertLinear, Linear, grouped_matmul_transposed, matmul_transposed
from jquant.nn.product import PRECISION, dot_general
from jquant.nn.rounded_input import with_weight
from jquant.nn.w8a8 import grouped_multiply, multipliable, multiply, quantize_input


class QATLinear(FakeQuantModule):
    """`Linear` with a quantized weight, and a quantized input where asked."""

    def __init__(self, layer: Linear, weight: WeightQuantizer, inputs: InputQuantizer | None = None) -> None:
        self.weight = layer.weight
        self.bias = layer.bias
        self.weight_quantizer = weight
        self.input_quantizer = inputs

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: DTypeLike | None = None) -> Float[Array, "*batch out"]:
        """The product in `dtype`; by default in that of x."""
        bias = None if self.bias is None else self.bias.get_value()
        dtype = x.dtype if dtype is None else jnp.dtype(dtype)
        if not multiplies_codes(self):
            inputs = x if self.input_quantizer is None else self.input_quantizer(x)
            weight = self.weight_quantizer(self.weight.get_value(), dtype=x.dtype)
            return matmul_transposed(inputs, weight, bias, dtype=dtype)
        rows = x.reshape(-1, x.shape[-1])
        narrow = dtype == jnp.bfloat16 and bias is None
        product = _differentiated(*((_by_kernels(self, rows) if narrow else None) or _in_parts(self, rows, narrow)))
        if bias is not None:
            product = product + bias.astype(jnp.float32)
        return product.astype(dtype).reshape(*x.shape[:-1], -1)


class QATExpertLinear(FakeQuantModule):
    """`ExpertLinear` with quantized weights, each expert's for itself, and a quantized input where asked."""

    def __init__(self, layer: ExpertLinear, weight: WeightQuantizer, inputs: InputQuantizer | None = None) -> None:
        self.weight = layer.weight
        self.weight_quantizer = weight
        self.input_quantizer = inputs

    def __call__(self, x: Float[Array, "rows in"], counts: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """As `ExpertLinear`."""
        weight = self.weight_quantizer(self.weight.get_value())
        if self.input_quantizer is None:
            return grouped_matmul_transposed(x, weight, counts)
        inputs = self.input_quantizer(x)
        if not multiplies_codes(self):
            return grouped_matmul_transposed(inputs, weight, counts)
        return _grouped_product_of_codes(inputs, weight, counts, *_codes(self, x)).astype(x.dtype)


class QATLayer(FakeQuantModule):
    """A Flax layer (Linear, LinearGeneral, Einsum, Embed, Conv) that is called with a quantized weight."""

    def __init__(self, layer: nnx.Module, weight: WeightQuantizer, inputs: InputQuantizer | None = None) -> None:
        self.layer = layer
        self.weight_quantizer = weight
        self.input_quantizer = inputs

    def __call__(self, x: Array, *arguments: Any, **named: Any) -> Array:
        """As the layer's own call."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return self._with_weight()(x, *arguments, **named)

    def attend(self, query: Array, **named: Any) -> Array:
        """`nnx.Embed.attend` with the quantized table: logits of tied embeddings."""
        return self._with_weight().attend(query, **named)

    def _with_weight(self) -> Any:
        kernel = getattr(self.layer, weight_name(self.layer)).get_value()
        # What the layer would cast its weight to; one that is stored in fewer bits is rounded to these, as converted.
        dtype = getattr(self.layer, "dtype", None) if kernel.dtype == jnp.float32 else None
        matrix = inputs_first(self.layer, kernel)
        if matrix is not None:
            weight = self.weight_quantizer(matrix, axis=-2, dtype=dtype).reshape(kernel.shape)
        else:
            weight = self.weight_quantizer(to_matrix(self.layer, kernel), dtype=dtype)
            weight = from_matrix(self.layer, weight, kernel.shape)
        layer = with_weight(self.layer, weight)
        if isinstance(layer, nnx.Linear) and layer.dot_general is jax.lax.dot_general and dispatch.on_cpu():
            layer.dot_general = dot_general
        return layer


class QATTable(FakeQuantModule):
    """An embedding's table: stands where its Param stood, and gives the quantized rows."""

    def __init__(self, table: nnx.Param[Any], weight: WeightQuantizer) -> None:
        self.table = table
        self.weight_quantizer = weight

    def get_value(self) -> Float[Array, "vocab hidden"]:
        """The quantized table, in the dtype of the parameter."""
        return self.weight_quantizer(self.table.get_value())


def multiplies_codes(layer: QATLinear | QATExpertLinear) -> bool:
    """Whether the layer's forward pass multiplies codes, now."""
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    if inputs is None or not (weight.enabled and inputs.enabled) or weight.rounding != "nearest":
        return False
    return multipliable(weight.scheme, inputs.scheme, layer.weight.get_value().shape[-1])


def _codes(layer: QATLinear | QATExpertLinear, rows: Array) -> tuple[QTensor, QTensor]:
    """The operands as codes, no gradient through them."""
    rows, weight = jax.lax.stop_gradient((rows, layer.weight.get_value()))
    inputs = layer.input_quantizer
    assert inputs is not None
    if isinstance(inputs.scheme.granularity, Token):
        codes = quantize(rows, inputs.scheme)
    else:
        codes = quantize_input(rows, inputs.scheme, *inputs.parameters())
    return jax.lax.stop_gradient((codes, layer.weight_quantizer.quantize(weight)))


def _by_kernels(layer: QATLinear, rows: Array) -> tuple[Array, Array, Array] | None:
    """x̂, Ŵ and their product in bfloat16, each operand read once; None where there are no kernels for it."""
    weight, inputs = layer.weight_quantizer, layer.input_quantizer
    assert inputs is not None
    if weight.log_scale is not None or not isinstance(inputs.scheme.granularity, Token):
        return None
    rules = STRAIGHT[inputs.gradient], STRAIGHT[weight.gradient]
    return dispatch.fake_quantize_and_multiply(rows, layer.weight.get_value(), (inputs.scheme, weight.scheme), rules)


def _in_parts(layer: QATLinear, rows: Array, narrow: bool) -> tuple[Array, Array, Array]:
    """The same; the product in float32, or in bfloat16 by a kernel where it may be narrow."""
    inputs = layer.input_quantizer
    assert inputs is not None
    values = inputs(rows), layer.weight_quantizer(layer.weight.get_value(), dtype=rows.dtype)
    product = None
    if narrow:
        weight = layer.weight_quantizer.quantize(jax.lax.stop_gradient(layer.weight.get_value()))
        product = dispatch.multiply_as_codes(rows, jax.lax.stop_gradient(weight), inputs.scheme)
    return *values, jax.lax.stop_gradient(multiply(*_codes(layer, rows)) if product is None else product)


@jax.custom_vjp
def _differentiated(x: Array, weight: Array, product: Array) -> Array:
    """x̂ · Ŵᵀ as it was computed from their codes, differentiated as the product of the two."""
    return product


def _product_forward(x: Array, weight: Array, product: Array) -> tuple[Array, tuple[Array, Array]]:
    return product, (x, weight)


def _product_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    x, weight = kept
    gradient = cotangent.astype(x.dtype)
    of_x = jnp.einsum("ro,oi->ri", gradient, weight, precision=PRECISION)
    return of_x, jnp.einsum("ro,ri->oi", gradient, x, precision=PRECISION), None


_differentiated.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _grouped_product_of_codes(x: Array, weight: Array, counts: Array, x_codes: QTensor, weight_codes: QTensor) -> Array:
    """`_product_of_codes` for rows sorted by expert."""
    return grouped_multiply(x_codes, weight_codes, counts)


def _grouped_forward(
    x: Array, weight: Array, counts: Array, x_codes: QTensor, weight_codes: QTensor
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_multiply(x_codes, weight_codes, counts), (x, weight, counts)


def _grouped_backward(kept: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None, None, None]:
    x, weight, counts = kept
    _, pull = jax.vjp(lambda x, weight: grouped_matmul_transposed(x, weight, counts), x, weight)
    return *pull(cotangent.astype(x.dtype)), None, None, None


_grouped_product_of_codes.defvjp(_grouped_forward, _grouped_backward)
