"""Training of low-rank adapters over a frozen quantized model, and the ways back to one without adapters.

    report = add_adapters(model, (r"attn\\.[qv]_proj$",), scheme("nf4:g64:dq"), rank=16, key=jax.random.key(0))
    optimizer = nnx.Optimizer(model, optax.adamw(2e-4), wrt=LoRAParam)      # a loop of one's own; or
    train(model, loss, batches, QATConfig(frozen=ALL_BUT_ADAPTERS, …))      # the trainer of qat/trainer.py
    merge(model)                                                            # float layers; or
    requantize(model)                                                       # packed ones again

What is trained is a few percent of the weights; the base may be packed by any method (GPTQ, AWQ) beforehand.

Reference: QLoRA, Dettmers et al., 2305.14314.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scales import NestedScale
from jquant.core.scheme import Scheme
from jquant.nn.convolution import QuantizedConv
from jquant.nn.linear import ExpertLinear, Linear, QuantizedExpertLinear, QuantizedLinear
from jquant.nn.lora import LoRALinear, LoRAParam
from jquant.nn.matrices import packed_layer, weight_matrix
from jquant.nn.second_level import reading_together_in_model, shared_levels
from jquant.nn.surgery import Path, named_modules, replace, select
from jquant.nn.w8a8 import W8A8ExpertLinear, W8A8Linear
from jquant.qat.loftq import Start, loftq

Initializer = Callable[[Float[Array, "out in"], Scheme, int, PRNGKeyArray], Start]

ALL_BUT_ADAPTERS = (r"^(?!.*\blora_[ab]$)",)  # of parameters' paths: what `QATConfig.frozen` takes

_SUPPORTED = (Linear, nnx.Linear, QuantizedLinear)
_REFUSED = (ExpertLinear, QuantizedExpertLinear, W8A8Linear, W8A8ExpertLinear, nnx.Conv, QuantizedConv, LoRALinear)


@dataclass(frozen=True, kw_only=True)
class AdapterLayer:
    """One layer that was given an adapter."""

    path: Path
    shape: tuple[int, int]
    scheme: str  # of the frozen base
    rounded: bool  # the base was made here; else it was packed already
    error: float | None  # ‖W − Ŵ − (α/r)·B·A‖² / ‖W‖² at the start; None where W is not known


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What `add_adapters` did."""

    layers: tuple[AdapterLayer, ...]
    left_alone: tuple[Path, ...]  # linear layers without an adapter
    trained: int  # numbers in all adapters
    trained_bytes: int  # of the adapters; their gradients take as much again, Adam's moments twice that
    frozen_bytes: int  # of everything else, packed weights packed

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """One line for people."""
        schemes = ", ".join(sorted({layer.scheme for layer in self.layers}))
        return (
            f"{len(self.layers)} layers with adapters over {schemes}, {len(self.left_alone)} left alone; "
            f"{self.trained:,} numbers are trained, {self.trained_bytes / 1e6:.3g} MB beside "
            f"{self.frozen_bytes / 1e6:.3g} MB"
        )


@dataclass(frozen=True, kw_only=True)
class RequantizedLayer:
    """One layer whose adapter was merged and rounded. W is the merged weight; errors are squared."""

    path: Path
    scheme: str
    error: float  # ‖W − dequantize(quantize(W))‖² / ‖W‖², what rounding adds
    learned: float  # ‖(α/r)·B·A‖² / ‖W‖², what training added: where it is less than `error`, rounding outweighs it
    kept_scales: bool  # the base's scales lost less than new ones


def add_adapters(
    model: nnx.Module,
    patterns: Sequence[str],
    scheme: Scheme | None,
    *,
    rank: int,
    key: PRNGKeyArray,
    alpha: float | None = None,
    initialize: Initializer | None = None,
) -> AdapterReport:
    """Gives linear layers a frozen packed weight and an adapter, in place.

    Args:
        model: any NNX module; its `Linear`, `nnx.Linear` and `QuantizedLinear` layers can be chosen.
        patterns: regular expressions searched for in the layers' dotted paths.
        scheme: of the base of float layers, each by itself: NVFP4's second level is shared where the model was
            quantized before. Layers that are packed already stay as they are.
        rank: of the adapters, 1 to the smaller side of every weight.
        key: of the adapters' random numbers; a layer's depend on it and on the layer's path alone.
        alpha: adapters are multiplied by alpha / rank; by default `rank`, so by 1.
        initialize: base and adapter of a float weight; by default `rounded`. Another is `loftq_start`.

    Returns:
        What was done to which layer. An optimizer must be made after this, on `LoRAParam`.

    Raises:
        InputError: a pattern matches nothing or a layer of another kind, a float layer has no scheme, a packed layer
            another one than asked for, or the rank does not fit; then nothing was changed.
    """
    alpha = float(rank) if alpha is None else alpha
    found = dict(named_modules(model, (*_SUPPORTED, *_REFUSED)))
    if not found:
        raise InputError("the model has no linear layers that could take adapters")
    adapted: dict[Path, nnx.Module] = {}
    layers = []
    for path in select(list(found), patterns):
        layer = found[path]
        _check_kind(path, layer, scheme, initialize)
        layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        try:
            adapted[path], report = _adapted(path, layer, scheme, rank, alpha, layer_key, initialize or rounded)
        except InputError as error:
            raise InputError(f"layer {path}: {error}") from error
        layers.append(report)
    replace(model, adapted)
    left = tuple(path for path in found if path not in adapted)
    trained = jax.tree.leaves(nnx.state(model, LoRAParam))
    frozen = jax.tree.leaves(nnx.state(model, nnx.Not(LoRAParam)))
    return AdapterReport(
        layers=tuple(layers),
        left_alone=left,
        trained=sum(leaf.size for leaf in trained),
        trained_bytes=sum(leaf.nbytes for leaf in trained),
        frozen_bytes=sum(leaf.nbytes for leaf in frozen if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)),
    )


