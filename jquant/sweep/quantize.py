"""Quantizes a model in place by one method, from statistics that other cells use too; layers keep decoded values.

Every layer is solved with what is known of its input in the float model. AWQ and SmoothQuant first rescale the channels
of each block for the scheme at hand, on the model given, which is the cell's own. Where inputs are quantized too,
layers that multiply codes take the place of the float ones: another compilation for each pair of schemes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.metrics import ErrorSums, error_sums
from jquant.core.qtensor import QTensor, dequantize
from jquant.core.scheme import Scheme
from jquant.core.scheme import scheme as parse_scheme
from jquant.models.decoder import Decoder
from jquant.nn.protocol import Equivalence
from jquant.nn.second_level import shared_levels_of_model
from jquant.nn.surgery import Path, module_at, replace
from jquant.nn.w8a8 import w8a8_layer
from jquant.ptq import awq, gptq, rtn, smoothquant
from jquant.ptq.block import fitting_places, solve
from jquant.ptq.fold import fold_gram, weight_at
from jquant.ptq.gptq import Factor
from jquant.ptq.methods import SOLVERS
from jquant.ptq.recipe import Step
from jquant.ptq.rule_check import check_rules
from jquant.ptq.solver import Solution
from jquant.ptq.transforms import TRANSFORMS, configured
from jquant.sweep.grid import ROUNDING, Point
from jquant.sweep.statistics import Known, Statistics, factorize


def quantize_in_place(
    model: Decoder, paths: Sequence[Path], point: Point, statistics: Statistics | None
) -> list[ErrorSums]:
    """Replaces the weights at `paths` by their decoded selves, or the layers by those that quantize their inputs.

    Args:
        model: float; its arrays may be shared, its variables may not.
        paths: of the layers.
        point: scheme and method.
        statistics: of all these layers; None where the method learns from no data.

    Returns:
        What each weight lost, in the order of `paths`: where a transform has scaled it, with the scales undone, as the
        model applies it.
    """
    if point.method == ROUNDING:
        return _round_in_place(model, paths, point.scheme)
    sums: dict[Path, ErrorSums] = {}
    for prefix, inside in _by_part(paths).items():
        sums |= _quantize_part(model, prefix, inside, point, statistics)
    return [ErrorSums(*each) for each in jax.device_get([sums[path] for path in paths])]


def check_fits(model: Decoder, layers: Mapping[Path, Any], points: Sequence[Point]) -> None:
    """Raises InputError naming scheme, method and layer where one does not fit; nothing is computed."""
    shapes = {path: tuple(layer.weight.get_value().shape) for path, layer in layers.items()}
    first = {shape: path for path, shape in reversed(shapes.items())}
    for point in points:
        for shape, path in first.items():
            try:
                point.scheme.tile(*shape[-2:])
            except InputError as error:
                raise InputError(f"scheme {point.scheme} on layer {path}: {error}") from error
        if point.method == ROUNDING:
            continue
        try:
            check_rules(dict.fromkeys(shapes, point.rule), shapes, has_data=True, places=model.equivalences())
        except InputError as error:
            raise InputError(f"scheme {point.scheme} by method {point.method}: {error}") from error


def _by_part(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Paths within each block and the head, by prefix."""
    parts: dict[str, list[Path]] = {}
    for path in paths:
        names = path.split(".")
        depth = 2 if names[0] == "blocks" else 1
        parts.setdefault(".".join(names[:depth]) + ".", []).append(".".join(names[depth:]))
    return parts


def _quantize_part(
    model: Decoder, prefix: str, inside: Sequence[Path], point: Point, statistics: Statistics | None
) -> dict[Path, ErrorSums]:
    """One block, or the head."""
    part = module_at(model, prefix[:-1])
    floats = {path: weight_at(part, path) for path in inside}
    known = {} if statistics is None else {path: statistics.inputs[prefix + path] for path in inside}
    scales: Mapping[Path, jax.Array] = {}
    for step in point.rule.transforms:
        assert statistics is not None
        calls = {
            path.removeprefix(prefix): found for path, found in statistics.calls.items() if path.startswith(prefix)
        }
        places = fitting_places(step, inside, model.equivalences(), prefix)
        known, scales = _rewrite(part, places, point, known, calls, step)
    weights = {path: weight_at(part, path) for path in inside}
    outer = shared_levels_of_model(model, {prefix + path: each for path, each in weights.items()}, point.scheme)
    factors: dict[int, Factor] = {}  # of Gram matrices that were folded for this cell
    sums: dict[Path, ErrorSums] = {}
    layers: dict[Path, nnx.Module] = {}
    for path in inside:
        layer: Any = module_at(part, path)
        try:
            q = _solve(weights[path], point, known.get(path), factors, outer.get(prefix + path)).qtensor
        except InputError as error:
            raise InputError(f"layer {prefix}{path}: {error}") from error
        value, sums[prefix + path] = _decode(floats[path], q, scales.get(path))
        if point.rule.activation is None:
            layer.weight.set_value(value)
        else:
            layers[path] = w8a8_layer(layer, q, activation=parse_scheme(point.rule.activation))
    replace(part, layers)
    return sums


