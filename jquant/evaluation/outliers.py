"""Where weights and activations have outliers: what stretches the range of all who share a scale with them.

    weights      max |w| / rms(w) of a layer: about 4.5 for Gaussian rows, more where a few entries stand out
    activations  max_c a_c / median_c a_c of a layer's input, with a_c = max |x_c| of a channel

Reference: LLM.int8() (Dettmers et al., 2208.07339), 3; SmoothQuant (Xiao et al., 2211.10438), 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jquant.evaluation.sensitivity import FloatPass, block_layers
from jquant.nn.capture import capture, input_groups
from jquant.nn.linear import ExpertLinear
from jquant.nn.protocol import CausalLM
from jquant.nn.surgery import Path


@dataclass(frozen=True, kw_only=True)
class LayerOutliers:
    """Of one layer's weight and of what it reads."""

    path: Path
    weight_ratio: float  # largest magnitude over root mean square
    input_ratio: float  # largest channel's largest magnitude over the median channel's
    channel: int  # the largest
    largest: float  # its largest magnitude


def outliers(
    model: CausalLM, passed: FloatPass, *, progress: Callable[[int, int], None] | None = None
) -> list[LayerOutliers]:
    """Of every layer of the blocks, on the windows of a float pass.

    Args:
        model: float.
        passed: of the same model.
        progress: hears how many of how many blocks are done.
    """
    layers, found = block_layers(model), []
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}."
        inner = tuple(path.removeprefix(prefix) for path in layers if path.startswith(prefix))
        arguments = (passed.states[index], passed.contexts[index])
        for group in input_groups(block, inner, arguments):
            calls = capture(block, group[:1], arguments)[group[0]]
            channels = np.max([np.asarray(_channel_maxima(call[0])) for call in calls], axis=0)
            for path in group:
                found.append(_of_layer(prefix + path, layers[prefix + path], channels))
        if progress is not None:
            progress(index + 1, len(model.blocks))
    order = {path: place for place, path in enumerate(layers)}
    return sorted(found, key=lambda each: order[each.path])


def _of_layer(path: Path, layer: Any, channels: np.ndarray) -> LayerOutliers:
    median = float(np.median(channels))
    largest = int(np.argmax(channels))
    return LayerOutliers(
        path=path,
        weight_ratio=float(_weight_ratio(layer.weight.get_value(), experts=isinstance(layer, ExpertLinear))),
        input_ratio=float(channels[largest]) / median if median > 0 else float("inf"),
        channel=largest,
        largest=float(channels[largest]),
    )


@jax.jit
def _channel_maxima(x: Array) -> Array:
    return jnp.max(jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1]), axis=0)


@partial(jax.jit, static_argnames="experts")
def _weight_ratio(weight: Array, *, experts: bool) -> Array:
    """Of a stack of experts the largest."""
    axes = (-2, -1)
    weight = weight.astype(jnp.float32)
    squares = jnp.maximum(jnp.mean(weight * weight, axis=axes), jnp.finfo(jnp.float32).tiny)
    return (
        jnp.max(jnp.max(jnp.abs(weight), axis=axes) / jnp.sqrt(squares))
        if experts
        else jnp.max(jnp.abs(weight)) / jnp.sqrt(squares)
    )
