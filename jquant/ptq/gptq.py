"""GPTQ: columns are rounded one after another, and what one loses the later ones make up for.

    H = R·Rᵀ, R upper        w̃_i = w_i + Σ_{k<i} (w_k − q_k)·R_ki / R_ii,   q_i = round(w̃_i)

Columns with the largest H_ii come first (act-order). A group's scales come from the original weights, so that groups
stay neighbours on disk (`static`); or from its columns as compensated so far, when its first column is reached: in the
original order (`none`), or with groups formed in that of H_ii (`dynamic`).

Reference: Frantar et al., 2210.17323, and SPEC 4. Departures: by default a group's range is the one that costs the
output least, errors weighted by H_jj (SmolLM2, int4 g64: perplexity 41.1, against 44.3 with the original's search
of |e|^2.4 and 47.6 without); no inverse of H is formed: with U = chol(H⁻¹) = R⁻¹ the paper subtracts
e_i = (w̃_i − q_i) / U_ii times U[i, i:] from what is left of W, and e·U = w − q makes both the same; the last group may
be shorter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32

from jquant.calib.gram import Gram
from jquant.core import packing
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.range_search import RangeSearch, count_of_tries
from jquant.core.scales import NestedScale, outer_scale
from jquant.core.scheme import Scheme
from jquant.kernels import dispatch
from jquant.ptq.cholesky import inverse_upper
from jquant.ptq.cost import Cost, Shape, rounding, square_error
from jquant.ptq.gptq_columns import alive, columns_of, ordered, ordered_copy
from jquant.ptq.gptq_factor import Factor, GPTQConfig, factorize, traced_factorization
from jquant.ptq.gptq_levels import levels_of, padded_group
from jquant.ptq.gptq_ranges import Parameters, Plan, choose
from jquant.ptq.gptq_rounding import Problem, State, in_one_kernel, of_rows, round_columns, round_spans, shares_inside
from jquant.ptq.solver import Solution

_TOGETHER = 2**29  # weights, of all schemes, that `solve_schemes` takes side by side


def solve(
    w: Float[Array, "out in"],
    gram: Gram | None,
    scheme: Scheme,
    *,
    config: GPTQConfig | None = None,
    outer: Float32[Array, "1 1"] | None = None,
) -> Solution:
    """Quantizes one matrix.

    Args:
        w: any float dtype; computed in float32.
        gram: of the layer's input (calib/gram.py).
        scheme: integers, floats or codebooks with any granularity and scale format.
        config: by default static act-order and searched ranges; plain GPTQ is
            `GPTQConfig(act_order="none", range="minmax")`.
        outer: second level of a nested scale, as of layers that share it; by default that of w, dead columns left out.

    Raises:
        InputError: there is no Gram matrix, the scheme is a block type of ggml, a group does not fit, or shapes
            disagree.
    """
    config = GPTQConfig() if config is None else config
    if gram is None:
        raise InputError("GPTQ without a Gram matrix: it needs calibration data; give it, or use rtn or hqq")
    return solve_with(w, factorize(gram, config=config), scheme, config=config, outer=outer)


def solve_with(
    w: Float[Array, "out in"],
    factor: Factor,
    scheme: Scheme,
    *,
    config: GPTQConfig,
    outer: Float32[Array, "1 1"] | None = None,
) -> Solution:
    """`solve` with a factor made before. Rows are independent; vmap over both for a stack of layers."""
    _check(w, factor, scheme)
    return _chosen(w)(w, factor, scheme, config, dispatch.way(), outer)


def solve_schemes(
    w: Float[Array, "out in"], factor: Factor, schemes: Sequence[Scheme], *, config: GPTQConfig
) -> list[Solution]:
    """`solve_with` for each of several schemes.

    On a GPU, where scales come from the original weights, the schemes stand side by side as rows of one weight: W is
    gathered once, products are wider, and the rounding of one fills the time in which another's waits. That takes some
    12 bytes a weight and scheme; schemes beyond `_TOGETHER` weights are solved after the first.
    """
    for scheme in schemes:
        _check(w, factor, scheme)
    way = dispatch.way()
    beside = [each for each in schemes if _stands_beside(each, w.shape, config, way)]
    most = max(1, _TOGETHER // w.size)
    found: dict[Scheme, Solution] = {}
    for begin in range(0, len(beside), most):
        some = tuple(dict.fromkeys(beside[begin : begin + most]))
        if len(some) > 1:  # else it has a program already
            found |= dict(zip(some, _solve_several(w, factor, some, config, way), strict=True))
    return [found[each] if each in found else solve_with(w, factor, each, config=config) for each in schemes]


def cost(shape: Shape, scheme: Scheme, config: GPTQConfig) -> Cost:
    """Of `solve_with`. Of ranges weighted by the output most searches end early."""
    tries = 0 if config.range == "minmax" else count_of_tries(RangeSearch())
    each = {"minmax": 0.0, "mse": 2.0, "output": 0.7}[config.range]
    roundings = Cost(roundings=(4 + each * tries) * math.prod(shape))
    return square_error(shape) + rounding(shape, scheme) + roundings


def _check(w: Array, factor: Factor, scheme: Scheme) -> None:
    if scheme.block is not None:
        raise InputError(f"GPTQ to {scheme}: a block type of ggml searches its own scales; use it with rtn")
    if w.shape[-1] != factor.root.shape[-1]:
        raise InputError(f"weight of {w.shape[-1]} inputs, Gram matrix of {factor.root.shape[-1]}: they must agree")
    scheme.granularity.tile(*w.shape)


def _stands_beside(scheme: Scheme, shape: tuple[int, ...], config: GPTQConfig, way: dispatch.Way) -> bool:
    """Whether kernels round whole spans of it, all its parameters being known."""
    plan = _plan(scheme, shape, config, way)
    span = levels_of(plan.group, shape[1], config, way)[0]
    return config.act_order == "static" and in_one_kernel(span, plan)


def programs(w: Array, gram: Gram, scheme: Scheme, config: GPTQConfig, outer: Any = None) -> list[Any]:
    """What `factorize_in_place` and `solve_with` compile for such operands, traced; nothing is computed. Refuses what
    `solve` does."""
    factorizing = traced_factorization(gram, config, in_place=True)
    _check(w, factorizing.out_info, scheme)
    return [factorizing, _chosen(w).trace(w, factorizing.out_info, scheme, config, dispatch.way(), outer)]


def _plan(scheme: Scheme, shape: tuple[int, ...], config: GPTQConfig, way: dispatch.Way) -> Plan:
    group = padded_group(scheme.granularity.tile(*shape)[1], shape[1], config.block)
    return Plan(scheme, group, config, way)


def _solution(
    w: Array, factor: Factor, scheme: Scheme, config: GPTQConfig, way: dispatch.Way, outer: Array | None = None
) -> Solution:
    return _solutions(w, factor, (scheme,), config, way, None if outer is None else (outer,))[0]


def _solutions(
    w: Array,
    factor: Factor,
    schemes: tuple[Scheme, ...],
    config: GPTQConfig,
    way: dispatch.Way,
    outer: tuple[Array, ...] | None = None,
) -> list[Solution]:
    """Of one scheme, or of several that `_stands_beside`."""
    rows, columns = w.shape
    plans = tuple(_plan(scheme, w.shape, config, way) for scheme in schemes)
    plan = plans[0]
    levels = levels_of(plan.group, columns, config, way)
    width = -(-columns // levels[0]) * levels[0]
    order = jnp.concatenate([factor.order, jnp.arange(columns, width)])
    halves = factor.halves
    if width > columns:  # else it would be copied for nothing
        halves = jnp.pad(halves, (0, width - columns)) + jnp.diag((jnp.arange(width) >= columns) * jnp.float32(1))
    importance = jnp.pad(factor.diagonal, (0, width - columns))[order]
    second = tuple(_outer(scheme, w, factor) for scheme in schemes) if outer is None else outer
    static = config.act_order == "static"
    places = order if static else jnp.arange(width)  # columns of padding are in the last group
    parameters = tuple(
        _of_whole_weight(w, factor, each, level) if static else _unknown(w.shape, width, each)
        for each, level in zip(plans, second, strict=True)
    )
    chosen = list(zip(plans, parameters, strict=True))
    copy = None if way == "jnp" else ordered_copy(w, order, factor.diagonal)
    problem = Problem(
        columns=ordered(w, order, importance) if copy is None else columns_of(copy, axis=0),
        copy=copy,
        halves=halves,
        root=jnp.pad(factor.root, (0, width - columns)),
        place=jnp.stack([jnp.minimum(places // each.group, len(found.scale) - 1) for each, found in chosen]),
        outer=second[0],
        importance=importance,
        settle=None if static or plan.group == width else inverse_upper(shares_inside(halves, plan.group)),
        steps=_side_by_side(parameters, rows) if static and way != "jnp" else None,
    )
    state = State(parameters[0], jnp.zeros((1, len(schemes) * rows), jnp.float32))
    if way == "jnp":
        part, state = round_columns(problem, state, None, 0, width, levels, plan)
        codes = part.codes.at[jnp.argsort(order)].get(mode="promise_in_bounds")
    else:
        codes, state = round_spans(problem, state, order, levels, plans)
    groups = None
    if config.act_order == "dynamic" and plan.group < columns:
        groups = jnp.zeros(columns, jnp.int32).at[factor.order].set(problem.place[0, :columns])

    def solution(index: int, scheme: Scheme) -> Solution:
        own = slice(index * rows, (index + 1) * rows)
        turned = codes[:, own].T
        if way == "kernel":  # in one kernel XLA would turn and pack single bytes from far apart
            turned = jax.lax.optimization_barrier(turned)
        found = parameters[index] if static else state.parameters
        q = _assemble(turned[:, :columns], found, scheme, (rows, columns), second[index], np.dtype(w.dtype), groups)
        return Solution(q, jnp.sum(state.loss[:, own]) / 2, factor.damping, factor.fallback)

    return [solution(index, scheme) for index, scheme in enumerate(schemes)]


def _outer(scheme: Scheme, w: Array, factor: Factor) -> Array | None:
    return outer_scale(scheme.scale, alive(w.astype(jnp.float32).T, factor.diagonal), scheme.element)


def _of_whole_weight(w: Array, factor: Factor, plan: Plan, outer: Array | None) -> Parameters:
    beyond = -w.shape[1] % plan.group
    whole, seen = jnp.pad(w, ((0, 0), (0, beyond))), jnp.pad(factor.diagonal, (0, beyond))
    return choose(columns_of(whole, axis=1), seen, plan.group, outer, plan)


def _unknown(shape: tuple[int, ...], width: int, plan: Plan) -> Parameters:
    """Of groups that are not reached yet."""
    tile_rows = plan.scheme.granularity.tile(*shape)[0]
    ones = jnp.ones((-(-width // plan.group), -(-shape[0] // tile_rows)), jnp.float32)
    return Parameters(ones, ones, jnp.zeros_like(ones))


def _side_by_side(parameters: Sequence[Parameters], rows: int) -> tuple[Array, Array]:
    """Scales and zero points, [groups, schemes · out]; of schemes with fewer groups the rest is not read."""
    most = max(len(each.scale) for each in parameters)
    scale, zero = (
        [jnp.pad(of_rows(table, rows), ((0, most - len(table)), (0, 0)), constant_values=1.0) for table in tables]
        for tables in zip(*(each[1:] for each in parameters), strict=True)
    )
    return jnp.concatenate(scale, axis=1), jnp.concatenate(zero, axis=1)


_solve = jax.jit(_solution, static_argnames=("scheme", "config", "way"))
_solve_several = jax.jit(_solutions, static_argnames=("schemes", "config", "way"))
_solve_soon = jax.jit(
    _solution, static_argnames=("scheme", "config", "way"), compiler_options=dispatch.WITHOUT_TRITON_GEMM
)


def _chosen(w: Any) -> Any:
    """The program for these operands: under a trace it becomes a part of another, which has no options of its own."""
    soon = dispatch.compiles_quickly() and dispatch.on_cuda() and not isinstance(w, Tracer)
    return _solve_soon if soon else _solve


def _assemble(
    codes: Array,
    parameters: Parameters,
    scheme: Scheme,
    shape: tuple[int, int],
    outer: Array | None,
    dtype: np.dtype,
    groups: Array | None,
) -> QTensor:
    count = -(-shape[1] // scheme.granularity.tile(*shape)[1])
    target = parameters.target[:count].T
    if isinstance(scheme.scale, NestedScale):
        stored = scheme.scale.store(target, None, scheme.element, outer=outer)
    else:
        stored = scheme.scale.store(target, None, scheme.element)
    zero = None
    if scheme.zero_point == "integer":
        zero = packing.pack(parameters.zero[:count].astype(jnp.uint8), scheme.element.bits)
    return QTensor(
        planes=packing.pack(codes, scheme.element.bits),
        stored=stored,
        zero_planes=zero,
        scheme=scheme,
        matrix_shape=shape,
        dtype=dtype,
        groups=groups,
    )
