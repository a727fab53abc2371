"""Compiles the programs of a block at once, beside its first captures.

One after another, each when first needed, they took an H100's host 35 s for a model of Llama 3 8B's shape, and the
GPU waited; on two cores of a CPU they took 13 s for a small one, and one core waited. What runs is as without this: a
program that is ready is found where `jax.jit` looks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Literal

import jax
from flax import nnx

from jquant.calib import gram
from jquant.calib.gram import Gram, usable
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme as parse_scheme
from jquant.nn.capture import traced_capture, traced_output, unread
from jquant.nn.linear import ExpertLinear
from jquant.nn.matrices import input_rows, packed_layer, weight_matrix
from jquant.nn.second_level import shared_levels
from jquant.nn.surgery import Path, module_at, replace
from jquant.ptq import layer_programs
from jquant.ptq.data import Data
from jquant.ptq.methods import SOLVERS
from jquant.ptq.recipe import Rule
from jquant.ptq.solver import is_finite
from jquant.ptq.source import share
from jquant.ptq.transforms import configured

Stage = Literal["capture", "gram", "solve", "output"]
_THREADS = 8


class Ahead:
    """Compiles for the first block it is shown; later ones of equal structure find the programs."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._pending: dict[tuple[Stage, Path], list[Future[Any]]] = {}

    def start(
        self, block: nnx.Module, groups: Sequence[Sequence[Path]], rules: Mapping[Path, Rule], data: Data
    ) -> None:
        """Begins to compile what `quantize_block` will run. Programs that cannot be foreseen are left to it."""
        if not self._enabled:
            return
        self._enabled = False
        try:
            self._compile(_traced(block, groups, rules, data))
        except Exception:  # whatever it is, the work itself says what is wrong, and of which layer
            return

    def wait(self, stage: Stage, path: Path = "") -> None:
        """Until the programs of a stage are ready: the one who calls would only compile them again."""
        wait(self._pending.pop((stage, path), ()))  # what failed here fails there, where it is understood

    def _compile(self, traced: Iterable[tuple[tuple[Stage, Path], Sequence[Any]]]) -> None:
        executor = ThreadPoolExecutor(min(_THREADS, _cores()), thread_name_prefix="compile")
        known: dict[Any, Future[Any]] = {}  # by jaxpr: layers of equal shape share programs
        try:
            for key, programs in traced:
                futures = []
                for program in programs:
                    name = (program.fun_name, id(program.jaxpr.jaxpr))
                    if name not in known:
                        known[name] = executor.submit(lambda program=program: program.lower().compile() and None)
                    futures.append(known[name])
                self._pending[key] = futures
        finally:
            executor.shutdown(wait=False)


def narrow_until(group: Sequence[Path], rules: Mapping[Path, Rule], data: Data) -> tuple[Path, ...]:
    """The narrow layers in a capture of the group's inputs: the group itself where only its products read them, and not
    where inputs are quantized too, from float32."""
    quantized = any(rules[path].activation is not None for path in group)
    return tuple(path for path in data.narrow if not (quantized and path in group))


def _traced(
    block: nnx.Module, groups: Sequence[Sequence[Path]], rules: Mapping[Path, Rule], data: Data
) -> Iterator[tuple[tuple[Stage, Path], list[Any]]]:
    """The programs of each stage, in the order in which they are needed."""
    replay: dict[Path, Any] = {}
    packed: dict[Path, nnx.Module] = {}
    block = share(block)
    variables = jax.tree.leaves(nnx.state(block), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    try:
        for group in groups:
            narrow = narrow_until(group, rules, data)
            captured = traced_capture(block, group[:1], data.arguments(0), replay=replay, narrow=narrow)
            yield ("capture", group[0]), [captured]
            calls = captured.out_info[group[0]]
            replay |= dict.fromkeys(group, calls)
            done = unread(block, tuple(packed), data.arguments(0), replay=replay)
            replace(block, {path: packed[path] for path in done})
            yield ("gram", group[0]), _of_gram(module_at(block, group[0]), calls, data)
            outer = _levels(block, group, rules)
            for path in group:
                layer = module_at(block, path)
                programs, weight = _of_solver(layer, rules[path], data.products, outer.get(path))
                yield ("solve", path), programs
                if weight is not None and rules[path].activation is None:
                    packed[path] = nnx.eval_shape(packed_layer, layer, weight)
        yield ("output", ""), [traced_output(block, data.arguments(0), replay=replay, narrow=data.narrow)]
    finally:
        for variable in variables:  # `nnx.merge` leaves a cycle, which would keep their arrays for the collector
            variable.set_value(None)


def _of_gram(layer: nnx.Module, calls: Sequence[Any], data: Data) -> list[Any]:
    if isinstance(layer, ExpertLinear):
        return []
    rows = jax.eval_shape(lambda x: input_rows(layer, x), calls[0][0])
    size = rows.shape[-1]
    state = jax.eval_shape(partial(gram.init, size))
    finalized = layer_programs.finalizing(state).trace(state)
    return [
        layer_programs.update.trace(state, rows, data.mask(0), dtype="bfloat16" if data.narrow else None),
        finalized,
        usable.trace(finalized.out_info),
    ]


def _levels(block: nnx.Module, group: Sequence[Path], rules: Mapping[Path, Rule]) -> dict[Path, Any]:
    schemes = {path: parse_scheme(rules[path].scheme or "") for path in group}
    weights = {path: weight_matrix(module_at(block, path)) for path in group}
    return jax.eval_shape(lambda weights: shared_levels(weights, schemes), weights)


def _of_solver(layer: nnx.Module, rule: Rule, products: str, outer: Any) -> tuple[list[Any], QTensor | None]:
    """The programs, and what they make of the weight, where that can be foreseen."""
    weight = weight_matrix(layer)
    programs = traced_solver(weight, rule, outer)
    if programs is None:
        return [], None
    factorizing, solving = programs
    scheme = parse_scheme(rule.scheme or "")
    report = layer_programs.traced_report(weight, solving.out_info.qtensor, scheme, factorizing.out_info.gram, products)
    return [is_finite.trace(weight), factorizing, solving, *report], solving.out_info.qtensor


def traced_solver(weight: Any, rule: Rule, outer: Any = None) -> list[Any] | None:
    """The programs of the rule's solver on a weight, which may be abstract; None where they cannot be foreseen."""
    method = SOLVERS[rule.method.name]
    if method.programs is None or weight.ndim != 2:
        return None
    size = weight.shape[1]
    known = Gram(_float32(size, size), _float32())
    config = configured(SOLVERS, rule.method.name, rule.method.options)
    return method.programs(weight, known, parse_scheme(rule.scheme or ""), config, outer)


def _cores() -> int:
    """That this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _float32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, "float32")
