"""AWQ: channels that matter get finer steps, by scaling them up before rounding; then groups are clipped.

    Q(W · s) · (x / s)        s = x̄^r, or x̄^r / (w̄^(1−r) + 10⁻⁴),     s /= √(max s · min s)

with x̄ = mean |x| of a channel and w̄ = mean of |w| / max|w of its group| over the rows of all layers that read it. r is
searched by the error of the output of the module around those layers; where that is the layer itself, the Gram matrix
H of its input gives the error without data: tr(ΔW · H · ΔWᵀ). Then every group's range is shrunk where that lowers the
error of its own contribution, Δw · H_gg · Δwᵀ, with the diagonal blocks of H; not where GPTQ follows, which chooses
ranges itself. There r is the one with which GPTQ itself loses least: what rounding to nearest would gain by finer steps
for some channels, GPTQ gains otherwise, and the steps of the others are worth more to it.

Reference: Lin et al., 2306.00978, 3.2 (AutoAWQ: `_search_best_scale`, `_search_best_clip`), and SPEC 5. Departures:
scales of 1 are a candidate too, so a place is never made worse; channels that calibration never saw keep scale 1;
errors of single layers and groups are those of all of the calibration data instead of a sample; behind experts each
expert has an r of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jquant.calib.gram import Gram
from jquant.core.config_check import check_fields
from jquant.core.errors import InputError
from jquant.core.scheme import Scheme
from jquant.core.ste import fake_quantize
from jquant.core.tiles import from_tiles, spread, to_tiles
from jquant.nn.linear import ExpertLinear, Linear
from jquant.nn.product import PRECISION
from jquant.nn.protocol import Equivalence
from jquant.nn.surgery import Path, module_at
from jquant.ptq import gptq, gptq_factor, layer_programs
from jquant.ptq.cost import Cost, rounding, square_error
from jquant.ptq.fold import Rewrite, fold, fold_gram, per_channel, weight_at
from jquant.ptq.trial import Arguments, Outline, output_errors, some_inputs

UNCLIPPED = ("q_proj", "k_proj")  # layers whose output meets a softmax, where clipping does harm (SPEC 5)


@dataclass(frozen=True, kw_only=True)
class AWQConfig:
    """How AWQ runs."""

    grid: int = 20  # r = 0, 1/grid, … below 1
    duo_scaling: bool = True  # the weights' own sizes enter the scales
    # Layers that are clipped: those whose solver rounds each weight for itself; one that makes up for errors, as gptq,
    # would take what clipping changed for the weights to come close to.
    clip: Literal["rounded", "all", "none"] = "rounded"
    clip_grid: int = 20  # ranges 1, 1 − 1/grid, …
    max_shrink: float = 0.5  # … above 1 − max_shrink
    search_tokens: int = 1024  # of the captured inputs, in whole calls
    solved_grid: int = 5  # as `grid`, where GPTQ follows and is tried, by its defaults, with each

    def __post_init__(self) -> None:
        check_fields(self, "AWQ")
        if min(self.grid, self.clip_grid, self.search_tokens, self.solved_grid) < 1:
            raise InputError(
                f"AWQ grid {self.grid}, clip_grid {self.clip_grid}, search_tokens {self.search_tokens}, solved_grid "
                f"{self.solved_grid}: all must be at least 1"
            )
        if not 0 < self.max_shrink <= 1:
            raise InputError(f"AWQ max_shrink {self.max_shrink}: it must lie in 0 … 1, as 0.5")


class Clipped(NamedTuple):
    """A weight with some groups' ranges shrunk, and Σ Δw·H_gg·Δwᵀ once it is rounded, relative to that of w itself."""

    weight: Float[Array, "*experts out in"]
    before: Float[Array, "*experts"]
    after: Float[Array, "*experts"]


class Seen(NamedTuple):
    """What the float block's layers read, by path; experts have theirs each."""

    absmean: Mapping[Path, Array]
    grams: Mapping[Path, Gram]  # layers that read the same input have the same one
    calls: Mapping[Path, Sequence[Arguments]]  # of the places' parents, but for those that are layers themselves
    masks: Mapping[Path, Sequence[Array]] = MappingProxyType({})  # of these calls, where there is padding


