"""Rescaling the channels between a producer and its readers: what AWQ and SmoothQuant leave behind in a float model.

    producer / s,   consumers · s,   readers · s        for s > 0, one a channel

Rows and bias of a linear producer are divided, weight and bias of a norm; columns of what reads are multiplied. In
float32 the block computes the same up to rounding; weights of a smaller dtype are rounded to it once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jquant.calib.gram import Gram
from jquant.core.errors import InputError
from jquant.nn.protocol import Equivalence
from jquant.nn.surgery import module_at


class Rewrite(NamedTuple):
    """What a transform found for one place of one block; losses are relative to the float output's square."""

    fold: Equivalence
    scales: Float[Array, "*experts channels"]
    choice: Float[Array, "*experts"]  # r or α; NaN where leaving the scales at 1 was best
    before: Float[Array, "*experts"]  # with scales of 1
    after: Float[Array, "*experts"]


def fold(block: nnx.Module, equivalence: Equivalence, scales: Float[Array, "*experts channels"]) -> None:
    """Rescales one block in place.

    Args:
        block: float layers at the equivalence's paths.
        equivalence: from `CausalLM.equivalences`.
        scales: one a channel of the producer's output, [experts, channels] where the producer is a stack of experts.

    Raises:
        InputError: scales are of another shape, not positive or not finite, or a layer is packed already; then nothing
            was changed.
    """
    producer, *weights = [weight_at(block, path) for path in (equivalence.producer, *_readers(equivalence))]
    if scales.shape != _channels(producer):
        raise InputError(
            f"scales of shape {scales.shape} for {equivalence.producer}: they must be {_channels(producer)}"
        )
    if not bool(jnp.all((scales > 0) & jnp.isfinite(scales))):
        raise InputError(f"scales for {equivalence.producer}: they must be positive and finite")
    module: Any = module_at(block, equivalence.producer)
    module.weight.set_value(_product(producer, 1 / (scales if producer.ndim == 1 else scales[..., None])))
    if getattr(module, "bias", None) is not None:
        module.bias.set_value(_product(module.bias.get_value(), 1 / scales))
    for path, weight in zip(_readers(equivalence), weights, strict=True):
        reader: Any = module_at(block, path)
        reader.weight.set_value(_product(weight, scales[..., None, :]))


def fold_gram(gram: Gram, scales: Float[Array, "*experts channels"]) -> Gram:
    """The Gram matrix of the consumers' input once the scales are folded: H_ij / (s_i · s_j)."""
    return gram._replace(matrix=gram.matrix / scales[..., :, None] / scales[..., None, :])


def per_channel(
    statistic: Float[Array, "*experts channels"],
    block: nnx.Module,
    place: Equivalence,
    reduce: Callable[..., Array],
) -> Float[Array, "*channels"]:
    """A statistic of the consumers' input in the shape of the scales.

    Where one norm stands before a stack of experts, `reduce` (as jnp.nanmax) takes it over those that saw data.

    Raises:
        InputError: it has another shape.
    """
    shape = _channels(weight_at(block, place.producer))
    if statistic.ndim == len(shape) + 1:
        statistic = reduce(statistic, axis=0)
    if statistic.shape != shape:
        raise InputError(f"a statistic of shape {statistic.shape} for {place.producer}: it must be {shape}")
    return statistic


def weight_at(block: nnx.Module, path: str) -> Array:
    """The float weight of a layer. Raises InputError where it is packed."""
    weight: Any = getattr(module_at(block, path), "weight", None)
    if not isinstance(weight, nnx.Param):
        raise InputError(f"{path}: it has no float weight; transforms come before layers are quantized")
    return weight.get_value()


def _channels(producer: Array) -> tuple[int, ...]:
    """Shape of a producer's scales, from that of its weight."""
    return producer.shape if producer.ndim == 1 else producer.shape[:-1]


def _readers(equivalence: Equivalence) -> tuple[str, ...]:
    return (*equivalence.consumers, *equivalence.readers)


@jax.jit
def _product(weight: Array, factor: Array) -> Array:
    return (weight.astype(jnp.float32) * factor.astype(jnp.float32)).astype(weight.dtype)
