"""Saved tensors, float and packed, into a model of float layers: the way back from a native checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme
from jquant.nn.linear import Quantized
from jquant.nn.matrices import LAYERS, packed_layer
from jquant.nn.rounded_input import RoundedInputExpertLinear, RoundedInputLinear, input_quantized_layer
from jquant.nn.surgery import Path, module_at, replace
from jquant.nn.w8a8 import W8A8ExpertLinear, W8A8Linear

# Names of what a layer that quantizes its input with fixed scales holds beside its weight; where it multiplies floats,
# under `inputs`.
STATIC = ("input_scale", "input_zero_point")


def tensors_of(module: nnx.Module, *, prefix: str = "") -> dict[Path, Any]:
    """Every weight by its path, packed ones packed, shared ones once."""
    # Not by `nnx.to_flat_state`: a cycle in it keeps the variables, and what is put into them later, for the collector.
    state = nnx.split(module, nnx.Not(nnx.RngState), ...)[1]
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {prefix + ".".join(str(key.key) for key in path): variable.get_value() for path, variable in leaves}


def activations_of(module: nnx.Module, *, prefix: str = "") -> dict[Path, str]:
    """The schemes of the inputs of layers that quantize them, by the layers' paths."""
    found = {}
    for path, layer in nnx.iter_graph(module):
        if isinstance(layer, W8A8Linear | W8A8ExpertLinear):
            found[prefix + ".".join(map(str, path))] = str(layer.activation)
        elif isinstance(layer, RoundedInputLinear | RoundedInputExpertLinear):
            found[prefix + ".".join(map(str, path))] = str(layer.inputs.activation)
    return found


def install(module: nnx.Module, tensors: Mapping[Path, Any], activations: Mapping[Path, str]) -> None:
    """Sets float parameters and puts packed layers in the place of float ones.

    Args:
        module: float layers, whose weights may be abstract where packed ones come.
        tensors: as `tensors_of` gives them.
        activations: as `activations_of` gives them.

    Raises:
        InputError: a tensor has no place, or an activation's scheme does not fit.
    """
    layers: dict[Path, nnx.Module] = {}
    for path, value in tensors.items():
        owner, _, name = path.rpartition(".")
        if name in STATIC:
            continue
        layer = module_at(module, owner)
        if not isinstance(value, QTensor):
            variable = getattr(layer, name, None)
            if not isinstance(variable, nnx.Variable):
                raise InputError(f"tensor for {path} has no place in the model")
            variable.set_value(jnp.asarray(value))
        elif owner in activations:
            static = {key: tensors.get(f"{owner}.{key}", tensors.get(f"{owner}.inputs.{key}")) for key in STATIC}
            layers[owner] = input_quantized_layer(layer, value, activation=scheme(activations[owner]), **static)  # pyright: ignore[reportArgumentType]
        elif isinstance(layer, LAYERS):
            layers[owner] = packed_layer(layer, value)
        elif isinstance(getattr(layer, name, None), nnx.Param):  # an embedding
            setattr(layer, name, Quantized(value))
        else:
            raise InputError(f"packed tensor {path}: only weights of layers and embeddings can stay packed")
    replace(module, layers)
