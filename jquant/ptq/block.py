"""One block of the pipeline: transform it, then solve its layers in the order in which data reaches them.

{q, k, v} → {o} → {gate, up} → {down}: layers that read the same input are solved with the same statistics, and those
after them see what the quantized ones give (true-sequential, SPEC 4). A quantized layer stays a float layer holding the
decoded weight while the block still asks for its output: that computes the same, bit for bit, and blocks of equal
structure share their compiled programs.

Reference: GPTQ (Frantar et al., 2210.17323), 3.3; --true-sequential of its authors' code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jquant.calib import gram
from jquant.calib.gram import Gram, GramState, OrderedGram
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import Scheme, Tensor
from jquant.core.scheme import scheme as parse_scheme
from jquant.nn.capture import Arguments, capturing, input_groups, replaying, unread
from jquant.nn.linear import ExpertLinear, Linear
from jquant.nn.matrices import input_rows, packed_layer, set_weight_matrix, weight_matrix
from jquant.nn.placement import fetched
from jquant.nn.protocol import Equivalence
from jquant.nn.second_level import reading_together, shared_levels
from jquant.nn.surgery import Path, module_at, replace
from jquant.nn.w8a8 import w8a8_layer
from jquant.ptq import layer_programs
from jquant.ptq.ahead import Ahead, narrow_until
from jquant.ptq.coverage import LayerReport, TransformReport
from jquant.ptq.data import Data
from jquant.ptq.methods import SOLVERS
from jquant.ptq.recipe import Rule, Step
from jquant.ptq.solver import Solution, check_finite
from jquant.ptq.static_ranges import RANGES, parameters
from jquant.ptq.transforms import TRANSFORMS, Task, configured

_SIDE_BY_SIDE = 2048**2  # entries of Gram matrices up to which a group's layers are solved so: their memory adds up
MASKED_EXPERTS = "masks do not reach experts; give batches without padding"


class Solved(NamedTuple):
    """What became of a block."""

    layers: dict[Path, nnx.Module]  # packed, to be put in the place of the float ones
    reports: list[LayerReport]
    transforms: list[TransformReport]


def quantize_block(
    block: nnx.Module,
    rules: Mapping[Path, Rule],
    data: Data | None,
    *,
    equivalences: Sequence[Equivalence] = (),
    prefix: str = "",
    ahead: Ahead | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> Solved:
    """Quantizes the layers that have a rule. Those that the block's output still depends on stay float layers, with the
    decoded weights in them.

    Args:
        block: float; changed in place.
        rules: of its layers, by path within the block.
        data: what enters it; None where no rule needs data. Afterwards `store` holds the inputs of all layers, as the
            quantized block has them, ready for `block_outputs`.
        equivalences: where transforms may rescale channels.
        prefix: before the paths in reports and messages, as "blocks.3.".
        ahead: compiles beside the work; by default each program is compiled when it is reached.
        after_step: is called when statistics were gathered, and when a layer was solved.

    Raises:
        InputError: a rule does not fit a layer, or statistics are not finite; the message names the layer.
    """
    rewritten = _transform(block, rules, data, equivalences, prefix)
    groups = reading_together(list(rules), equivalences)
    if data is not None:
        groups = input_groups(block, tuple(rules), data.arguments(0))
    ahead = Ahead(enabled=False) if ahead is None else ahead
    if data is not None:
        ahead.start(block, groups, rules, data)
    replayed: list[Path] = []
    packed: dict[Path, nnx.Module] = {}
    pending: list[Callable[[float], LayerReport]] = []
    seconds: list[float] = []
    for group in groups:
        started = time.perf_counter()
        statistics = None
        if data is not None:
            ahead.wait("capture", group[0])
            _capture_inputs(block, group, replayed, data, narrow=narrow_until(group, rules, data))
            replayed.extend(group)
            _pack_unread(block, packed, replayed, data)
            ahead.wait("gram", group[0])
            learns = any(uses_gram(rules[path]) for path in group)
            statistics = _gram(block, group, data, prefix, learns=learns)
        factors: dict[Step, Any] = {}
        alone = statistics is not None and statistics.matrix.size > _SIDE_BY_SIDE
        if statistics is not None:
            ahead.wait("solve", group[0])
            after_step()
            statistics = _factorized(block, group, rules, statistics, factors)
        schemes = {path: parse_scheme(rules[path].scheme or "") for path in group}
        outer = shared_levels({path: weight_of(block, path, prefix) for path in group}, schemes)
        solutions: list[Solution] = []
        for path in group:
            ahead.wait("solve", path)
            packed[path], solution, report = _solve_layer(
                block, path, rules[path], statistics, factors, data, prefix, outer=outer.get(path), alone=alone
            )
            pending.append(report)
            if alone:
                jax.block_until_ready(solution)
                after_step()
            else:
                solutions.append(solution)
        # Only now: layers of one group are solved side by side where the device has room, as a CPU's cores are.
        jax.block_until_ready(solutions)
        after_step()
        seconds += [(time.perf_counter() - started) / len(group)] * len(group)
    return Solved(packed, [report(each) for report, each in zip(pending, seconds, strict=True)], rewritten)


def block_outputs(block: nnx.Module, solved: Solved, data: Data, *, ahead: Ahead | None = None) -> Callable[[int], Any]:
    """What the quantized block gives for each batch, run on from the inputs in `data.store`."""
    paths = tuple(solved.layers)
    if ahead is not None:
        ahead.wait("output")
    run = replaying(block, narrow=data.narrow)
    return lambda batch: run(data.arguments(batch), _inputs(data, paths, batch))


def rule_needs_data(rule: Rule) -> bool:
    """Whether the rule's methods learn from calibration data."""
    static = rule.activation is not None and isinstance(parse_scheme(rule.activation).granularity, Tensor)
    return uses_gram(rule) or static


