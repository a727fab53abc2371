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

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jquant.calib.gram import Gram
from jquant.core import packing
from jquant.core.division import exact_ratio
from jquant.core.errors import InputError
from jquant.core.formats import Int as IntElement
from jquant.core.qtensor import QTensor
from jquant.core.scales import NestedScale, outer_scale
from jquant.core.scheme import Scheme
from jquant.kernels import dispatch
from jquant.kernels.gptq_block import Block, fits, round_block
from jquant.ptq.cholesky import inverse_upper
from jquant.ptq.gptq_columns import Columns, alive, columns_of, ordered, within
from jquant.ptq.gptq_factor import Factor, GPTQConfig, factorize, traced_factorization
from jquant.ptq.gptq_levels import divisor, levels_of, padded_group
from jquant.ptq.gptq_ranges import Parameters, Plan, choose
from jquant.ptq.solver import Solution

_GATHERED = 4  # parts whose columns are gathered from W together: each time most of its memory is passed over
_SPAN = 512  # errors that go into one product; those of longer stretches are summed


def solve(
    w: Float[Array, "out in"], gram: Gram | None, scheme: Scheme, *, config: GPTQConfig | None = None
) -> Solution:
    """Quantizes one matrix.

    Args:
        w: any float dtype; computed in float32.
        gram: of the layer's input (calib/gram.py).
        scheme: integers, floats or codebooks with any granularity and scale format.
        config: by default static act-order and searched ranges; plain GPTQ is
            `GPTQConfig(act_order="none", range="minmax")`.

    Raises:
        InputError: there is no Gram matrix, the scheme is a block type of ggml, a group does not fit, or shapes
            disagree.
    """
    config = GPTQConfig() if config is None else config
    if gram is None:
        raise InputError("GPTQ without a Gram matrix: it needs calibration data; give it, or use rtn or hqq")
    return solve_with(w, factorize(gram, config=config), scheme, config=config)


def solve_with(w: Float[Array, "out in"], factor: Factor, scheme: Scheme, *, config: GPTQConfig) -> Solution:
    """`solve` with a factor made before. Rows are independent; vmap over both for a stack of layers."""
    if scheme.block is not None:
        raise InputError(f"GPTQ to {scheme}: a block type of ggml searches its own scales; use it with rtn")
    if w.shape[-1] != factor.root.shape[-1]:
        raise InputError(f"weight of {w.shape[-1]} inputs, Gram matrix of {factor.root.shape[-1]}: they must agree")
    scheme.granularity.tile(*w.shape)
    return _chosen(w)(w, factor, scheme, config, dispatch.way())


def programs(w: Array, gram: Gram, scheme: Scheme, config: GPTQConfig) -> list[Any]:
    """What `factorize_in_place` and `solve_with` compile for such operands, traced; nothing is computed."""
    factorizing = traced_factorization(gram, config, in_place=True)
    return [factorizing, _chosen(w).trace(w, factorizing.out_info, scheme, config, dispatch.way())]


class _Part(NamedTuple):
    """Columns side by side, in order: what became of them, and 0 where none has been rounded yet."""

    errors: Array  # [columns, out]: w − q
    codes: Array  # [columns, out] uint8


class _State(NamedTuple):
    parameters: Parameters
    loss: Array  # [1, out] Σ (w̃ − q)²·R_ii²


class _Problem(NamedTuple):
    """What stays the same while columns are rounded."""

    columns: Columns  # of W in order, as they were, 0 where the input is dead
    halves: Array  # `Factor.halves`, of columns in order, as all below
    root: Array
    place: Array  # the group of each column
    outer: Array | None  # second level of nested scales
    importance: Array  # H_jj, by which ranges are searched; 0 of dead inputs
    settle: Array | None  # [groups, group, group] inverses of R_ki / R_ii inside groups; see `_open_group`