def rewrite(
    block: nnx.Module,
    places: Sequence[Equivalence],
    schemes: Mapping[Path, Scheme],
    seen: Seen,
    *,
    rounded: Collection[Path],
    config: AWQConfig | None = None,
) -> tuple[list[Rewrite], dict[Path, Gram]]:
    """Scales a block at every place, then clips its layers, but for those that meet a softmax.

    Args:
        block: float; changed in place.
        places: whose consumers all have a scheme.
        schemes: of all layers that will be quantized, by path in the block.
        seen: of all these layers.
        rounded: those whose solver rounds each weight for itself.
        config: by default these are clipped.

    Returns:
        What was found at each place, and the Gram matrices of the layers' inputs as they are now.
    """
    config = AWQConfig() if config is None else config
    rewrites, grams = [], dict(seen.grams)
    for place in places:
        first = place.consumers[0]
        inside = place.parent in place.consumers
        solved = _is_solved(place, rounded, stacked=seen.grams[first].matrix.ndim > 2)
        found = search(
            block,
            place,
            jnp.asarray(seen.absmean[first]),
            schemes,
            inputs=seen.calls.get(place.parent, ()),
            masks=seen.masks.get(place.parent, ()),
            gram=seen.grams[first] if inside or solved else None,
            solved=solved,
            config=config,
        )
        fold(block, place, found.scales)
        folded: Gram = _fold_gram(seen.grams[first], found.scales)
        grams |= dict.fromkeys(place.consumers, folded)
        rewrites.append(found)
    for path in _clipped(schemes, rounded, config):
        layer: Any = module_at(block, path)
        better = clip_search(weight_at(block, path), grams[path], schemes[path], config=config)
        layer.weight.set_value(better.weight)
    return rewrites, grams


def cost(work: Outline, config: AWQConfig) -> Cost:
    """Of `rewrite`."""
    total = Cost()
    for place in work.places:
        shapes = work.consumers(place)
        errors = sum(map(square_error, shapes), Cost())
        if _is_solved(place, work.rounded, stacked=len(shapes[0]) > 2):
            solving = (gptq.cost(work.shapes[path], work.schemes[path], gptq.GPTQConfig()) for path in place.consumers)
            each = sum((*solving, *map(gptq_factor.cost, shapes)), errors)
            total += each * (config.solved_grid + 1)
        elif place.parent in place.consumers:
            total += (errors + work.rounding(place)) * (config.grid + 1)
        else:
            output = work.output(place, config.search_tokens)
            total += (output + work.rounding(place)) * (config.grid + 1) + output
    for path in _clipped(work.schemes, work.rounded, config):
        shape, scheme = work.shapes[path], work.schemes[path]
        products = Cost(operations=2 * math.prod(shape) * scheme.tile(*shape[-2:])[1])
        total += (products + rounding(shape, scheme) * 2) * _clip_tries(config)
    return total


def _is_solved(place: Equivalence, rounded: Collection[Path], *, stacked: bool) -> bool:
    """Whether GPTQ follows at all consumers, and candidates are tried with it; for experts they are not."""
    return not stacked and not any(path in rounded for path in place.consumers)


def _clipped(schemes: Mapping[Path, Scheme], rounded: Collection[Path], config: AWQConfig) -> list[Path]:
    chosen = {"rounded": rounded, "all": schemes, "none": ()}[config.clip]
    return [path for path in chosen if not path.endswith(UNCLIPPED)]


def _clip_tries(config: AWQConfig) -> int:
    return max(1, int(config.max_shrink * config.clip_grid))


_fold_gram = jax.jit(fold_gram)


