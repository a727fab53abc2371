"""The transforms by name, and how each is run on one block of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.calib import absmax, absmean, gram
from jquant.calib.gram import Gram
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.nn.capture import Arguments, capture, input_groups
from jquant.nn.linear import ExpertLinear
from jquant.nn.protocol import Equivalence
from jquant.nn.surgery import Path, module_at
from jquant.ptq import awq, smoothquant
from jquant.ptq.cost import Cost
from jquant.ptq.coverage import TransformReport
from jquant.ptq.data import Data
from jquant.ptq.fold import Rewrite
from jquant.ptq.trial import Outline, spread_evenly


class Task(NamedTuple):
    """What a transform works on."""

    block: Any  # float; rewritten in place
    places: Sequence[Equivalence]  # those whose consumers all ask for the transform
    schemes: Mapping[Path, tuple[str, str | None]]  # of weight and input of every layer that asks for it
    rounded: Collection[Path]  # layers whose solver then rounds each weight for itself
    data: Data
    prefix: str  # of paths in reports


@dataclass(frozen=True)
class Transform:
    """What rewrites a block, and the config that its name stands for."""

    apply: Callable[[Task, Any], list[TransformReport]]
    config: Any
    cost: Callable[[Outline, Any], Cost]  # of the search, behind the one pass that observes
    needs_activation: bool = False  # it is for layers whose inputs are quantized too


def configured(registry: Mapping[str, Any], name: str, options: Sequence[tuple[str, Any]], kind: str = "method") -> Any:
    """The config of a solver, transform or other `kind` with options changed.

    Raises:
        InputError: name or option is unknown, or a value is refused; the message lists what there is.
    """
    if name not in registry:
        raise InputError(f"{kind} {name!r}: unknown; there are {', '.join(registry)}")
    config = registry[name].config
    known = [field.name for field in dataclasses.fields(config)]
    for option, _ in options:
        if option not in known:
            there = f"there are {', '.join(known)}" if known else "it has none"
            raise InputError(f"{kind} {name}: unknown option {option!r}; {there}")
    return dataclasses.replace(config, **dict(options))


def _awq(task: Task, config: awq.AWQConfig) -> list[TransformReport]:
    seen = _observe(task, config.search_tokens)
    schemes = {path: scheme(weight) for path, (weight, _) in task.schemes.items()}
    statistics = awq.Seen(seen.absmean, seen.grams, seen.calls, seen.masks)
    found, _ = awq.rewrite(task.block, task.places, schemes, statistics, rounded=task.rounded, config=config)
    return [_report("awq", each, task.prefix) for each in found]


def _smoothquant(task: Task, config: smoothquant.SmoothQuantConfig) -> list[TransformReport]:
    pairs = {
        path: smoothquant.Pair(scheme(weight), scheme(activation or ""))  # a rule has one
        for path, (weight, activation) in task.schemes.items()
    }
    seen = _observe(task, config.search_tokens)
    found = smoothquant.rewrite(task.block, task.places, pairs, seen.absmax, seen.calls, seen.masks, config=config)
    return [_report("smoothquant", each, task.prefix) for each in found]


TRANSFORMS: dict[str, Transform] = {
    "awq": Transform(_awq, awq.AWQConfig(), awq.cost),
    "smoothquant": Transform(
        _smoothquant, smoothquant.SmoothQuantConfig(alpha="search"), smoothquant.cost, needs_activation=True
    ),
}


class _Seen(NamedTuple):
    """Of the float block: statistics of every layer's input, and calls of the places' parents, with their masks."""

    absmax: dict[Path, jax.Array]
    absmean: dict[Path, jax.Array]
    grams: dict[Path, Gram]
    calls: dict[Path, list[Arguments]]
    masks: dict[Path, list[jax.Array]]  # empty where there is no padding


def _observe(task: Task, tokens: int) -> _Seen:
    """One pass. Folding at one place moves the statistics of no other, so one pass serves all."""
    paths, data = tuple(task.schemes), task.data
    groups = input_groups(task.block, paths, data.arguments(0))
    parents = tuple(dict.fromkeys(place.parent for place in task.places))
    kept = _spread(data, tokens)
    states: dict[Path, _States] = {}
    calls: dict[Path, list[Arguments]] = {}
    masks: dict[Path, list[jax.Array]] = {}
    for batch in range(data.count):
        wanted = (*(group[0] for group in groups), *(parents if batch in kept else ()))
        found = capture(task.block, wanted, data.arguments(batch))
        for group in groups:
            for call in found[group[0]]:
                experts = isinstance(module_at(task.block, group[0]), ExpertLinear)
                states[group[0]] = _update(states.get(group[0]), call, data.mask(batch), experts)
        for parent in parents if batch in kept else ():
            calls.setdefault(parent, []).extend(found[parent])
            if (mask := data.mask(batch)) is not None:
                masks.setdefault(parent, []).extend([mask] * len(found[parent]))
    seen = _Seen({}, {}, {}, calls, masks)
    for group in groups:
        state = states[group[0]]
        finished = gram.finalize(state.gram)
        gram.check(finished, f"layer {task.prefix}{group[0]}")
        for path in group:
            seen.grams[path] = finished
            seen.absmax[path] = absmax.finalize(state.absmax)
            seen.absmean[path] = absmean.finalize(state.absmean)
    return seen


def _spread(data: Data, tokens: int) -> set[int]:
    """Batches, evenly spread, that hold about so many rows."""
    rows = int(jnp.size(jax.tree.leaves(data.arguments(0))[0][..., 0]))
    return set(spread_evenly(data.count, rows, tokens))


class _States(NamedTuple):
    absmax: Any
    absmean: Any
    gram: Any


def _update(states: _States | None, call: Arguments, mask: jax.Array | None, experts: bool) -> _States:
    x = call[0]
    if states is None:
        size = (x.shape[-1], len(call[1])) if experts else (x.shape[-1],)
        states = _States(absmax.init(*size), absmean.init(*size), gram.init(*size))
    return _add_grouped(states, *call) if experts else _add(states, x, mask)


@jax.jit
def _add(states: _States, x: jax.Array, mask: jax.Array | None) -> _States:
    return _States(
        absmax.update(states.absmax, x, mask),
        absmean.update(states.absmean, x, mask),
        gram.update(states.gram, x, mask),
    )


@jax.jit
def _add_grouped(states: _States, x: jax.Array, counts: jax.Array) -> _States:
    return _States(
        absmax.update_grouped(states.absmax, x, counts),
        absmean.update_grouped(states.absmean, x, counts),
        gram.update_grouped(states.gram, x, counts),
    )


def _report(name: str, found: Rewrite, prefix: str) -> TransformReport:
    """Of a stack of experts the means."""
    return TransformReport(
        path=prefix + found.fold.producer,
        transform=name,
        consumers=tuple(prefix + path for path in found.fold.consumers),
        choice=float(jnp.mean(found.choice)),
        before=float(jnp.mean(found.before)),
        after=float(jnp.mean(found.after)),
    )
