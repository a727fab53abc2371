"""Layers of each kind seen as a matrix W[out, in] (a stack of them for experts) that multiplies rows x[…, in]."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.nn.convolution import QuantizedConv, patches
from jquant.nn.linear import ExpertLinear, Linear, Quantized, QuantizedLinear
from jquant.nn.surgery import Path, named_modules

Layer = Linear | ExpertLinear | nnx.Linear | nnx.Conv
LAYERS = (Linear, ExpertLinear, nnx.Linear, nnx.Conv)


def weight_matrix(layer: nnx.Module) -> Float[Array, "*stack out in"]:
    """The weight as a matrix. A convolution's inputs are a patch's values in the order (channel, height, width, …).

    Raises:
        InputError: the layer is of no known kind, or a convolution in groups.
    """
    match layer:
        case Linear() | ExpertLinear():
            return layer.weight.get_value()
        case nnx.Linear():
            return layer.kernel.get_value().T
        case nnx.Conv():
            if layer.feature_group_count != 1:
                raise InputError(
                    f"a convolution in {layer.feature_group_count} groups: only those in one are supported"
                )
            kernel = layer.kernel.get_value()
            return jnp.moveaxis(kernel, (-1, -2), (0, 1)).reshape(kernel.shape[-1], -1)
    raise InputError(f"a {type(layer).__name__} is no layer with a weight matrix")


def set_weight_matrix(layer: nnx.Module, matrix: Float[Array, "*stack out in"]) -> None:
    """The inverse of `weight_matrix`, in place, in the layer's dtype."""
    match layer:
        case Linear() | ExpertLinear():
            layer.weight.set_value(matrix.astype(layer.weight.get_value().dtype))
        case nnx.Linear():
            layer.kernel.set_value(matrix.T.astype(layer.kernel.get_value().dtype))
        case nnx.Conv():
            kernel = layer.kernel.get_value()
            unfolded = matrix.reshape(kernel.shape[-1], kernel.shape[-2], *kernel.shape[:-2])
            layer.kernel.set_value(jnp.moveaxis(unfolded, (0, 1), (-1, -2)).astype(kernel.dtype))
        case _:
            raise InputError(f"a {type(layer).__name__} is no layer with a weight matrix")


def input_rows(layer: nnx.Module, x: Array) -> Float[Array, "*batch in"]:
    """What the layer is called with, as rows that its matrix multiplies."""
    return patches(layer, x) if isinstance(layer, nnx.Conv) else x


def packed_layer(layer: nnx.Module, weight: QTensor) -> nnx.Module:
    """The layer that takes this one's place, with the packed matrix given."""
    match layer:
        case Linear() | ExpertLinear():
            return layer.packed(weight)
        case nnx.Linear():
            return QuantizedLinear(weight, None if layer.bias is None else layer.bias.get_value())
        case nnx.Conv():
            return QuantizedConv(layer, weight)
    raise InputError(f"a {type(layer).__name__} is no layer with a weight matrix")


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Of `weight_matrix`; weights may be abstract."""
    if isinstance(layer, Linear | ExpertLinear):
        return tuple(layer.weight.get_value().shape)
    *space, out = layer.kernel.get_value().shape
    return out, math.prod(space)


def packed_paths(model: nnx.Module) -> list[Path]:
    """Of all layers whose weights are packed."""
    modules = nnx.iter_graph(model)
    return [".".join(map(str, path)) for path, each in modules if isinstance(getattr(each, "weight", None), Quantized)]


def layer_shapes(model: Any) -> dict[Path, tuple[int, ...]]:
    """Shapes of the weight matrices of all float layers by path; `embed` last where the model has an embedding matrix.

    Raises:
        InputError: there are none.
    """
    shapes = {path: weight_shape(layer) for path, layer in named_modules(model, LAYERS)}
    embedding = getattr(getattr(model, "embed", None), "weight", None)
    if isinstance(embedding, nnx.Param):
        shapes["embed"] = tuple(embedding.get_value().shape)
    if not shapes:
        raise InputError("the model has no float linear layers: it is quantized already; start from the float model")
    return shapes
