"""GPTQ: columns are rounded one after another, and what one loses the later ones make up for.

    U = chol(H⁻¹), upper        q_i = round(w_i),   e_i = (w_i − q_i) / U_ii,   W[:, i:] −= e_i ⊗ U[i, i:]

A group's scales come from its columns as compensated so far, when its first column is reached; with act-order, which
takes the columns with the largest H_ii first, from the original weights, so that groups stay neighbours on disk.

Reference: Frantar et al., 2210.17323, and SPEC 4. Departures: U comes from one factorization and one triangular inverse
(of H in reversed order) instead of three; the last group may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jquant.calib.gram import Gram
from jquant.core import packing
from jquant.core.division import exact_ratio
from jquant.core.errors import InputError
from jquant.core.formats import Int as IntElement
from jquant.core.qtensor import Parameters, QTensor, choose_parameters
from jquant.core.scales import DoubleQuantizedScale, FloatScale, StoredScale, outer_scale
from jquant.core.scheme import Scheme
from jquant.ptq.solver import Solution

_TRIES = 6  # dampings that are tried, each ten times the last


@dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """How GPTQ runs."""

    damping: float = 0.01  # of the mean diagonal of H, added to it
    act_order: Literal["none", "static"] = "none"
    block: int = 128  # columns after which the rest of W is compensated in one product

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"GPTQ damping {self.damping}: it must be positive, as 0.01")
        if self.block < 1:
            raise InputError(f"GPTQ block {self.block}: it must be at least 1 column")


class Factor(NamedTuple):
    """Of one Gram matrix and one order of its columns; serves every scheme and every layer that reads the input."""

    upper: Float[Array, "*batch in in"]  # U, columns in the order of `order`
    order: Int[Array, "*batch in"]
    dead: Bool[Array, "*batch in"]  # inputs that were always 0, by original column
    damping: Float[Array, "*batch"]  # λ that was added, as a multiple of the mean diagonal
    fallback: Bool[Array, "*batch"]  # no damping gave a factor: U is the identity, and rounding is to nearest


def solve(
    w: Float[Array, "out in"], gram: Gram | None, scheme: Scheme, *, config: GPTQConfig | None = None
) -> Solution:
    """Quantizes one matrix.

    Args:
        w: any float dtype; computed in float32.
        gram: of the layer's input (calib/gram.py).
        scheme: integers, floats or codebooks with any granularity and scale format.
        config: by default plain GPTQ.

    Raises:
        InputError: there is no Gram matrix, the scheme is a block type of ggml, a group does not fit, or shapes
            disagree.
    """
    config = GPTQConfig() if config is None else config
    if gram is None:
        raise InputError("GPTQ without a Gram matrix: it needs calibration data; give it, or use rtn or hqq")
    return solve_with(w, factorize(gram, config=config), scheme, config=config)


def factorize(gram: Gram, *, config: GPTQConfig) -> Factor:
    """U of H + λI; λ is raised tenfold until the factor is finite (SPEC 4)."""
    return _factorize(gram.matrix, config)


def solve_with(w: Float[Array, "out in"], factor: Factor, scheme: Scheme, *, config: GPTQConfig) -> Solution:
    """`solve` with a factor made before. Rows are independent; vmap over both for a stack of layers."""
    if scheme.block is not None:
        raise InputError(f"GPTQ to {scheme}: a block type of ggml searches its own scales; use it with rtn")
    if w.shape[-1] != factor.upper.shape[-1]:
        raise InputError(f"weight of {w.shape[-1]} inputs, Gram matrix of {factor.upper.shape[-1]}: they must agree")
    scheme.granularity.tile(*w.shape)
    return _solve(w, factor, scheme, config)


@partial(jax.jit, static_argnames="config")
def _factorize(matrix: Array, config: GPTQConfig) -> Factor:
    diagonal = jnp.diagonal(matrix)
    dead = diagonal == 0
    order = jnp.argsort(-diagonal) if config.act_order == "static" else jnp.arange(len(diagonal))
    matrix = (matrix + jnp.diag(dead.astype(jnp.float32)))[order][:, order]
    # chol(H⁻¹) upper = P·chol(P·H·P)⁻¹·P with P the reversal: no inverse of H is formed.
    turned, mean = matrix[::-1, ::-1], jnp.mean(jnp.diagonal(matrix))
    identity = jnp.eye(len(order), dtype=jnp.float32)

    def attempt(damping: Array) -> Array:
        lower = jnp.linalg.cholesky(turned + damping * mean * identity)
        return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1]

    def failed(state: tuple[Array, Array, Array]) -> Array:
        return (state[0] < _TRIES) & ~jnp.all(jnp.isfinite(state[2]))

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        return state[0] + 1, state[1] * 10, attempt(state[1] * 10)

    first = jnp.float32(config.damping)
    _, damping, upper = jax.lax.while_loop(failed, again, (jnp.int32(1), first, attempt(first)))
    fallback = ~jnp.all(jnp.isfinite(upper))
    return Factor(jnp.where(fallback, identity, upper), order, dead, damping, fallback)


class _Scales(NamedTuple):
    """Parameters of all groups, filled in as groups are reached, and of every column for the rounding."""

    stored: Array  # [row tiles, groups] in the scheme's dtype
    target: Array  # [row tiles, groups] float32, before storing
    zero: Array  # [row tiles, groups] float32
    column_scale: Array  # [row tiles, columns in order]
    column_zero: Array


class _State(NamedTuple):
    weight: Array  # [out, columns in order], compensated so far
    codes: Array  # uint8
    scales: _Scales
    loss: Array


@partial(jax.jit, static_argnames=("scheme", "config"))
def _solve(w: Array, factor: Factor, scheme: Scheme, config: GPTQConfig) -> Solution:
    rows, columns = w.shape
    group = scheme.granularity.tile(rows, columns)[1]
    block, chunk = _blocking(group, config.block)
    width = -(-columns // chunk) * chunk
    weight = jnp.where(factor.dead, 0.0, w.astype(jnp.float32))
    outer = outer_scale(scheme.scale, weight, scheme.element)
    padded = jnp.pad(weight, ((0, 0), (0, width - columns)))
    upper = jnp.pad(factor.upper, (0, width - columns)) + jnp.diag((jnp.arange(width) >= columns).astype(jnp.float32))
    order = jnp.concatenate([factor.order, jnp.arange(columns, width)])
    state = _State(
        weight=padded[:, order],
        codes=jnp.zeros((rows, width), jnp.uint8),
        scales=_empty_scales(scheme, rows, width, group),
        loss=jnp.float32(0),
    )
    if config.act_order == "static":
        state = state._replace(scales=_scales_of_original(padded, order, group, scheme, outer, state.scales))

    def one_chunk(state: _State, start: Array) -> tuple[_State, None]:
        if config.act_order == "none" and group > block:
            state = _open_group(state, start, group, scheme, outer)

        def one_block(index: Array, state: _State) -> _State:
            return _round_block(state, start + index * block, upper, block, group, scheme, config, outer)

        return jax.lax.fori_loop(0, chunk // block, one_block, state), None

    state, _ = jax.lax.scan(one_chunk, state, jnp.arange(0, width, chunk))
    codes = jnp.zeros_like(state.codes).at[:, order].set(state.codes)[:, :columns]
    q = _assemble(codes, state.scales, scheme, (rows, columns), outer, np.dtype(w.dtype))
    return Solution(q, state.loss, factor.damping, factor.fallback)


def _blocking(group: int, block: int) -> tuple[int, int]:
    """Columns of a block and of a chunk: a chunk holds whole groups, and no group begins inside a block that began in
    another group. So a group's scales never come from columns that wait for a block's compensation."""
    if group <= block:
        block = block // group * group
        return block, block
    divisors = [size for size in range(1, block + 1) if group % size == 0]
    best = divisors[-1]
    return (best, group) if best >= block // 4 else (group, group)


def _round_block(
    state: _State,
    start: Array,
    upper: Array,
    block: int,
    group: int,
    scheme: Scheme,
    config: GPTQConfig,
    outer: Array | None,
) -> _State:
    """Rounds `block` columns from `start` on, then compensates all that follow in one product."""
    rows, width = state.weight.shape
    own = jax.lax.dynamic_slice(upper, (start, 0), (block, width))
    square = jax.lax.dynamic_slice(own, (0, start), (block, block))
    errors = jnp.zeros((rows, block), jnp.float32)
    opens = config.act_order == "none" and group <= block

    def one_column(index: Array, carry: tuple[Array, Array, _State]) -> tuple[Array, Array, _State]:
        here, errors, state = carry
        column = jax.lax.dynamic_slice_in_dim(here, index, 1, axis=1)
        scale, zero = _of_column(state.scales, start + index, rows)
        code, value = _round(column, scale, zero, scheme)
        pivot = square[index, index]
        error = (column - value) / pivot
        here = here - error * jax.lax.dynamic_slice_in_dim(square, index, 1, axis=0)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, error, index, axis=1)
        codes = jax.lax.dynamic_update_slice_in_dim(state.codes, code, start + index, axis=1)
        return here, errors, state._replace(codes=codes)

    def one_group(index: Array, carry: tuple[Array, Array, _State]) -> tuple[Array, Array, _State]:
        here, errors, state = carry
        columns = jax.lax.dynamic_slice_in_dim(here, index * group, group, axis=1)
        state = _set_group(state, columns, start + index * group, group, scheme, outer)
        return jax.lax.fori_loop(index * group, (index + 1) * group, one_column, (here, errors, state))

    here = jax.lax.dynamic_slice_in_dim(state.weight, start, block, axis=1)
    if opens:
        _, errors, state = jax.lax.fori_loop(0, block // group, one_group, (here, errors, state))
    else:
        _, errors, state = jax.lax.fori_loop(0, block, one_column, (here, errors, state))
    later = jnp.where(jnp.arange(width) >= start + block, own, 0.0)
    compensation = jnp.matmul(errors, later, precision=jax.lax.Precision.HIGHEST)
    return state._replace(weight=state.weight - compensation, loss=state.loss + jnp.sum(errors * errors) / 2)


def _round(column: Array, scale: Array, zero: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Codes and values of one column, [out, 1] each."""
    ratio = exact_ratio(column, scale)
    if scheme.zero_point == "integer":
        assert isinstance(scheme.element, IntElement)
        code = scheme.element.encode(ratio, zero)
        return code, scheme.element.decode(code, zero) * scale
    code = scheme.element.encode(ratio)
    return code, scheme.element.decode(code) * scale


