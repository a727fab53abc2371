"""The way out of quantization-aware training: packed layers of the same outputs, or float ones of the same values."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, dequantize
from jquant.nn.fake_quant import InputQuantizer, WeightQuantizer
from jquant.nn.kernel_matrix import from_matrix, to_matrix, weight_name
from jquant.nn.linear import ExpertLinear, Linear, Quantized
from jquant.nn.qat_layers import QATExpertLinear, QATLayer, QATLinear, QATTable
from jquant.nn.rounded_input import InputRounding, PackedLayer, input_quantized_layer, with_weight
from jquant.nn.surgery import Path, named_modules, replace

Model = TypeVar("Model", bound=nnx.Module)
_LAYERS = (QATLinear, QATExpertLinear, QATLayer)


def convert(model: Model) -> Model:
    """Replaces fake-quantized layers by packed ones that give the same outputs, bit for bit in float32; in place.

    What is rounded stochastically in training is rounded to nearest here.

    Raises:
        InputError: no layer is fake-quantized, quantization has not started, or a static input scale saw no input.
    """
    return _replaced(model, _packed, lambda table: Quantized(_codes(table.weight_quantizer, table.table.get_value())))


def unwrap(model: Model) -> Model:
    """Replaces fake-quantized layers by float ones that hold the quantized values, in place; inputs stay as they are.

    Raises:
        InputError: no layer is fake-quantized, or quantization has not started.
    """
    return _replaced(model, _float, lambda table: _holding(table.table, table.weight_quantizer))


def _replaced(model: Model, layer_of: Any, variable_of: Any) -> Model:
    layers = dict(named_modules(model, _LAYERS))
    embed: Any = getattr(model, "embed", None)
    table = getattr(embed, "weight", None)
    if not layers and not isinstance(table, QATTable):
        raise InputError("the model has no fake-quantized layers: prepare it first, jquant.qat.prepare")
    made = {path: _named(path, layer_of, layer) for path, layer in layers.items()}
    if isinstance(table, QATTable):
        embed.weight = _named("embed", variable_of, table)
    replace(model, made)
    return model


def _named(path: Path, make: Any, layer: Any) -> Any:
    try:
        return make(layer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _packed(layer: QATLinear | QATExpertLinear | QATLayer) -> nnx.Module:
    static = _static(layer.input_quantizer)
    if isinstance(layer, QATLayer):
        matrix = to_matrix(layer.layer, getattr(layer.layer, weight_name(layer.layer)).get_value())
        inputs = None if layer.input_quantizer is None else InputRounding(layer.input_quantizer.scheme, **static)
        return PackedLayer(layer.layer, _codes(layer.weight_quantizer, matrix), inputs)
    plain = _plain(layer, layer.weight)
    weight = _codes(layer.weight_quantizer, layer.weight.get_value())
    if layer.input_quantizer is None:
        return plain.packed(weight)
    return input_quantized_layer(plain, weight, activation=layer.input_quantizer.scheme, **static)


def _float(layer: QATLinear | QATExpertLinear | QATLayer) -> nnx.Module:
    if isinstance(layer, QATLayer):
        kernel = getattr(layer.layer, weight_name(layer.layer)).get_value()
        _check_started(layer.weight_quantizer)
        matrix = _nearest(layer.weight_quantizer, to_matrix(layer.layer, kernel))
        return with_weight(layer.layer, from_matrix(layer.layer, matrix, kernel.shape))
    return _plain(layer, _holding(layer.weight, layer.weight_quantizer))


def _holding(variable: nnx.Param[Any], quantizer: WeightQuantizer) -> nnx.Param[Any]:
    _check_started(quantizer)
    return nnx.Param(_nearest(quantizer, variable.get_value()))


def _nearest(quantizer: WeightQuantizer, matrix: jax.Array) -> jax.Array:
    return jax.jit(dequantize)(_quantized(*nnx.split(quantizer), matrix))


def _codes(quantizer: WeightQuantizer, matrix: jax.Array) -> QTensor:
    _check_started(quantizer)
    return _quantized(*nnx.split(quantizer), matrix)


# Trained scales come as arguments: of constants XLA would compute 2^θ itself, and not to the same bits.
@partial(jax.jit, static_argnums=0)
def _quantized(graphdef: nnx.GraphDef, state: nnx.State, matrix: jax.Array) -> QTensor:
    return nnx.merge(graphdef, state).quantize(matrix)


@partial(jax.jit, static_argnums=0)
def _parameters(graphdef: nnx.GraphDef, state: nnx.State) -> tuple[jax.Array, jax.Array | None]:
    return nnx.merge(graphdef, state).parameters()


def _check_started(quantizer: WeightQuantizer) -> None:
    if not quantizer.enabled:
        raise InputError("quantization has not started: train on, or call jquant.qat.set_enabled(model, True)")


def _static(inputs: InputQuantizer | None) -> dict[str, Any]:
    """Scale and zero point of the input where they are static."""
    if inputs is None or inputs.seen is None:
        return {}
    if not inputs.enabled:
        raise InputError("quantization has not started: train on, or call jquant.qat.set_enabled(model, True)")
    if inputs.log_scale is None and float(np.asarray(inputs.seen.get_value())[3]) == 0:
        raise InputError(f"activations in {inputs.scheme}: no input was seen; run some batches first")
    scale, zero = _parameters(*nnx.split(inputs))
    return {"input_scale": scale, "input_zero_point": zero}


def _plain(layer: QATLinear | QATExpertLinear, weight: nnx.Param[Any]) -> Any:
    """The float layer that stood here, with a weight given."""
    shape = layer.weight.get_value().shape
    if isinstance(layer, QATExpertLinear):
        plain: Any = nnx.eval_shape(lambda: ExpertLinear(shape[0], shape[2], shape[1], rngs=nnx.Rngs(0)))
    else:
        bias = layer.bias
        plain = nnx.eval_shape(lambda: Linear(shape[-1], shape[-2], use_bias=bias is not None, rngs=nnx.Rngs(0)))
        plain.bias = bias
    plain.weight = weight
    return plain
