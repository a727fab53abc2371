"""Convolution with a packed kernel, and the rows that make a convolution a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, dequantize
from jquant.nn.linear import Quantized
from jquant.nn.product import PRECISION


class QuantizedConv(nnx.Module):
    """An `nnx.Conv` whose kernel is a packed matrix [out, channels · height · width …], decoded where it is used."""

    def __init__(self, layer: nnx.Conv, weight: QTensor) -> None:
        self.weight = Quantized(weight)
        self.bias = None if layer.bias is None else nnx.Param(layer.bias.get_value())
        self.kernel_shape = tuple(layer.kernel.get_value().shape)
        self.strides = _per_axis(layer.strides, len(self.kernel_shape) - 2)
        self.padding = _padding(layer)
        self.input_dilation = _per_axis(layer.input_dilation, len(self.kernel_shape) - 2)
        self.kernel_dilation = _per_axis(layer.kernel_dilation, len(self.kernel_shape) - 2)

    def __call__(self, x: Float[Array, "batch *space channels"]) -> Float[Array, "batch *places out"]:
        *space, channels, out = self.kernel_shape
        kernel = dequantize(self.weight.get_value(), x.dtype).reshape(out, channels, *space)
        y = jax.lax.conv_general_dilated(
            x,
            jnp.moveaxis(kernel, (0, 1), (-1, -2)),
            window_strides=self.strides,
            padding=self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=_layout(len(space)),
            precision=PRECISION,
            preferred_element_type=jnp.float32,
        )
        if self.bias is not None:
            y = y + self.bias.get_value().astype(jnp.float32)
        return y.astype(x.dtype)


def patches(layer: nnx.Conv, x: Float[Array, "batch *space channels"]) -> Float[Array, "batch *places in"]:
    """The values under the kernel at each of its places, in the order (channel, height, width, …)."""
    space = tuple(layer.kernel.get_value().shape[:-2])
    return jax.lax.conv_general_dilated_patches(
        x,
        filter_shape=space,
        window_strides=_per_axis(layer.strides, len(space)),
        padding=_padding(layer),
        lhs_dilation=_per_axis(layer.input_dilation, len(space)),
        rhs_dilation=_per_axis(layer.kernel_dilation, len(space)),
        dimension_numbers=_layout(len(space)),
        precision=PRECISION,
    )


def _padding(layer: nnx.Conv) -> Any:
    padding = layer.padding
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise InputError(f"a convolution with {padding} padding: SAME, VALID or numbers are supported")
        return padding
    pairs = [padding] * (len(layer.kernel.get_value().shape) - 2) if isinstance(padding, int) else padding
    return tuple((pair, pair) if isinstance(pair, int) else tuple(pair) for pair in pairs)


def _per_axis(value: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * axes
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _layout(axes: int) -> jax.lax.ConvDimensionNumbers:
    """Channels last, as nnx.Conv has them."""
    inner = tuple(range(1, axes + 1))
    data = (0, axes + 1, *inner)
    return jax.lax.ConvDimensionNumbers(data, (axes + 1, axes, *range(axes)), data)