def uses_gram(rule: Rule) -> bool:
    """Whether the rule's methods learn from the Gram matrix of a layer's input."""
    return bool(rule.transforms) or SOLVERS[rule.method.name].needs_gram


def fitting_places(
    step: Step, wanted: Sequence[Path], places: Sequence[Equivalence], prefix: str = ""
) -> list[Equivalence]:
    """The places of a block all of whose consumers ask for a transform.

    Raises:
        InputError: there is none; the message names a layer, and what belongs together.
    """
    fitting = [place for place in places if all(path in wanted for path in place.consumers)]
    if not fitting:
        partly = [place for place in places if any(path in wanted for path in place.consumers)]
        together = f" ({', '.join(partly[0].consumers)})" if partly else ""
        raise InputError(
            f"{step.name} on {prefix}{wanted[0]}: no norm or layer before it can take the scales up; let the rule, or "
            f"--layers, name all layers that read the same input{together}, or leave the transform out"
        )
    return fitting


def _transform(
    block: nnx.Module, rules: Mapping[Path, Rule], data: Data | None, places: Sequence[Equivalence], prefix: str
) -> list[TransformReport]:
    """Each transform at the places whose consumers all ask for it, in the order of the rules."""
    steps = dict.fromkeys(step for rule in rules.values() for step in rule.transforms)
    reports: list[TransformReport] = []
    for step in steps:
        wanted = [path for path, rule in rules.items() if step in rule.transforms]
        fitting = fitting_places(step, wanted, places, prefix)
        assert data is not None
        apply, config = TRANSFORMS[step.name].apply, configured(TRANSFORMS, step.name, step.options)
        schemes = {path: (rules[path].scheme or "", rules[path].activation) for path in wanted}
        rounded = [path for path in wanted if not SOLVERS[rules[path].method.name].needs_gram]
        done = apply(Task(block, fitting, schemes, rounded, data, prefix), config)
        if not done:
            raise InputError(
                f"{step.name} on {prefix}{wanted[0]}: its options, {dict(step.options)}, pass over the places that the "
                "rule's layers have; change them, or leave the transform out"
            )
        reports += done
    return reports


def _capture_inputs(
    block: nnx.Module, group: Sequence[Path], replayed: Sequence[Path], data: Data, *, narrow: Sequence[Path]
) -> None:
    """Puts the group's inputs into the store, once under each path."""
    run = capturing(block, group[:1], narrow=narrow)
    for batch in range(data.count):
        calls = run(data.arguments(batch), _inputs(data, replayed, batch))[group[0]]
        for path in group:
            data.store.put(path, batch, calls)


