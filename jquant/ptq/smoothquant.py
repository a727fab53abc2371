"""SmoothQuant: activations with a few large channels become easy to quantize, weights a little harder.

    s = max|X|^α / max|W|^(1−α)        W · s,   X / s, folded into what produces X

max|W| is over all rows of all layers that read X. α is fixed, or searched at every place of every block by what the
quantized layers, weights and activations both, do to the output of the module around them.

Reference: Xiao et al., 2211.10438, 4 (α: 5.5), and SPEC 6. Departures: a channel that calibration never saw keeps scale
1 (the original's 10⁻⁵ would blow it up if it ever came); places beyond norms are allowed, which in gated MLPs
(up → down) matter most; the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jquant.core.config_check import check_fields
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, quantize
from jquant.core.scheme import Scheme, Tensor
from jquant.nn.linear import ExpertLinear, Linear, Quantized
from jquant.nn.protocol import Equivalence
from jquant.nn.surgery import Path
from jquant.nn.w8a8 import static_parameters, w8a8_layer
from jquant.ptq.cost import Cost
from jquant.ptq.fold import Rewrite, fold, per_channel, weight_at
from jquant.ptq.trial import Arguments, Outline, output_errors, some_inputs

_SMALLEST = 1e-5  # SPEC 6


@dataclass(frozen=True, kw_only=True)
class SmoothQuantConfig:
    """How SmoothQuant runs."""

    alpha: float | Literal["search"] = 0.5  # share of the difficulty that moves to the weights
    grid: int = 10  # a search tries 0, 1/grid, … 1, and no smoothing at all
    search_tokens: int = 1024  # of the captured inputs, in whole calls
    places: Literal["norms", "all"] = "all"  # norms: only where a norm is the producer, as in the paper

    def __post_init__(self) -> None:
        check_fields(self, "SmoothQuant")
        if self.alpha != "search" and not 0 <= self.alpha <= 1:
            raise InputError(f"SmoothQuant alpha {self.alpha!r}: it must lie in 0 … 1, or be 'search'")
        if self.grid < 1 or self.search_tokens < 1:
            raise InputError(f"SmoothQuant grid {self.grid}, {self.search_tokens} tokens: both must be at least 1")


class Pair(NamedTuple):
    """Schemes of a layer's weight and of its input."""

    weight: Scheme
    activation: Scheme


def smoothed_places(block: nnx.Module, found: Sequence[Equivalence], *, config: SmoothQuantConfig) -> list[Equivalence]:
    """Those of a block's equivalences that the config smooths."""
    return [place for place in found if config.places == "all" or weight_at(block, place.producer).ndim == 1]


def cost(work: Outline, config: SmoothQuantConfig) -> Cost:
    """Of `rewrite`."""
    total = Cost()
    for place in work.places:
        if config.places == "all" or place.producer not in work.shapes:
            output = work.output(place, config.search_tokens)
            total += (output + work.rounding(place)) * (len(_alphas(config)) + 1) + output
    return total


def _alphas(config: SmoothQuantConfig) -> np.ndarray:
    return np.arange(config.grid + 1) / config.grid if config.alpha == "search" else np.asarray([config.alpha])


def rewrite(
    block: nnx.Module,
    places: Sequence[Equivalence],
    pairs: Mapping[Path, Pair],
    absmax: Mapping[Path, Array],
    calls: Mapping[Path, Sequence[Arguments]],
    masks: Mapping[Path, Sequence[Array]] = MappingProxyType({}),
    *,
    config: SmoothQuantConfig,
) -> list[Rewrite]:
    """Smooths a block in place, at every place that the config smooths.

    Args:
        block: float.
        places: whose consumers all have a pair.
        pairs: of all layers that will be quantized, by path in the block.
        absmax: of their inputs' channels, by path.
        calls: of the places' parents, by path.
        masks: of these calls, where there is padding.
        config: with a fixed α, or one searched for.
    """
    rewrites = []
    for place in smoothed_places(block, places, config=config):
        largest = jnp.asarray(absmax[place.consumers[0]])
        parent = calls.get(place.parent, ()), masks.get(place.parent, ())
        found = search(block, place, largest, pairs, *parent, config=config)
        fold(block, place, found.scales)
        rewrites.append(found)
    return rewrites


