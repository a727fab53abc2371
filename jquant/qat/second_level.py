"""The second level of NVFP4's scales in training: layers that engines keep as one matrix have one g.

    g = 448 · reach / max |W| over all of them        where scales are trained: 448 / max s

Which do, nn/second_level.py says. `prepare` and every step of `train` set g anew from the weights, or trained scales,
as they are then; it is a constant to the gradient. A loop of one's own calls `share_levels` after each update: where
weights outgrow a g that stays behind, their scales are clipped.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jquant.core.scales import NestedScale
from jquant.core.scheme import Scheme
from jquant.nn.fake_quant import OuterLevel, WeightQuantizer
from jquant.nn.qat_layers import QATExpertLinear, QATLinear
from jquant.nn.second_level import reading_together_in_model
from jquant.nn.surgery import Path, named_modules


def share_levels(model: nnx.Module) -> None:
    """Sets g of a prepared decoder's layers that share it, in place; other layers and modules are left alone."""
    layers: dict[Path, Any] = dict(named_modules(model, (QATLinear, QATExpertLinear)))
    nested = [path for path, layer in layers.items() if isinstance(_scheme(layer).scale, NestedScale)]
    for paths in reading_together_in_model(model, nested):
        together: dict[object, list[Any]] = {}
        for path in paths:
            trained = layers[path].weight_quantizer.log_scale is not None
            together.setdefault((path.rpartition(".")[0], _scheme(layers[path]), trained), []).append(layers[path])
        for sharing in together.values():
            if len(sharing) > 1:
                _share(sharing)


def _scheme(layer: Any) -> Scheme:
    return layer.weight_quantizer.scheme


def _share(layers: list[Any]) -> None:
    peaks = [layer.weight_quantizer.peak(layer.weight.get_value()) for layer in layers]
    level = layers[0].weight_quantizer.outer_of(jnp.max(jnp.stack(peaks), axis=0))
    for layer in layers:
        quantizer: WeightQuantizer = layer.weight_quantizer
        own = jnp.copy(level)  # a step donates each
        if quantizer.level is None:
            quantizer.level = OuterLevel(own)
        else:
            quantizer.level.set_value(own)