def search(
    block: nnx.Module,
    place: Equivalence,
    absmean: Float[Array, "*experts channels"],
    schemes: Mapping[Path, Scheme],
    *,
    inputs: Sequence[Arguments] = (),
    masks: Sequence[Array] = (),
    gram: Gram | None = None,
    solved: bool = False,
    config: AWQConfig | None = None,
) -> Rewrite:
    """Scales for one place of one block; `fold` applies them.

    Args:
        block: float; left as it is.
        place: one of `CausalLM.equivalences`.
        absmean: mean |x| of every channel that reaches the consumers, [experts, channels] where they are experts.
        schemes: of the consumers that will be quantized, by path in the block.
        inputs: what the place's parent was called with; not needed where the parent is the consumer itself.
        masks: of these calls, True for the rows that count; none where all do.
        gram: of the consumers' input; needed there, and where GPTQ follows.
        solved: GPTQ follows, and is tried with each candidate.
        config: by default 20 values of r with duo scaling.

    Raises:
        InputError: none of the consumers is to be quantized, shapes disagree, or inputs or gram are missing.
    """
    config = AWQConfig() if config is None else config
    config = replace(config, grid=config.solved_grid) if solved else config
    chosen = {path: schemes[path] for path in place.consumers if path in schemes}
    if not chosen:
        raise InputError(f"no layer behind {place.producer} is to be quantized: leave this place out")
    weights = tuple(weight_at(block, path) for path in chosen)
    mean = per_channel(absmean, block, place, jnp.nanmean)
    scales = _candidates(mean, weights, tuple(chosen.values()), config)
    if solved or place.parent in place.consumers:
        if gram is None:
            raise InputError(f"{place.parent}: its scales are searched with the Gram matrix of its input; give one")
        if solved:
            errors = _solved_errors(weights, gram, scales, tuple(chosen.values()))
        else:
            errors = _output_errors(weights[0], gram.matrix, scales, chosen[place.parent])
    else:
        inputs, masks = some_inputs(inputs, masks, config.search_tokens)
        errors = output_errors(block, place, inputs, scales, scaled_layer, chosen, masks)
    return _best(place, scales, errors, config)


def clip_search(
    w: Float[Array, "*experts out in"], gram: Gram, scheme: Scheme, *, config: AWQConfig | None = None
) -> Clipped:
    """The weight with every group bounded by what suits its contribution to the output best.

    Args:
        w: any float dtype, after scales were folded; of `UNCLIPPED` layers it is better left alone.
        gram: of the layer's input after folding (`fold_gram`); its own for each expert, or one for all.
        scheme: a group is a tile of it.
        config: by default 10 ranges from 1 to 0.55 of the largest magnitude.
    """
    return _clip_search(w, gram.matrix, scheme, AWQConfig() if config is None else config)


def awq_scales(
    absmean: Float[Array, "*experts channels"],
    weight_mean: Float[Array, "*experts channels"] | None,
    ratio: Array | float,
) -> Float[Array, "*experts channels"]:
    """s for one r; without `weight_mean` of the activations alone. 1 where the formula gives no number."""
    scales = absmean**ratio
    if weight_mean is not None:
        scales = scales / (weight_mean ** (1 - ratio) + 1e-4)
    scales, seen = jnp.maximum(scales, 1e-4), absmean > 0
    largest = jnp.max(jnp.where(seen, scales, 0.0), axis=-1, keepdims=True)
    smallest = jnp.min(jnp.where(seen, scales, jnp.inf), axis=-1, keepdims=True)
    scales = scales / jnp.sqrt(largest * smallest)
    return jnp.where(seen & jnp.isfinite(scales) & (scales > 0), scales, 1.0)


def scaled_layer(layer: Linear | ExpertLinear, scales: Array, scheme: Scheme) -> nnx.Module:
    """The layer with Q(W · s) / s."""
    layer.weight = nnx.Param(_rounded(layer.weight.get_value(), scales, scheme))
    return layer