def _solution(w: Array, factor: Factor, scheme: Scheme, config: GPTQConfig, way: dispatch.Way) -> Solution:
    rows, columns = w.shape
    group = padded_group(scheme.granularity.tile(rows, columns)[1], columns, config.block)
    levels = levels_of(group, columns, config, way)
    width = -(-columns // levels[0]) * levels[0]
    order = jnp.concatenate([factor.order, jnp.arange(columns, width)])
    halves = factor.halves
    if width > columns:  # else it would be copied for nothing
        halves = jnp.pad(halves, (0, width - columns)) + jnp.diag((jnp.arange(width) >= columns) * jnp.float32(1))
    importance = jnp.pad(factor.diagonal, (0, width - columns))[order]
    plan = Plan(scheme, group, config, way)
    problem = _Problem(
        columns=ordered(w, order, importance, turned=way != "jnp"),
        halves=halves,
        root=jnp.pad(factor.root, (0, width - columns)),
        place=(order if config.act_order == "static" else jnp.arange(width)) // group,
        outer=outer_scale(scheme.scale, alive(w.astype(jnp.float32).T, factor.diagonal), scheme.element),
        importance=importance,
        settle=None if config.act_order == "static" or group == width else inverse_upper(_shares(halves, group)),
    )
    tile_rows = scheme.granularity.tile(rows, columns)[0]
    if config.act_order == "static":
        whole = jnp.pad(w, ((0, 0), (0, -columns % group)))
        seen = jnp.pad(factor.diagonal, (0, -columns % group))
        parameters = choose(columns_of(whole, axis=1), seen, group, problem.outer, plan)
    else:
        ones = jnp.ones((-(-width // group), -(-rows // tile_rows)), jnp.float32)
        parameters = Parameters(ones, ones, jnp.zeros_like(ones))
    state = _State(parameters, jnp.zeros((1, rows), jnp.float32))
    if way == "jnp":
        part, state = _round_columns(problem, state, None, 0, width, levels, plan)
    else:
        part, state = _round_spans(problem, state, width, levels, plan)
    codes = part.codes.at[jnp.argsort(order)].get(mode="promise_in_bounds")
    if way == "kernel":  # in one kernel XLA would gather, turn and pack single bytes from far apart
        codes = jax.lax.optimization_barrier(jax.lax.optimization_barrier(codes).T).T
    codes = codes.T[:, :columns]
    groups = None
    if config.act_order == "dynamic" and group < columns:
        groups = jnp.zeros(columns, jnp.int32).at[factor.order].set(problem.place[:columns])
    q = _assemble(codes, state.parameters, scheme, (rows, columns), problem.outer, np.dtype(w.dtype), groups)
    return Solution(q, jnp.sum(state.loss) / 2, factor.damping, factor.fallback)


_solve = jax.jit(_solution, static_argnames=("scheme", "config", "way"))
_solve_soon = jax.jit(
    _solution, static_argnames=("scheme", "config", "way"), compiler_options=dispatch.WITHOUT_TRITON_GEMM
)


def _chosen(w: Any) -> Any:
    """The program for these operands: under a trace it becomes a part of another, which has no options of its own."""
    soon = dispatch.compiles_quickly() and dispatch.on_cuda() and not isinstance(w, Tracer)
    return _solve_soon if soon else _solve


def _shares(halves: Array, size: int) -> Array:
    """R_ki / R_ii, k first, inside so many neighbours: [columns / size, size, size]."""
    count = len(halves) // size
    tiles = halves.reshape(count, size, count, size)[jnp.arange(count), :, jnp.arange(count)]
    return jnp.tril(tiles).swapaxes(1, 2)


def _round_spans(
    problem: _Problem, state: _State, width: int, levels: tuple[int, ...], plan: Plan
) -> tuple[_Part, _State]:
    """`_round_columns` of all, part after part in the program: each knows how many columns are done before it."""
    size, *smaller = levels
    parts: list[_Part] = []
    for at in range(0, width, size):
        columns = problem.columns(jnp.int32(at), size)
        if parts:
            lost = jnp.concatenate([part.errors for part in parts])
            columns += jnp.matmul(problem.halves[at : at + size, :at], lost, precision=_precision(plan))
        if size == plan.group and plan.config.act_order != "static":
            state = _open_group(problem, state, columns, jnp.int32(at), plan)
        part, state = _round_columns(problem, state, columns, at, size, tuple(smaller), plan)
        parts.append(part)
    return _Part(*(jnp.concatenate(each) for each in zip(*parts, strict=True))), state


def _round_columns(
    problem: _Problem,
    state: _State,
    here: Array | None,
    start: Array | int,
    length: int,
    levels: tuple[int, ...],
    plan: Plan,
) -> tuple[_Part, _State]:
    """Rounds `length` columns from `start` on, in parts of levels[0].

    `here` are they, compensated for all before them; None where that is nothing, as all are rounded.
    """
    size, *smaller = levels

    def one_part(inner: _Problem, index: Array, carry: tuple[_Part, _State]) -> tuple[_Part, _State]:
        done, state = carry
        at = start + index * size
        if here is None:
            columns = inner.columns(at, size)
        else:
            columns = jax.lax.dynamic_slice_in_dim(here, index * size, size, axis=0)
        columns = columns + _compensation(problem, done.errors, start, index * size, size, plan)
        if size == plan.group and plan.config.act_order != "static":
            state = _open_group(inner, state, columns, at, plan)
        if _in_one_kernel(size, plan):
            found, state = _round_block(inner, state, columns, at, plan)
        elif smaller:
            found, state = _round_columns(inner, state, columns, at, size, tuple(smaller), plan)
        else:
            found, state = _round_column(inner, state, columns, at, plan.scheme)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * size, axis=0)
        return _Part(put(done.errors, found.errors), put(done.codes, found.codes)), state

    shape = (length, state.loss.shape[1])
    nothing = _Part(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.uint8))
    parts = length // size
    if here is not None:
        return jax.lax.fori_loop(0, parts, partial(one_part, problem), (nothing, state))
    together = divisor(parts, _GATHERED)

    def one_stretch(index: Array, carry: tuple[_Part, _State]) -> tuple[_Part, _State]:
        begin = index * together
        own = problem.columns(start + begin * size, together * size)
        inner = problem._replace(columns=within(own, start + begin * size))
        return jax.lax.fori_loop(begin, begin + together, partial(one_part, inner), carry)

    return jax.lax.fori_loop(0, parts // together, one_stretch, (nothing, state))


def _in_one_kernel(size: int, plan: Plan) -> bool:
    """Whether so many columns, whose parameters are known, are rounded by a kernel."""
    known = plan.config.act_order == "static" or size <= plan.group
    return plan.way != "jnp" and known and size <= plan.config.block and fits(plan.scheme.element, size)


def _round_block(problem: _Problem, state: _State, columns: Array, at: Array, plan: Plan) -> tuple[_Part, _State]:
    size, rows = columns.shape
    places = jax.lax.dynamic_slice_in_dim(problem.place, at, size)
    scale, zero = (_of_rows(each[places], rows) for each in state.parameters[1:])
    weight = problem.columns(at, size)
    block = Block(
        columns=columns,
        weight=weight,
        scale=scale,
        zero=zero if plan.scheme.zero_point == "integer" else None,
        share=_shares(jax.lax.dynamic_slice(problem.halves, (at, at), (size, size)), size)[0],
        root=jax.lax.dynamic_slice_in_dim(problem.root, at, size),
    )
    found = round_block(block, plan.scheme.element, interpret=plan.way == "interpret")
    return _Part(found.errors, found.codes), state._replace(loss=state.loss + found.loss)


def _compensation(problem: _Problem, errors: Array, start: Array | int, done: Array, size: int, plan: Plan) -> Array:
    """What `errors` of the columns from `start` on leave to the `size` columns after the `done` first; [size, out].

    The errors of columns not rounded yet are 0, so slices need no exact end: what else they hold, as H, does not count.
    """
    length, rows = errors.shape

    def of_span(span: int, begin: Array | int) -> Array:
        shares = jax.lax.dynamic_slice(problem.halves, (start + done, start + begin), (size, span))
        left = jax.lax.dynamic_slice(errors, (begin, 0), (span, rows))
        return jnp.matmul(shares, left, precision=_precision(plan))

    span = divisor(length // size, max(1, _SPAN // size)) * size
    if span == length or plan.way != "jnp":  # a loop of unknown length would wait for the host at every turn
        return of_span(length, 0)
    return jax.lax.fori_loop(
        0,
        (done + span - 1) // span,
        lambda index, sum_: sum_ + of_span(span, index * span),
        jnp.zeros((size, rows), jnp.float32),
    )


def _precision(plan: Plan) -> jax.lax.PrecisionLike:
    """On a GPU three products of bfloat16 parts: their sums are 3e-5 off (2e-6 with TF32), a solution's error is the
    same to six digits, and it takes four fifths of the time."""
    return (
        jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
        if plan.way == "kernel" and dispatch.on_cuda()
        else jax.lax.Precision.HIGHEST
    )


def _round_column(problem: _Problem, state: _State, column: Array, at: Array, scheme: Scheme) -> tuple[_Part, _State]:
    rows = column.shape[1]
    scale, zero = (
        _of_rows(jax.lax.dynamic_slice_in_dim(each, problem.place[at], 1, axis=0), rows)
        for each in state.parameters[1:]
    )
    code, value = _round(column, scale, zero, scheme)
    lost = (column - value) * problem.root[at]
    part = _Part(problem.columns(at, 1) - value, code)
    return part, state._replace(loss=state.loss + lost * lost)


def _round(column: Array, scale: Array, zero: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Codes and values of one column, [1, out] each."""
    ratio = exact_ratio(column, scale)
    if scheme.zero_point == "integer":
        assert isinstance(scheme.element, IntElement)
        code = scheme.element.encode(ratio, zero)
        return code, scheme.element.decode(code, zero) * scale
    code = scheme.element.encode(ratio)
    return code, scheme.element.decode(code) * scale


def _of_rows(per_tile: Array, rows: int) -> Array:
    """[columns, row tiles] to [columns, out]."""
    tile = -(-rows // per_tile.shape[1])
    return per_tile if tile == 1 else jnp.repeat(per_tile, tile, axis=1)[:, :rows]


def _open_group(problem: _Problem, state: _State, columns: Array, at: Array, plan: Plan) -> _State:
    """Chooses the parameters of the group that begins at `at`; `columns` are compensated for all before it.

    Each of them for itself, that is: w_j + c_j, c_j = Σ_{k<at} (w_k − q_k)·R_kj / R_jj. The weights that are best while
    nothing in the group is rounded are w + s, and moved by s they leave something to each other as errors do: s solves
    s_j + Σ_{at≤k<j} s_k·R_kj / R_jj = c_j.
    """
    size, index = len(columns), at // len(columns)
    importance = jax.lax.dynamic_slice_in_dim(problem.importance, at, size)
    if problem.settle is not None:
        weight = problem.columns(at, size)
        moves = jnp.matmul(problem.settle[index].T, columns - weight, precision=jax.lax.Precision.HIGHEST)
        columns = weight + moves
    found = choose(columns_of(columns, axis=0), importance, size, problem.outer, plan)
    parameters = (
        jax.lax.dynamic_update_slice_in_dim(whole, part, index, axis=0)
        for whole, part in zip(state.parameters, found, strict=True)
    )
    return state._replace(parameters=Parameters(*parameters))


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