def rounded(w: Float[Array, "out in"], scheme: Scheme, rank: int, key: PRNGKeyArray) -> Start:
    """The base by rounding to nearest; A normal with variance 1/in, B zero (LoRA, 4.1, leaves A's variance open)."""
    return Start(_quantize(w, scheme, None), *zero_update(w.shape, rank, key))


def loftq_start(*, steps: int = 5) -> Initializer:
    """Base and adapter by LoftQ (qat/loftq.py), for `add_adapters`."""

    def initialize(w: Array, scheme: Scheme, rank: int, key: PRNGKeyArray) -> Start:
        return loftq(w, scheme, rank, steps=steps)

    return initialize


def zero_update(
    shape: tuple[int, ...], rank: int, key: PRNGKeyArray
) -> tuple[Float[Array, "rank in"], Float[Array, "out rank"]]:
    """A and B of an adapter that does nothing yet."""
    rows, columns = shape
    return columns**-0.5 * jax.random.normal(key, (rank, columns)), jnp.zeros((rows, rank))


def merge(model: nnx.Module) -> list[Path]:
    """Replaces every layer with an adapter by a float layer, in place: W = dequantize(Q) + (α/r) · B · A.

    Returns:
        Their paths.

    Raises:
        InputError: there are none.
    """
    layers = _adapted_layers(model)
    replace(model, {path: layer.merged() for path, layer in layers.items()})
    return list(layers)


def requantize(model: nnx.Module, scheme: Scheme | None = None) -> tuple[RequantizedLayer, ...]:
    """Merges every adapter and rounds the result to nearest, in place: packed layers again.

    Args:
        model: with adapters.
        scheme: to round to; by default each layer's own, with the base's scales or new ones, whichever loses less.

    Returns:
        What rounding cost each layer.

    Raises:
        InputError: there are no adapters, or the scheme does not fit a layer; then nothing was changed.
    """
    packed: dict[Path, nnx.Module] = {}
    reports = []
    layers = _adapted_layers(model)
    outer = _levels(model, layers, scheme)
    for path, layer in layers.items():
        merged = layer.merged()
        weight = merged.weight.get_value()
        base, level = layer.weight.get_value(), outer.get(path)
        try:
            if scheme is not None:
                q, kept = _quantize(weight, scheme, level), False
            else:
                q, kept = _rounded_again(weight, base, level)
        except InputError as error:
            raise InputError(f"layer {path}: {error}") from error
        reports.append(
            RequantizedLayer(
                path=path,
                scheme=str(q.scheme),
                error=_lost(weight, q),
                learned=_share(layer.update(), weight),
                kept_scales=kept,
            )
        )
        packed[path] = packed_layer(merged, q)
    replace(model, packed)
    return tuple(reports)


def _levels(model: nnx.Module, layers: Mapping[Path, LoRALinear], scheme: Scheme | None) -> dict[Path, Array]:
    """The second level of merged weights that share it (nn/second_level.py); floats of a few layers at a time.

    Where some of those that shared it have no adapter they stay packed, with the g of the base, and so it is for all.
    """
    bases: dict[Path, QTensor] = {path: layer.weight.get_value() for path, layer in layers.items()}
    schemes = {path: base.scheme if scheme is None else scheme for path, base in bases.items()}
    schemes = {path: each for path, each in schemes.items() if isinstance(each.scale, NestedScale)}
    packed: dict[Path, Any] = {path: layer for path, layer in named_modules(model, QuantizedLinear) if schemes}
    others: dict[Path, Scheme] = {path: layer.weight.get_value().scheme for path, layer in packed.items()}
    found: dict[Path, Array] = {}
    for paths in reading_together_in_model(model, [*schemes, *others]):
        merged = {path: layers[path].merged().weight.get_value() for path in paths if path in schemes}
        found |= shared_levels(merged, schemes)
        for path in merged:
            beside = [others[each] for each in paths if each in others and _parent(each) == _parent(path)]
            level = bases[path].stored.scale2
            if level is not None and schemes[path] == bases[path].scheme and schemes[path] in beside:
                found[path] = level
    return found