def _rewrite(
    block: nnx.Module,
    places: Sequence[Equivalence],
    point: Point,
    known: Mapping[Path, Known],
    calls: Mapping[Path, Any],
    step: Step,
) -> tuple[dict[Path, Known], dict[Path, jax.Array]]:
    """One transform on one block, for the point's scheme.

    Returns:
        What is known of inputs now, without factors; and by what each weight was multiplied, broadcast over it.
    """
    config = configured(TRANSFORMS, step.name, step.options)
    if step.name == "awq":
        seen = awq.Seen(_each(known, "absmean"), _each(known, "gram"), calls)
        schemes = dict.fromkeys(known, point.scheme)
        rounded = () if SOLVERS[point.rule.method.name].needs_gram else known
        found, grams = awq.rewrite(block, places, schemes, seen, rounded=rounded, config=config)
    else:
        pairs = dict.fromkeys(known, smoothquant.Pair(point.scheme, parse_scheme(point.rule.activation or "")))
        found, grams = smoothquant.rewrite(block, places, pairs, _each(known, "absmax"), calls, config=config), {}
        for place, factors, *_ in found:
            first = known[place.consumers[0]].gram
            if first is not None:
                grams |= dict.fromkeys(place.consumers, _fold_gram(first, factors))
    scales: dict[Path, jax.Array] = {}
    for place, factors, *_ in found:
        for path in place.consumers:
            scales[path] = jnp.multiply(scales.get(path, 1.0), factors[..., None, :])
        if place.producer in known:
            scales[place.producer] = jnp.divide(scales.get(place.producer, 1.0), factors[..., None])
    return {path: each._replace(gram=grams.get(path, each.gram), factor=None) for path, each in known.items()}, scales


def _each(known: Mapping[Path, Known], name: str) -> dict[Path, Any]:
    return {path: value for path, each in known.items() if (value := getattr(each, name)) is not None}


def _solve(
    weight: jax.Array, point: Point, known: Known | None, factors: dict[int, Factor], outer: jax.Array | None
) -> Solution:
    rule = point.rule
    if rule.method.name != "gptq":
        gram = known.gram if known is not None and SOLVERS[rule.method.name].needs_gram else None
        return solve(weight, gram, point.scheme, rule, outer=outer)
    assert known is not None
    config = configured(SOLVERS, "gptq", rule.method.options)
    factor = known.factor
    if factor is None:
        gram = known.gram
        assert gram is not None
        if id(gram) not in factors:
            factors[id(gram)] = factorize(gram, config)
        factor = factors[id(gram)]
    if weight.ndim == 2:
        return gptq.solve_with(weight, factor, point.scheme, config=config, outer=outer)
    return jax.vmap(
        lambda weight, factor, outer: gptq.solve_with(weight, factor, point.scheme, config=config, outer=outer)
    )(weight, factor, outer)


_fold_gram = jax.jit(fold_gram)


@jax.jit
def _decode(weight: jax.Array, q: QTensor, scales: jax.Array | None) -> tuple[jax.Array, ErrorSums]:
    """What the layer computes with, and its error against the float weight."""
    value = dequantize(q, jnp.float32)
    return value.astype(weight.dtype), error_sums(weight, value if scales is None else value / scales)


def _round_in_place(model: Decoder, paths: Sequence[Path], scheme: Scheme) -> list[ErrorSums]:
    """Replaces each weight by its quantized value: one compilation a scheme and shape."""
    layers: dict[Path, Any] = {path: module_at(model, path) for path in paths}
    outer = shared_levels_of_model(model, {path: layer.weight.get_value() for path, layer in layers.items()}, scheme)
    sums = []
    for path, layer in layers.items():
        value, each = _round_trip(layer.weight.get_value(), scheme, outer.get(path))
        layer.weight.set_value(value)
        sums.append(each)
    return [ErrorSums(*each) for each in jax.device_get(sums)]


@partial(jax.jit, static_argnames="scheme")
def _round_trip(weight: jax.Array, scheme: Scheme, outer: jax.Array | None) -> tuple[jax.Array, ErrorSums]:
    value = dequantize(rtn.rounded(weight, scheme, outer), jnp.float32)
    return value.astype(weight.dtype), error_sums(weight, value)
