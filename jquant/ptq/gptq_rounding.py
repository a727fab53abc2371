"""GPTQ's columns one after another, part within part; see gptq.py for what it computes, and for its reference.

On CPU, and where no kernel takes the format, all is XLA's. On a GPU a kernel takes a span of columns
(kernels/gptq_block.py), and what spans leave to later ones are products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jquant.core.division import exact_ratio
from jquant.core.formats import Int as IntElement
from jquant.core.scheme import Scheme
from jquant.kernels import dispatch
from jquant.kernels.error_parts import Errors, Parts, left_side
from jquant.kernels.gptq_block import Block, Kind, Rows, fits, round_block
from jquant.ptq.gptq_columns import Columns, columns_of, within
from jquant.ptq.gptq_levels import divisor
from jquant.ptq.gptq_ranges import Parameters, Plan, choose

_GATHERED = 4  # parts whose columns are gathered from W together: each time most of its memory is passed over
_SPAN = 512  # errors that go into one product; those of longer stretches are summed


class Part(NamedTuple):
    """Columns side by side, in order: what became of them, and 0 where none has been rounded yet."""

    errors: Array | Parts  # [columns, out]: w − q; in parts where a kernel rounds
    codes: Array  # [columns, out] uint8


class State(NamedTuple):
    parameters: Parameters
    loss: Array  # [1, out] Σ (w̃ − q)²·R_ii²


class Problem(NamedTuple):
    """What stays the same while columns are rounded."""

    columns: Columns  # of W in order, as they were, 0 where the input is dead
    copy: Array | None  # of all of them, for kernels
    halves: Array  # `Factor.halves`, of columns in order, as all below
    root: Array
    place: Array  # [schemes, columns], the group of each
    outer: Array | None  # second level of nested scales
    importance: Array  # H_jj, by which ranges are searched; 0 of dead inputs
    settle: Array | None  # [groups, group, group] inverses of R_ki / R_ii inside groups; see `_open_group`
    steps: tuple[Array, Array] | None  # for kernels: scales and zero points that are known beforehand


def shares_inside(halves: Array, size: int) -> Array:
    """R_ki / R_ii, k first, inside so many neighbours: [columns / size, size, size]."""
    count = len(halves) // size
    tiles = halves.reshape(count, size, count, size)[jnp.arange(count), :, jnp.arange(count)]
    return jnp.tril(tiles).swapaxes(1, 2)


class _Done(NamedTuple):
    """What spans leave behind them, in memory that each adds to."""

    errors: list[Errors]  # for each product to come
    codes: Array | int  # [columns, out] in the order of W; or how many columns there are
    state: State


def round_spans(
    problem: Problem, state: State, order: Array, levels: tuple[int, ...], plans: tuple[Plan, ...]
) -> tuple[Array, State]:
    """`round_columns` of all, span after span in the program: each knows how many columns are done before it.

    The left half of them goes first; what it leaves to the right is one product, large while halves are.

    Returns:
        Codes [columns, out] of W's own columns, `order` says which; and the state.
    """
    size, *smaller = levels
    plan = plans[0]
    direct = plan.config.act_order == "static" and in_one_kernel(size, plan)

    def one_span(index: int, moves: list[Rows], done: _Done) -> _Done:
        """`moves` are what is left to it."""
        at, number = index * size, order[index * size : (index + 1) * size]
        if direct:
            block = _block(problem, done.state, [_weight(problem, at, size), *moves], at, number, plans)
            found = round_block(block, _kinds(plans), done.errors, done.codes, interpret=plan.way == "interpret")
            return _Done(found.errors, found.codes, done.state._replace(loss=done.state.loss + found.loss))
        columns = sum((each.taken(size) for each in moves), start=problem.columns(at, size))
        if size == plan.group and plan.config.act_order != "static":
            done = done._replace(state=_open_group(problem, done.state, columns, jnp.int32(at), plan))
        if in_one_kernel(size, plan):
            part, state = _round_block(problem, done.state, columns, at, plan)
        else:
            part, state = round_columns(problem, done.state, columns, at, size, tuple(smaller), plan)
        codes = jnp.zeros((len(order), columns.shape[1]), jnp.uint8) if isinstance(done.codes, int) else done.codes
        errors = [each.added(part.errors) for each in done.errors]
        return _Done(errors, codes.at[number].set(part.codes, unique_indices=True), state)

    def spans(begin: int, count: int, moves: list[Rows], done: _Done) -> _Done:
        if count == 1:
            return one_span(begin, moves, done)
        half = (count + 1) // 2
        middle = begin + half
        done = spans(begin, half, moves, done._replace(errors=[*done.errors, Errors(None, half)]))
        *others, left = done.errors
        assert left.whole is not None
        shares = problem.halves[middle * size : (begin + count) * size, begin * size : middle * size]
        product = jnp.matmul(left_side(shares, size), left.whole, preferred_element_type=jnp.float32)
        moves = [*(Rows(each.whole, each.after + half) for each in moves), Rows(product)]
        return spans(middle, count - half, moves, done._replace(errors=others))

    done = spans(0, len(order) // size, [], _Done([], len(order), state))
    assert not isinstance(done.codes, int)
    return done.codes, done.state


def round_columns(
    problem: Problem,
    state: State,
    here: Array | None,
    start: Array | int,
    length: int,
    levels: tuple[int, ...],
    plan: Plan,
) -> tuple[Part, State]:
    """Rounds `length` columns from `start` on, in parts of levels[0].

    `here` are they, compensated for all before them; None where that is nothing, as all are rounded.
    """
    size, *smaller = levels

    def one_part(inner: Problem, index: Array, carry: tuple[Part, State]) -> tuple[Part, State]:
        done, state = carry
        at = start + index * size
        if here is None:
            columns = inner.columns(at, size)
        else:
            columns = jax.lax.dynamic_slice_in_dim(here, index * size, size, axis=0)
        columns = columns + _compensation(problem, done.errors, start, index * size, size, plan)
        if size == plan.group and plan.config.act_order != "static":
            state = _open_group(inner, state, columns, at, plan)
        if in_one_kernel(size, plan):
            found, state = _round_block(inner, state, columns, at, plan)
        elif smaller:
            found, state = round_columns(inner, state, columns, at, size, tuple(smaller), plan)
        else:
            found, state = _round_column(inner, state, columns, at, plan.scheme)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * size, axis=0)
        return jax.tree.map(put, done, found), state

    shape = (length, state.loss.shape[1])
    by_kernel = any(in_one_kernel(each, plan) for each in levels)
    errors = Parts(*[jnp.zeros(shape, jnp.bfloat16)] * 2) if by_kernel else jnp.zeros(shape, jnp.float32)
    nothing = Part(errors, jnp.zeros(shape, jnp.uint8))
    parts = length // size
    if here is not None:
        return jax.lax.fori_loop(0, parts, partial(one_part, problem), (nothing, state))
    together = divisor(parts, _GATHERED)

    def one_stretch(index: Array, carry: tuple[Part, State]) -> tuple[Part, State]:
        begin = index * together
        own = problem.columns(start + begin * size, together * size)
        inner = problem._replace(columns=within(own, start + begin * size))
        return jax.lax.fori_loop(begin, begin + together, partial(one_part, inner), carry)

    return jax.lax.fori_loop(0, parts // together, one_stretch, (nothing, state))


def in_one_kernel(size: int, plan: Plan) -> bool:
    """Whether so many columns, whose parameters are known, are rounded by a kernel."""
    known = plan.config.act_order == "static" or size <= plan.group
    return plan.way != "jnp" and known and fits(plan.scheme.element, size)


def _weight(problem: Problem, at: Array | int, size: int) -> Rows:
    if problem.copy is not None and isinstance(at, int):
        return Rows(problem.copy, at // size)
    return Rows(problem.columns(at, size))


def _kinds(plans: Sequence[Plan]) -> list[Kind]:
    return [Kind(plan.scheme.element, plan.scheme.zero_point == "integer") for plan in plans]


def _block(
    problem: Problem, state: State, columns: Sequence[Rows], at: Array | int, number: Array, plans: Sequence[Plan]
) -> Block:
    size, rows = len(number), state.loss.shape[1]
    scale, zero = problem.steps or (of_rows(each, rows) for each in state.parameters[1:])
    return Block(
        columns=columns,
        weight=_weight(problem, at, size),
        scale=scale,
        zero=zero if any(kind.has_zero for kind in _kinds(plans)) else None,
        place=jax.lax.dynamic_slice_in_dim(problem.place, at, size, axis=1),
        number=number,
        share=jax.lax.dynamic_slice(problem.halves, (at, at), (size, size)),
        root=jax.lax.dynamic_slice_in_dim(problem.root, at, size),
    )


def _round_block(problem: Problem, state: State, columns: Array, at: Array | int, plan: Plan) -> tuple[Part, State]:
    """In one kernel."""
    size = len(columns)
    block = _block(problem, state, [Rows(columns)], at, jnp.arange(size), [plan])
    found = round_block(block, _kinds([plan]), [Errors(None, 1)], size, interpret=plan.way == "interpret")
    return Part(found.errors[0].parts(size), found.codes), state._replace(loss=state.loss + found.loss)


def _compensation(
    problem: Problem, errors: Array | Parts, start: Array | int, done: Array, size: int, plan: Plan
) -> Array:
    """What `errors` of the columns from `start` on leave to the `size` columns after the `done` first; [size, out].

    The errors of columns not rounded yet are 0, so slices need no exact end: what else they hold, as H, does not count.
    """
    length, rows = jax.tree.leaves(errors)[0].shape

    def of_span(span: int, begin: Array | int) -> Array:
        shares = jax.lax.dynamic_slice(problem.halves, (start + done, start + begin), (size, span))
        left = jax.tree.map(lambda each: jax.lax.dynamic_slice(each, (begin, 0), (span, rows)), errors)
        return _product(shares, left, plan)

    span = divisor(length // size, max(1, _SPAN // size)) * size
    if span == length or plan.way != "jnp":  # a loop of unknown length would wait for the host at every turn
        return of_span(length, 0)
    return jax.lax.fori_loop(
        0,
        (done + span - 1) // span,
        lambda index, sum_: sum_ + of_span(span, index * span),
        jnp.zeros((size, rows), jnp.float32),
    )


def _product(shares: Array, errors: Array | Parts, plan: Plan) -> Array:
    """On a GPU three products of bfloat16 parts (kernels/error_parts.py), which take less time than TF32's."""
    if isinstance(errors, Parts):
        return Parts.of(shares).times(errors)
    parts = plan.way == "kernel" and dispatch.on_cuda()
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3 if parts else jax.lax.Precision.HIGHEST
    return jnp.matmul(shares, errors, precision=precision)


def _round_column(problem: Problem, state: State, column: Array, at: Array, scheme: Scheme) -> tuple[Part, State]:
    rows = column.shape[1]
    scale, zero = (
        of_rows(jax.lax.dynamic_slice_in_dim(each, problem.place[0, at], 1, axis=0), rows)
        for each in state.parameters[1:]
    )
    code, value = _round(column, scale, zero, scheme)
    lost = (column - value) * problem.root[at]
    part = Part(problem.columns(at, 1) - value, code)
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


def of_rows(per_tile: Array, rows: int) -> Array:
    """[columns, row tiles] to [columns, out]."""
    tile = -(-rows // per_tile.shape[1])
    return per_tile if tile == 1 else jnp.repeat(per_tile, tile, axis=1)[:, :rows]


def _open_group(problem: Problem, state: State, columns: Array, at: Array, plan: Plan) -> State:
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
