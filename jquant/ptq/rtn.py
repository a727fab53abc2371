"""Round to nearest: every selected linear layer's weight goes to the nearest codes, without data."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from jquant.calib.gram import Gram
from jquant.core.config_check import check_fields
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, choose_parameters, dequantize, quantize, quantize_with
from jquant.core.range_search import RangeSearch, count_of_tries, search_parameters
from jquant.core.scheme import Scheme
from jquant.core.tiles import to_tiles
from jquant.nn.linear import ExpertLinear, Linear, QuantizedExpertLinear, QuantizedLinear
from jquant.nn.second_level import shared_levels_of_model
from jquant.nn.surgery import named_modules, replace, select
from jquant.ptq.cost import Cost, Shape, rounding
from jquant.ptq.solver import Solution, check_finite, output_loss

BLOCKS = (r"^blocks\.",)  # all linear layers of the blocks; embeddings and the output projection stay as they are


@dataclass(frozen=True, kw_only=True)
class RTNConfig:
    """How rounding to nearest runs."""

    range: Literal["minmax", "mse"] = "minmax"  # of groups: all of it, or what loses least (core/range_search.py)

    def __post_init__(self) -> None:
        check_fields(self, "rtn")


def solve(
    w: Float[Array, "out in"],
    gram: Gram | None,
    scheme: Scheme,
    *,
    config: RTNConfig | None = None,
    outer: Float32[Array, "1 1"] | None = None,
) -> Solution:
    """Rounds one matrix to the nearest codes.

    Args:
        w: any float dtype; computed in float32.
        gram: of the layer's input; only the reported loss depends on it.
        scheme: any.
        config: by default the scales come from the whole range.
        outer: second level of a nested scale, as of layers that share it; by default that of w.

    Raises:
        InputError: a group does not fit, or the scheme is a block type of ggml, which searches its scales itself, and
            the range is to be searched.
    """
    return _solve(w, gram, scheme, RTNConfig() if config is None else config, outer)


@partial(jax.jit, static_argnames=("scheme", "config"))
def _solve(w: Array, gram: Gram | None, scheme: Scheme, config: RTNConfig, outer: Array | None) -> Solution:
    q = rounded(w, scheme, outer, search=config.range == "mse")
    loss = output_loss(w, dequantize(q, jnp.float32), gram)
    return Solution(q, loss, damping=jnp.float32(0), fallback=jnp.bool_(False))


def rounded(w: Array, scheme: Scheme, outer: Array | None, *, search: bool = False) -> QTensor:
    """The nearest codes; `outer` as in `solve`, `search` as its range by least error."""
    if outer is None and not search:
        return quantize(w, scheme)
    choose = search_parameters if search else choose_parameters
    return quantize_with(w, scheme, choose(to_tiles(w.astype(jnp.float32), scheme), scheme, outer=outer))


def cost(shape: Shape, scheme: Scheme, config: RTNConfig) -> Cost:
    """Of `solve`: two roundings a range that is tried."""
    tries = count_of_tries(RangeSearch()) if config.range == "mse" else 0
    return rounding(shape, scheme) + Cost(roundings=2 * tries * math.prod(shape))


def quantize_layers(model: nnx.Module, scheme: Scheme, *, layers: Sequence[str] = BLOCKS) -> list[str]:
    """Replaces linear layers by packed ones, in place.

    Args:
        model: holds `Linear` layers.
        scheme: of the weights [out, in].
        layers: regular expressions searched for in the layers' dotted paths; by default all layers of the blocks.

    Returns:
        The paths that were replaced, sorted within each block.

    Raises:
        InputError: a pattern matches nothing, or the scheme does not fit a layer; then nothing was replaced.
    """
    chosen = selected_layers(model, layers)
    outer = shared_levels_of_model(model, {path: layer.weight.get_value() for path, layer in chosen.items()}, scheme)
    packed: dict[str, nnx.Module] = {}
    for path, layer in chosen.items():
        packed[path] = layer.packed(_quantize_named(path, layer.weight.get_value(), scheme, outer.get(path)))
    replace(model, packed)
    return list(packed)


def selected_layers(model: nnx.Module, layers: Sequence[str] = BLOCKS) -> dict[str, Linear | ExpertLinear]:
    """The float linear layers that patterns select, by path. Raises InputError where a pattern matches nothing."""
    kinds = (Linear, ExpertLinear)
    found = {path: module for path, module in named_modules(model, kinds) if isinstance(module, kinds)}
    if not found:
        raise InputError("the model has no float linear layers: it is quantized already; start from the float model")
    packed = [path for path, _ in named_modules(model, (QuantizedLinear, QuantizedExpertLinear))]
    taken = [path for path in packed if any(re.search(pattern, path) for pattern in layers)]
    if taken and not any(re.search(pattern, path) for pattern in layers for path in found):
        raise InputError(f"layers such as {taken[0]} are quantized already; start from the float model")
    return {path: found[path] for path in select(list(found), layers)}


def _quantize_named(path: str, weight: jax.Array, scheme: Scheme, outer: jax.Array | None) -> QTensor:
    check_finite(weight, path)
    try:
        return _quantize(weight, scheme, outer)
    except InputError as error:
        raise InputError(f"layer {path}: {error}") from error


_quantize = jax.jit(rounded, static_argnames="scheme")