def _of_column(scales: _Scales, column: Array, rows: int) -> tuple[Array, Array]:
    """Scale and zero point of every row in one column, [out, 1]."""
    tile = -(-rows // scales.column_scale.shape[0])
    both = (scales.column_scale, scales.column_zero)
    picked = (jax.lax.dynamic_slice_in_dim(each, column, 1, axis=1) for each in both)
    scale, zero = (jnp.repeat(each, tile, axis=0)[:rows] for each in picked)
    return scale, zero


def _open_group(state: _State, start: Array, group: int, scheme: Scheme, outer: Array | None) -> _State:
    """Scales of a group wider than a block, from the compensated weights."""
    columns = jax.lax.dynamic_slice_in_dim(state.weight, start, group, axis=1)
    return _set_group(state, columns, start, group, scheme, outer)


def _set_group(state: _State, columns: Array, start: Array, group: int, scheme: Scheme, outer: Array | None) -> _State:
    """Chooses the parameters of one group of columns and writes them where the rounding looks."""
    found = _parameters(columns, scheme, group, outer)
    zero = jnp.zeros_like(found.scale) if found.zero_point is None else found.zero_point
    target = _target(columns, scheme, group, found)
    scales, index = state.scales, start // group

    def put(whole: Array, part: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), at, axis=1)

    def wide(part: Array) -> Array:
        return jnp.broadcast_to(part, (part.shape[0], group))

    scales = _Scales(
        stored=put(scales.stored, found.stored.scale, index),
        target=put(scales.target, target, index),
        zero=put(scales.zero, zero, index),
        column_scale=put(scales.column_scale, wide(found.scale), start),
        column_zero=put(scales.column_zero, wide(zero), start),
    )
    return state._replace(scales=scales)


