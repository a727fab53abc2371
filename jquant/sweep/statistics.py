"""What methods know of the data: gathered in one pass of the float model, and shared by all cells of a sweep.

    H = (2 / N)·Σ xᵀx of every distinct layer input          and what is made of it once: GPTQ's factor U
    mean and largest |x| of its channels, and some calls of the modules around the layers, where transforms ask for them

Every layer is observed in the float model. `jquant quantize` lets later layers see what the quantized ones before them
give (true-sequential), which depends on scheme and method and can be shared by none: its numbers differ somewhat.
Matrices are kept in host memory: 400 MB of H and as much of U for the 30 blocks of SmolLM2-135M.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jquant.calib import absmax, absmean, gram
from jquant.calib.gram import Gram
from jquant.nn.capture import Arguments, capture, input_groups, replay_output
from jquant.nn.linear import ExpertLinear
from jquant.nn.matrices import layer_shapes
from jquant.nn.protocol import CausalLM, apply
from jquant.nn.surgery import Path, module_at
from jquant.ptq import gptq
from jquant.ptq.gptq import Factor, GPTQConfig
from jquant.ptq.methods import SOLVERS
from jquant.ptq.transforms import TRANSFORMS, configured
from jquant.sweep.grid import Point


class Known(NamedTuple):
    """Of one input, on the host; layers that read the same input share it."""

    gram: Gram | None
    factor: Factor | None
    absmean: Any | None  # [*experts, channels], as
    absmax: Any | None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the cells of a grid need kept."""

    factors: GPTQConfig | None  # of GPTQ without transforms before it
    grams: bool  # to be folded, or for other solvers
    calls: int  # tokens of the calls that transforms try their scales on; 0 where there are none
    inner: bool  # also of modules that are layers themselves, for which AWQ has the Gram matrix


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Of all layers, by path in the model."""

    inputs: Mapping[Path, Known]
    calls: Mapping[Path, Sequence[Arguments]]  # what the modules that transforms compare outputs of were called with
    seconds: float


def wanted(points: Sequence[Point]) -> Wanted | None:
    """What these points need; None where none learns from data."""
    rules = [point.rule for point in points if point.needs_data]
    if not rules:
        return None
    plain = [rule.method for rule in rules if not rule.transforms]
    factors = next((configured(SOLVERS, step.name, step.options) for step in plain if step.name == "gptq"), None)
    steps = [step for rule in rules for step in rule.transforms]
    tokens = [configured(TRANSFORMS, step.name, step.options).search_tokens for step in steps]
    names = {step.name for step in steps}
    folded = any(rule.transforms and SOLVERS[rule.method.name].needs_gram for rule in rules)
    grams = "awq" in names or folded or any(step.name != "gptq" for step in plain)
    return Wanted(factors=factors, grams=grams, calls=max(tokens, default=0), inner="smoothquant" in names)


def gather(
    model: CausalLM,
    paths: Sequence[Path],
    tokens: Int[np.ndarray, "windows window"],
    *,
    batch: int,
    wanted: Wanted,
    progress: Callable[[float], None] | None = None,
) -> Statistics:
    """One pass of the float model over the calibration windows, block by block.

    Args:
        model: float.
        paths: of the layers whose inputs are wanted.
        tokens: calibration windows.
        batch: windows a forward pass.
        wanted: what is kept; it moves no bit of what else is kept.
        progress: called with the share of blocks that are done.

    Raises:
        InputError: a layer saw no data or too little, or values that are not finite; the message names it.
    """
    started = time.perf_counter()
    widths = {path: shape[-1] for path, shape in layer_shapes(model).items() if path in paths}
    gram.check_rows(widths, tokens.size)
    gram.warn_of_few(widths, tokens.size)
    states = [apply(model.embed, jnp.asarray(tokens[i : i + batch])) for i in range(0, len(tokens), batch)]
    parts = _parts(model, paths, tokens.shape[1], wanted)
    inputs: dict[Path, Known] = {}
    calls: dict[Path, Sequence[Arguments]] = {}
    for index, part in enumerate(parts):
        arguments = [(state, *part.context) for state in states]
        if part.paths and wanted.calls:
            kept = _some_calls(arguments, wanted.calls)
            for parent in part.parents:
                found = [call for each in kept for call in capture(part.module, (parent,), each)[parent]]
                calls[part.prefix + parent] = jax.device_get(found)
        known, states = _observe(part, arguments, wanted, last=index == len(parts) - 1)
        inputs |= {part.prefix + path: value for path, value in known.items()}
        if progress is not None:
            progress((index + 1) / len(parts))
    return Statistics(inputs=inputs, calls=calls, seconds=time.perf_counter() - started)


def factorize(known: Gram, config: GPTQConfig) -> Factor:
    """GPTQ's factor of one Gram matrix, or of each of a stack."""
    if known.matrix.ndim == 2:
        return gptq.factorize(known, config=config)
    return jax.vmap(partial(gptq.factorize, config=config))(known)


