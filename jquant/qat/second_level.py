"""The second level of NVFP4's scales in training: layers that engines keep as one matrix have one g.

    g = 448 · reach / max |W| over all of them        where scales are trained: 448 / max s

Which do, nn/second_level.py says. `prepare`, `set_bits` and every step of `train` set g anew from the weights, or
trained scales, as they are then; it is a constant to the gradient. A loop of one's own calls `share_levels` after each
update: where weights outgrow a g that stays behind, their scales are clipped.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jquant.core.scales import NestedScale
from jquant.core.scheme import Scheme
from jquant.nn.fake_quant import OuterLevel, WeightQuantizer
from jquant.nn.qat_layers import QATExpertLinear, QATLinear
from jquant.nn.second_level import reading_together_in_model
from jquant.nn.surgery import Path, named_modules


def share_levels(model: nnx.Module) -> None:
    """Sets g of a prepared decoder's layers that share it, in place; other layers and modules are left alone."""
    layers: dict[Path, Any] = dict(named_modules(model, (QATLinear, QATExpertLinear)))
    nested = [path for path, layer in layers.items() if isinstance(_final(layer).scale, NestedScale)]
    for paths in reading_together_in_model(model, nested):
        together: dict[object, list[Any]] = {}
        for path in paths:  # by the schemes they end with: who shares does not change with gradual bits
            together.setdefault((path.rpartition(".")[0], _final(layers[path])), []).append(layers[path])
        for sharing in together.values():
            if len(sharing) > 1:
                _share(sharing)


def _final(layer: Any) -> Scheme:
    return layer.weight_quantizer.final_scheme


def _share(layers: list[Any]) -> None:
    quantizers: list[WeightQuantizer] = [layer.weight_quantizer for layer in layers]
    scheme = quantizers[0].scheme
    assert isinstance(scheme.scale, NestedScale)
    assert scheme.block is None
    # Where all scales are trained g follows them; beside weights whose scales are not, each counts as what it reaches.
    reach = 1.0 if all(each.log_scale is not None for each in quantizers) else scheme.element.reach
    peaks = [
        jnp.max(_magnitudes(quantizer, layer.weight.get_value(), reach), axis=(-2, -1), keepdims=True)
        for quantizer, layer in zip(quantizers, layers, strict=True)
    ]
    level = jax.lax.stop_gradient(scheme.scale.outer(jnp.max(jnp.stack(peaks), axis=0), reach))
    for quantizer in quantizers:
        own = jnp.copy(level)  # a step donates each
        if quantizer.level is None:
            quantizer.level = OuterLevel(own)
        else:
            quantizer.level.set_value(own)


def _magnitudes(quantizer: WeightQuantizer, matrix: Array, reach: float) -> Array:
    return jnp.abs(matrix.astype(jnp.float32)) if quantizer.log_scale is None else quantizer.parameters()[0] * reach