def _rounded(w: Array, scales: Array, scheme: Scheme) -> Array:
    columns = scales[..., None, :]
    return (fake_quantize(w.astype(jnp.float32) * columns, scheme) / columns).astype(w.dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _candidates(absmean: Array, weights: tuple[Array, ...], schemes: tuple[Scheme, ...], config: AWQConfig) -> Array:
    """[candidates, …, channels]; the first is 1."""
    mean = _weight_mean(weights, schemes, absmean.shape) if config.duo_scaling else None
    ratios = jnp.arange(config.grid, dtype=jnp.float32) / config.grid
    scales = jax.vmap(lambda ratio: awq_scales(absmean, mean, ratio))(ratios)
    return jnp.concatenate([jnp.ones_like(scales[:1]), scales])


def _weight_mean(weights: tuple[Array, ...], schemes: tuple[Scheme, ...], shape: tuple[int, ...]) -> Array:
    """w̄ over the rows of all layers, and over all experts where they share their input."""
    rows = []
    for weight, scheme in zip(weights, schemes, strict=True):
        tiles = to_tiles(jnp.abs(weight.astype(jnp.float32)), scheme)
        largest = jnp.max(tiles, axis=(-3, -1), keepdims=True)
        relative = from_tiles(tiles / (largest + 1e-6), (weight.shape[-2], weight.shape[-1]))
        rows.append(relative if len(shape) > 1 else relative.reshape(-1, weight.shape[-1]))
    return jnp.mean(jnp.concatenate(rows, axis=-2), axis=-2)


@partial(jax.jit, static_argnames="scheme")
def _output_errors(w: Array, matrix: Array, scales: Array, scheme: Scheme) -> Array:
    """tr(ΔW · H · ΔWᵀ) / tr(W · H · Wᵀ), [candidates, …]."""
    w = w.astype(jnp.float32)
    errors = jax.lax.map(lambda each: _weighted_square(_rounded(w, each, scheme) - w, matrix), scales)
    return errors / _weighted_square(w, matrix)


def _solved_errors(weights: tuple[Array, ...], gram: Gram, scales: Array, schemes: tuple[Scheme, ...]) -> Array:
    """As `_output_errors`, of all layers together and after GPTQ: [candidates]."""
    total = sum(_weighted_square(w.astype(jnp.float32), gram.matrix) for w in weights)
    errors = []
    for each in scales:
        folded, lost = _fold_gram(gram, each), []
        for w, scheme in zip(weights, schemes, strict=True):
            solution = gptq.solve(w.astype(jnp.float32) * each, folded, scheme)
            lost.append(_lost(w, layer_programs.decoded(solution.qtensor), each, gram.matrix))
        errors.append(sum(lost) / total)
    return jnp.stack(errors)


@jax.jit
def _lost(w: Array, value: Array, scales: Array, matrix: Array) -> Array:
    return _weighted_square(value / scales - w.astype(jnp.float32), matrix)


def _weighted_square(w: Array, matrix: Array) -> Array:
    return jnp.sum(jnp.matmul(w, matrix, precision=PRECISION) * w, axis=(-2, -1))


def _best(place: Equivalence, scales: Array, errors: Array, config: AWQConfig) -> Rewrite:
    """The candidate of least error, of each expert where errors are theirs; that of an expert without data is 1."""
    known = jnp.where(jnp.isnan(errors), jnp.inf, errors)
    best = jnp.argmin(known, axis=0)
    ratios = jnp.asarray([jnp.nan, *(np.arange(config.grid) / config.grid)], jnp.float32)
    chosen = jnp.take_along_axis(scales, best[None, ..., None], axis=0)[0] if best.ndim else scales[best]
    return Rewrite(place, chosen, ratios[best], errors[0], jnp.min(known, axis=0))


@partial(jax.jit, static_argnums=(2, 3))
def _clip_search(w: Array, matrix: Array, scheme: Scheme, config: AWQConfig) -> Clipped:
    shape = (w.shape[-2], w.shape[-1])
    wide = w.astype(jnp.float32)
    tiles = to_tiles(wide, scheme)
    blocks = _diagonal_blocks(matrix, tiles.shape[-1])
    largest = jnp.max(jnp.abs(tiles), axis=(-3, -1))

    def error(bound: Array) -> Array:
        """Of every tile, bounded and rounded."""
        bounded = jnp.clip(tiles, -spread(bound), spread(bound))
        difference = to_tiles(fake_quantize(from_tiles(bounded, shape), scheme), scheme) - tiles
        weighted = jnp.einsum("...atbc,...bcd->...atbd", difference, blocks, precision=PRECISION)
        return jnp.sum(weighted * difference, axis=(-3, -1))

    def step(index: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        bound = largest * (1 - index / config.clip_grid)
        found = error(bound)
        better = found < best[1]
        return jnp.where(better, bound, best[0]), jnp.where(better, found, best[1])

    first = error(largest)
    bound, least = jax.lax.fori_loop(1, _clip_tries(config), step, (largest, first))
    clipped = from_tiles(jnp.clip(tiles, -spread(bound), spread(bound)), shape)
    weighted = jnp.einsum("...atbc,...bcd->...atbd", tiles, blocks, precision=PRECISION)
    total = jnp.sum(weighted * tiles, axis=(-4, -3, -2, -1))
    before, after = (jnp.sum(each, axis=(-2, -1)) / total for each in (first, least))
    return Clipped(clipped.astype(w.dtype), before, after)


def _diagonal_blocks(matrix: Array, size: int) -> Array:
    """[..., in, in] to [..., groups, size, size]; the last group is padded with zeros."""
    short = -matrix.shape[-1] % size
    padded = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, short), (0, short)])
    groups = padded.shape[-1] // size
    square = padded.reshape(*matrix.shape[:-2], groups, size, groups, size)
    return jnp.moveaxis(jnp.diagonal(square, axis1=-4, axis2=-2), -1, -3)