def _pack_unread(block: nnx.Module, packed: Mapping[Path, nnx.Module], replayed: Sequence[Path], data: Data) -> None:
    """Lets go of the decoded weights of layers whose outputs nothing that is still to come asks for."""
    done = unread(block, tuple(packed), data.arguments(0), replay=_inputs(data, replayed, 0))
    replace(block, {path: packed[path] for path in done})


def _inputs(data: Data, paths: Sequence[Path], batch: int) -> dict[Path, tuple[Arguments, ...]]:
    return {path: data.store.get(path, batch) for path in paths}


def _gram(block: nnx.Module, group: Sequence[Path], data: Data, prefix: str, *, learns: bool) -> Gram:
    layer = module_at(block, group[0])
    state: GramState | None = None
    for batch in range(data.count):
        for call in data.store.get(group[0], batch):
            if isinstance(layer, ExpertLinear):
                _no_mask(data.mask(batch), prefix + group[0])
                state = gram.init(call[0].shape[-1], len(call[1])) if state is None else state
                state = _update_grouped(state, *call)
            else:
                rows = input_rows(layer, call[0])
                mask = _mask_of(data.mask(batch), prefix + group[0], rows)
                state = gram.init(rows.shape[-1]) if state is None else state
                state = layer_programs.update(state, rows, mask, dtype="bfloat16" if data.narrow else None)
    assert state is not None, "input_groups refuses layers that are not called"
    found = layer_programs.finalizing(state)(state)
    gram.check(found, f"layer {prefix}{group[0]}", learns=learns)
    return found


def _factorized(
    block: nnx.Module, group: Sequence[Path], rules: Mapping[Path, Rule], statistics: Gram, factors: dict[Step, Any]
) -> Gram | OrderedGram:
    """Puts the factor that one method makes of the statistics into `factors`, and into their memory, and returns what
    reports need of them. Nothing is done where several methods make something of them."""
    methods = {rules[path].method for path in group if SOLVERS[rules[path].method.name].needs_gram}
    step = methods.pop() if len(methods) == 1 else None
    solver = None if step is None else SOLVERS[step.name]
    if step is None or solver is None or solver.factorize_in_place is None or statistics.matrix.ndim > 2:
        return statistics
    factors[step] = solver.factorize_in_place(statistics, config=configured(SOLVERS, step.name, step.options))
    return factors[step].gram


def _no_mask(mask: jax.Array | None, what: str, rows: object = None) -> None:
    """Of experts, whose rows come in an order of their own."""
    if mask is not None:
        raise InputError(f"{what}: {MASKED_EXPERTS}")


def _mask_of(mask: jax.Array | None, what: str, rows: jax.Array) -> jax.Array | None:
    if mask is not None and mask.shape != rows.shape[:-1]:
        raise InputError(f"{what}: a mask of {mask.shape} for inputs of {rows.shape}: it must be one entry a row")
    return mask


@partial(jax.jit, donate_argnums=0)
def _update_grouped(state: GramState, x: jax.Array, counts: jax.Array) -> GramState:
    return gram.update_grouped(state, x, counts)


def _solve_layer(
    block: nnx.Module,
    path: Path,
    rule: Rule,
    statistics: Gram | OrderedGram | None,
    factors: dict[Step, Any],
    data: Data | None,
    prefix: str,
    *,
    outer: jax.Array | None,
    alone: bool,
) -> tuple[nnx.Module, Solution, Callable[[float], LayerReport]]:
    """Solves one layer and puts the decoded weight into it; the report is for later, it waits."""
    layer, scheme, weight = module_at(block, path), parse_scheme(rule.scheme or ""), weight_of(block, path, prefix)
    check_finite(weight, prefix + path)
    try:
        solution = solve(weight, statistics, scheme, rule, factors=factors, outer=outer)
        module = _packed(layer, path, rule, solution.qtensor, data)
    except InputError as error:
        raise InputError(f"layer {prefix}{path}: {error}") from error
    products = "float32" if data is None else data.products
    report = weight_report(prefix + path, rule, weight, solution, statistics, alone=alone, factors=products)
    if rule.activation is None:  # after the report, which needs room for another weight
        set_weight_matrix(layer, layer_programs.decoded(solution.qtensor))
    else:
        replace(block, {path: module})
    return module, solution, report