def _scales_of_original(
    padded: Array, order: Array, group: int, scheme: Scheme, outer: Array | None, empty: _Scales
) -> _Scales:
    """All groups from the original weights; columns find theirs by their original place."""
    found = _parameters(padded, scheme, group, outer)
    zero = jnp.zeros_like(found.scale) if found.zero_point is None else found.zero_point
    place = order // group
    return _Scales(
        stored=found.stored.scale.astype(empty.stored.dtype),
        target=_target(padded, scheme, group, found),
        zero=zero,
        column_scale=found.scale[:, place],
        column_zero=zero[:, place],
    )


def _parameters(columns: Array, scheme: Scheme, group: int, outer: Array | None) -> Parameters:
    """[row tiles, groups] of whole groups of columns. Doubly quantized scales are quantized at the end, all at once."""
    tiles = _tiles(columns, scheme, group)
    return choose_parameters(tiles, _in_the_loop(scheme), outer=outer)


def _tiles(columns: Array, scheme: Scheme, group: int) -> Array:
    rows = columns.shape[0]
    tile_rows = scheme.granularity.tile(rows, group)[0]
    short = -rows % tile_rows
    columns = jnp.pad(columns, ((0, short), (0, 0)))
    return columns.reshape(-1, tile_rows, columns.shape[1] // group, group)


def _target(columns: Array, scheme: Scheme, group: int, found: Parameters) -> Array:
    """Scales before storing; 0 for a group of zeros, as where there is no data to look at."""
    some = jnp.any(_tiles(columns, scheme, group) != 0, axis=(-3, -1))
    return jnp.where(some, found.scale, 0.0)


def _in_the_loop(scheme: Scheme) -> Scheme:
    if not isinstance(scheme.scale, DoubleQuantizedScale):
        return scheme
    return Scheme(element=scheme.element, granularity=scheme.granularity, scale=FloatScale())


def _empty_scales(scheme: Scheme, rows: int, width: int, group: int) -> _Scales:
    tile_rows = scheme.granularity.tile(rows, group)[0]
    shape = (-(-rows // tile_rows), width // group)
    tiles = jax.ShapeDtypeStruct((*shape[:1], tile_rows, 1, group), jnp.float32)
    stored = jax.eval_shape(partial(choose_parameters, scheme=_in_the_loop(scheme)), tiles).stored
    ones = jnp.ones((shape[0], width), jnp.float32)
    return _Scales(
        stored=jnp.zeros(shape, stored.scale.dtype),
        target=jnp.ones(shape, jnp.float32),
        zero=jnp.zeros(shape, jnp.float32),
        column_scale=ones,
        column_zero=jnp.zeros_like(ones),
    )


def _assemble(
    codes: Array, scales: _Scales, scheme: Scheme, shape: tuple[int, int], outer: Array | None, dtype: np.dtype
) -> QTensor:
    groups = -(-shape[1] // scheme.granularity.tile(*shape)[1])
    if isinstance(scheme.scale, DoubleQuantizedScale):
        stored = scheme.scale.store(scales.target[:, :groups], None, scheme.element)
    else:
        stored = StoredScale(scales.stored[:, :groups], scale2=outer)
    zero = None
    if scheme.zero_point == "integer":
        zero = packing.pack(scales.zero[:, :groups].astype(jnp.uint8).swapaxes(-1, -2), scheme.element.bits)
    return QTensor(
        planes=packing.pack(codes, scheme.element.bits),
        stored=stored,
        zero_planes=zero,
        scheme=scheme,
        matrix_shape=shape,
        dtype=dtype,
    )