def _parent(path: Path) -> Path:
    return path.rpartition(".")[0]


def _rounded_again(weight: Array, base: QTensor, outer: Array | None) -> tuple[QTensor, bool]:
    """The weight in the scheme of `base`; and whether it took the base's scales."""
    if base.scheme.block is not None:
        return _quantize(weight, base.scheme, None), False
    fresh, kept = _on_both_grids(weight, base, outer)
    return (kept, True) if _lost(weight, kept) < _lost(weight, fresh) else (fresh, False)


@jax.jit
def _on_both_grids(weight: Array, base: QTensor, outer: Array | None) -> tuple[QTensor, QTensor]:
    scales, zero = base.scales(), base.zero_points()
    fresh = quantize(weight, base.scheme, groups=base.groups, outer=outer)
    return fresh, quantize(weight, base.scheme, scale=scales, zero_point=zero, groups=base.groups, outer=outer)


def _adapted(
    path: Path,
    layer: nnx.Module,
    scheme: Scheme | None,
    rank: int,
    alpha: float,
    key: PRNGKeyArray,
    initialize: Initializer,
) -> tuple[LoRALinear, AdapterLayer]:
    weight, start = None, None
    if isinstance(layer, QuantizedLinear):
        base = layer.weight.get_value()
        _check_rank(rank, base.matrix_shape)
        start = Start(base, *zero_update(base.matrix_shape, rank, key))
    else:
        assert scheme is not None
        weight = weight_matrix(layer)
        _check_rank(rank, weight.shape)
        if not bool(jnp.all(jnp.isfinite(weight))):
            raise InputError("the weight holds a NaN or an infinity: look at what made it, or leave the layer out")
        start = initialize(weight, scheme, rank, key)
    bias = getattr(layer, "bias", None)
    adapted = LoRALinear(
        start.base, None if bias is None else bias.get_value(), a=start.a, b=start.b * (rank / alpha), alpha=alpha
    )
    error = None
    if weight is not None:
        error = _lost(weight, start.base, adapted.update())
    rows, columns = start.base.matrix_shape
    return adapted, AdapterLayer(
        path=path, shape=(rows, columns), scheme=str(start.base.scheme), rounded=weight is not None, error=error
    )


def _check_kind(path: Path, layer: nnx.Module, scheme: Scheme | None, initialize: Initializer | None) -> None:
    if isinstance(layer, LoRALinear):
        raise InputError(f"layer {path} has an adapter already: merge or requantize the model first")
    if not isinstance(layer, _SUPPORTED):
        raise InputError(
            f"layer {path} is a {type(layer).__name__}: adapters go over Linear, nnx.Linear and QuantizedLinear; "
            "give patterns that leave it out"
        )
    if not isinstance(layer, QuantizedLinear):
        if scheme is None:
            raise InputError(f"layer {path} has a float weight: give the scheme of its frozen base, as nf4:g64:dq")
        return
    own = layer.weight.get_value().scheme
    if scheme is not None and own != scheme:
        raise InputError(
            f"layer {path} is packed in {own} and {scheme} was asked for: leave the scheme out, or start from the "
            "float model"
        )
    if initialize is not None:
        raise InputError(f"layer {path} is packed: its adapter starts at zero; `initialize` needs the float weight")


def _check_rank(rank: int, shape: tuple[int, ...]) -> None:
    if not 1 <= rank <= min(shape):
        raise InputError(f"rank {rank} over a weight {tuple(shape)}: it must be 1 to {min(shape)}")


def _adapted_layers(model: nnx.Module) -> dict[Path, LoRALinear]:
    layers = {path: layer for path, layer in named_modules(model, LoRALinear) if isinstance(layer, LoRALinear)}
    if not layers:
        raise InputError("the model has no layer with an adapter: add_adapters makes them")
    return layers


def _lost(weight: Array, q: QTensor, update: Array | None = None) -> float:
    """‖W − dequantize(Q) − U‖² / ‖W‖²."""
    return float(_lost_of(weight, q, update))


def _share(part: Array, whole: Array) -> float:
    """‖part‖² / ‖whole‖², 0 where there is nothing."""
    return float(_ratio(part, whole))


@jax.jit
def _lost_of(weight: Array, q: QTensor, update: Array | None) -> Array:
    rest = weight.astype(jnp.float32) - dequantize(q, jnp.float32)
    return _ratio(rest if update is None else rest - update, weight)


@jax.jit
def _ratio(part: Array, whole: Array) -> Array:
    total = jnp.sum(whole.astype(jnp.float32) ** 2)
    return jnp.where(total > 0, jnp.sum(part.astype(jnp.float32) ** 2) / jnp.where(total > 0, total, 1), 0)


@partial(jax.jit, static_argnames="scheme")
def _quantize(w: Array, scheme: Scheme, outer: Array | None) -> QTensor:
    return quantize(w, scheme, outer=outer)