class _Part(NamedTuple):
    """A block, or the head."""

    prefix: str
    module: Any
    context: tuple[Any, ...]  # what it is called with beside the states
    paths: tuple[Path, ...]  # wanted layers, relative to it
    parents: tuple[Path, ...]  # of the places where scales may be folded, as far as their calls are wanted


def _some_calls(arguments: Sequence[Arguments], tokens: int) -> list[Arguments]:
    """Batches of full size, evenly spread, that hold about so many tokens."""
    full = [each for each in arguments if each[0].shape == arguments[0][0].shape]
    rows = max(1, int(np.prod(full[0][0].shape[:-1])))
    count = min(len(full), max(1, tokens // rows))
    return [full[index * len(full) // count] for index in range(count)]


def _parts(model: CausalLM, paths: Sequence[Path], length: int, wanted: Wanted) -> list[_Part]:
    """What must run so that all wanted layers do."""
    parts = []
    places = model.equivalences()
    for index, (block, context) in enumerate(zip(model.blocks, model.contexts(length), strict=True)):
        prefix = f"blocks.{index}."
        inside = _inside(paths, prefix)
        parents = [place.parent for place in places if wanted.inner or place.parent not in place.consumers]
        parts.append(_Part(prefix, block, (context,), inside, tuple(dict.fromkeys(parents))))
    parts.append(_Part("head.", model.head, (), _inside(paths, "head."), ()))
    while not parts[-1].paths:
        parts.pop()
    return parts


def _inside(paths: Sequence[Path], prefix: str) -> tuple[Path, ...]:
    return tuple(path.removeprefix(prefix) for path in paths if path.startswith(prefix))


class _Sums(NamedTuple):
    gram: Any
    absmean: Any | None
    absmax: Any | None


def _observe(
    part: _Part, arguments: Sequence[Arguments], wanted: Wanted, *, last: bool
) -> tuple[dict[Path, Known], list[jax.Array]]:
    """Statistics of the part's layers, and what the part gives for each batch."""
    if not part.paths:
        return {}, [apply(part.module, *each) for each in arguments]
    groups = input_groups(part.module, part.paths, arguments[0])
    heads = tuple(group[0] for group in groups)
    sums: dict[Path, _Sums] = {}
    outputs: list[jax.Array] = []
    for each in arguments:
        found = capture(part.module, heads, each)
        for path in heads:
            experts = isinstance(module_at(part.module, path), ExpertLinear)
            for call in found[path]:
                sums[path] = _add(sums.get(path), call, experts, with_channels=bool(wanted.calls))
        if not last:
            replay = {path: found[group[0]] for group in groups for path in group}
            outputs.append(replay_output(part.module, each, replay=replay))
    known = {}
    for group in groups:
        known |= dict.fromkeys(group, _finish(sums[group[0]], wanted, f"layer {part.prefix}{group[0]}"))
    return known, outputs


def _add(sums: _Sums | None, call: Arguments, experts: bool, *, with_channels: bool) -> _Sums:
    x = call[0]
    size = (x.shape[-1], len(call[1])) if experts else (x.shape[-1],)
    if sums is None:
        channels = (absmean.init(*size), absmax.init(*size)) if with_channels else (None, None)
        sums = _Sums(gram.init(*size), *channels)
    arguments = call[:2] if experts else (x,)
    updates = _UPDATES_GROUPED if experts else _UPDATES
    return _Sums(
        *(None if each is None else update(each, *arguments) for update, each in zip(updates, sums, strict=True))
    )


def _finish(sums: _Sums, wanted: Wanted, what: str) -> Known:
    finished = _finalize(sums.gram)
    gram.check(finished, what)
    factor = None if wanted.factors is None else factorize(finished, wanted.factors)
    mean = None if sums.absmean is None else absmean.finalize(sums.absmean)
    largest = None if sums.absmax is None else absmax.finalize(sums.absmax)
    return jax.device_get(Known(finished if wanted.grams else None, factor, mean, largest))


# Each its own program, so that what a grid wants beside them moves no bit of the sums.
_UPDATES = tuple(jax.jit(module.update, donate_argnums=0) for module in (gram, absmean, absmax))
_UPDATES_GROUPED = tuple(jax.jit(module.update_grouped, donate_argnums=0) for module in (gram, absmean, absmax))
_finalize = jax.jit(gram.finalize)