def weight_of(block: nnx.Module, path: Path, prefix: str = "") -> jax.Array:
    """The layer's weight [..., out, in]. Raises InputError naming a layer that has none."""
    try:
        return weight_matrix(module_at(block, path))
    except InputError as error:
        raise InputError(f"layer {prefix}{path}: {error}") from error


def weight_report(
    path: Path,
    rule: Rule,
    weight: jax.Array,
    solution: Solution,
    statistics: Gram | OrderedGram | None,
    *,
    alone: bool = False,
    factors: str = "float32",
) -> Callable[[float], LayerReport]:
    """What a solution cost: begins to compute it; the result, called with the seconds it took, waits for that.

    `alone` waits already here, step by step, as each takes the room of a weight; `factors` as in
    `layer_programs.errors`.
    """
    scheme = solution.qtensor.scheme
    rounding, error = layer_programs.errors(weight, solution.qtensor, scheme, statistics, alone=alone, factors=factors)
    shape, bits = tuple(weight.shape), solution.qtensor.bits_per_weight
    small, on_data = (solution.damping, solution.fallback), statistics is not None  # not the tensor: it would stay

    def report(seconds: float) -> LayerReport:
        damping, fallback = fetched(small)  # of experts they may lie over processes
        return LayerReport(
            path=path,
            method=rule.method.name,
            scheme=str(scheme),
            activation=rule.activation,
            transforms=tuple(step.name for step in rule.transforms),
            shape=shape,
            bits_per_weight=bits,
            on_data=on_data,
            rounding_error=float(rounding),
            error=float(error),
            damping=float(np.max(damping)),
            fallback=bool(np.any(fallback)),
            seconds=seconds,
        )

    return report


def solve(
    weight: jax.Array,
    statistics: Gram | OrderedGram | None,
    scheme: Scheme,
    rule: Rule,
    *,
    factors: dict[Step, Any] | None = None,
    outer: jax.Array | None = None,
) -> Solution:
    """The rule's solver on one matrix, or on each of a stack.

    `factors` keeps what a method made of the statistics for the next layer that reads the same input; `outer` is the
    second level that the weight shares with others (nn/second_level.py).
    """
    solver = SOLVERS[rule.method.name]
    config = configured(SOLVERS, rule.method.name, rule.method.options)
    known = statistics if solver.needs_gram else None
    shared = {} if outer is None else {"outer": outer}
    if weight.ndim == 2 and solver.factorize and solver.solve_with and known is not None and factors is not None:
        if rule.method not in factors:
            assert isinstance(known, Gram)
            factors[rule.method] = solver.factorize(known, config=config)
        return solver.solve_with(weight, factors[rule.method], scheme, config=config, **shared)
    assert not isinstance(known, OrderedGram), "it is left where the one method that needs the matrix has its factor"
    if weight.ndim == 2:
        return solver.solve(weight, known, scheme, config=config, **shared)

    def each(weight: jax.Array, known: Gram | None, shared: dict[str, jax.Array]) -> Solution:
        return solver.solve(weight, known, scheme, config=config, **shared)

    return jax.vmap(each, in_axes=(0, None if known is None else 0, 0))(weight, known, shared)


def _packed(layer: nnx.Module, path: Path, rule: Rule, weight: QTensor, data: Data | None) -> nnx.Module:
    if rule.activation is None:
        return packed_layer(layer, weight)
    layer, activation = check_input_layer(layer, rule.activation), parse_scheme(rule.activation)
    if not isinstance(activation.granularity, Tensor):
        return w8a8_layer(layer, weight, activation=activation)
    assert data is not None
    mask_of = _mask_of if isinstance(layer, Linear) else _no_mask
    calls = (
        (call[0], mask_of(data.mask(batch), path, call[0]))
        for batch in range(data.count)
        for call in data.store.get(path, batch)
    )
    chosen = rule.activation_range
    scale, zero = parameters(calls, activation, chosen.name, configured(RANGES, chosen.name, chosen.options))
    return w8a8_layer(layer, weight, activation=activation, input_scale=scale, input_zero_point=zero)


def check_input_layer(layer: nnx.Module, activation: str) -> Linear | ExpertLinear:
    """The layer. Raises InputError where it is of a kind that cannot quantize its input."""
    if not isinstance(layer, Linear | ExpertLinear):
        raise InputError(f"activations in {activation}: only decoders' linear layers can quantize their inputs")
    return layer