def search(
    block: nnx.Module,
    place: Equivalence,
    absmax: Float[Array, "*experts channels"],
    pairs: Mapping[Path, Pair],
    inputs: Sequence[Arguments] = (),
    masks: Sequence[Array] = (),
    *,
    config: SmoothQuantConfig | None = None,
) -> Rewrite:
    """Scales for one place of one block; `fold` applies them.

    Args:
        block: float; left as it is.
        place: one of `CausalLM.equivalences`.
        absmax: largest |x| of every channel that reaches the consumers, [experts, channels] where they are experts.
        pairs: schemes of the consumers that will be quantized, by path in the block.
        inputs: what the place's parent was called with; a fixed α needs none, and then reports no losses.
        masks: of these calls, True for the rows that count; none where all do.
        config: by default α = 0.5.

    Raises:
        InputError: none of the consumers is to be quantized, shapes disagree, or a search has no inputs.
    """
    config = SmoothQuantConfig() if config is None else config
    chosen = {path: pairs[path] for path in place.consumers if path in pairs}
    if not chosen:
        raise InputError(f"no layer behind {place.producer} is to be quantized: leave this place out")
    weights = [weight_at(block, path) for path in place.consumers]
    alphas = _alphas(config)
    largest = per_channel(absmax, block, place, jnp.nanmax)
    # Last stands no smoothing at all, so that the search can leave a place alone.
    scales = _candidates(largest, tuple(weights), jnp.asarray(alphas, jnp.float32))
    choices = jnp.asarray([*alphas, jnp.nan], jnp.float32)
    if config.alpha != "search" and not inputs:
        return Rewrite(place, scales[0], choices[0], jnp.float32(jnp.nan), jnp.float32(jnp.nan))
    inputs, masks = some_inputs(inputs, masks, config.search_tokens)
    errors = output_errors(block, place, inputs, scales, smoothed_layer, chosen, masks)
    best = jnp.nanargmin(errors) if config.alpha == "search" else 0
    return Rewrite(place, scales[best], choices[best], errors[-1], errors[best])


def smoothing_scales(
    absmax: Float[Array, "*experts channels"], weight_absmax: Float[Array, "*experts channels"], alpha: Array | float
) -> Float[Array, "*experts channels"]:
    """s, at least 10⁻⁵; 1 for channels that were always 0."""
    scales = absmax**alpha / jnp.maximum(weight_absmax, _SMALLEST) ** (1 - alpha)
    return jnp.where(absmax > 0, jnp.maximum(scales, _SMALLEST), 1.0)


def smoothed_layer(layer: Linear | ExpertLinear, scales: Array, pair: Pair) -> nnx.Module:
    """The layer as it will be quantized, for inputs that are not divided by the scales yet."""
    weight = quantize(layer.weight.get_value() * scales[..., None, :], pair.weight)
    return _Smoothed(layer, weight, scales, pair.activation)


@jax.jit
def _candidates(absmax: Array, weights: tuple[Array, ...], alphas: Array) -> Array:
    over_rows = [jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=-2) for weight in weights]
    # A norm before a stack of experts has one set of scales for all of them.
    columns = [jnp.max(each.reshape(-1, *absmax.shape), axis=0) for each in over_rows]
    of_alpha = partial(smoothing_scales, absmax, jnp.max(jnp.stack(columns), axis=0))
    scales = jax.vmap(of_alpha)(alphas)
    return jnp.concatenate([scales, jnp.ones_like(scales[:1])])


class _Smoothed(nnx.Module):
    """The quantized layer at x / s. A static scale of activations is that of the rows at hand."""

    def __init__(self, layer: Linear | ExpertLinear, weight: QTensor, scales: Array, activation: Scheme) -> None:
        self.layer, self.activation = layer, activation
        self.weight, self.scales = Quantized(weight), nnx.Variable(scales)

    def __call__(self, x: Array, *counts: Array, **options: Any) -> Array:
        scales = self.scales.get_value()
        if scales.ndim > 1:  # a set an expert, whose rows stand together
            scales = jnp.repeat(scales, counts[0], axis=0, total_repeat_length=len(x))
        x = (x / scales).astype(x.dtype)
        static = isinstance(self.activation.granularity, Tensor)
        scale, zero = static_parameters(jnp.min(x), jnp.max(x), self.activation) if static else (None, None)
        made: Any = w8a8_layer(
            self.layer,
            self.weight.get_value(),
            activation=self.activation,
            input_scale=scale,
            input_zero_point=zero,
        )
        return made(x, *counts, **options)
