"""x · dequantize(Q)ᵀ for few rows of x, from the packed codes: what a matrix takes to read is what the product takes.

    y = Σ_groups s_g · Σ_{k in g} x_k·(code_k − zero)

A program takes `rows` of the weight and walks along the inputs. A byte holds 8/bits neighbours, so it is met by as many
slices of x, each every (8/bits)-th input of it: nothing is put back in order. Levels are exact in bfloat16 (but for
codebooks, rounded once); products are summed in float32, a group at a time where groups are wide, and then scaled.

Reference: Frantar et al., MARLIN, 2408.11743, for what bounds such kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jquant.core.formats import Element, Int
from jquant.core.qtensor import QTensor
from jquant.kernels.levels import known, levels
from jquant.kernels.options import triton_options

_SLOTS = 16  # rows of x are padded to at least so many: what a tensor core takes


_LANES = 1  # rows of x that are multiplied without tensor cores; at 3 it takes twice as long as with them


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut."""

    rows: int  # of the weight, a program
    inputs: int  # a step
    splits: int  # programs that share the inputs of a row
    warps: int
    scale_first: bool = False  # weights are scaled and rounded, then multiplied; else products of a group are scaled


def tiling_of(batch: int, q: QTensor) -> Tiling:
    """What was fastest on an H100, cut smaller where the inputs do not divide by it."""
    if batch <= _LANES:
        found = Tiling(rows=16, inputs=256 * 8 // q.scheme.element.bits, splits=2, warps=4)
    elif batch < 64:
        found = Tiling(rows=64, inputs=128, splits=4, warps=4)
    else:
        found = Tiling(rows=64, inputs=128, splits=2, warps=4, scale_first=True)
    while q.matrix_shape[1] % (found.inputs * found.splits):
        smaller = {"splits": found.splits // 2} if found.splits > 1 else {"inputs": found.inputs // 2}
        found = replace(found, **smaller)
    return found


def fits(q: QTensor) -> bool:
    """Whether the kernel reads such a weight: one plane of codes, groups of neighbours in a row."""
    if q.scheme.block is not None or q.groups is not None or q.ndim != 2 or not known(q.scheme.element):
        return False
    tile_rows, group = q.scheme.tile(*q.matrix_shape)
    rows, columns = q.matrix_shape
    # A step lies in one group, or holds whole groups: both are powers of two, or there is one group.
    whole = group == columns or (group >= 16 and group & (group - 1) == 0)
    return tile_rows == 1 and rows % 64 == 0 and columns % 256 == 0 and whole


@partial(jax.jit, static_argnames=("tiling", "interpret"))
def packed_matmul(
    x: Float[Array, "batch in"], q: QTensor, *, tiling: Tiling | None = None, interpret: bool = False
) -> Float32[Array, "batch out"]:
    """x · dequantize(q)ᵀ.

    Args:
        x: rounded to bfloat16.
        q: `fits(q)` must hold.
        tiling: by default what was fastest on an H100.
        interpret: run the kernel's operations one by one, on any platform.

    Jitted, so that a program's equal products are lowered once.
    """
    from jax.experimental import pallas as pl

    tiling = tiling_of(len(x), q) if tiling is None else tiling
    out, columns = q.matrix_shape
    element, group = q.scheme.element, q.scheme.tile(*q.matrix_shape)[1]
    neighbours = 8 // element.bits
    batch = len(x)
    few = batch <= _LANES
    slots = batch if few else max(_SLOTS, 1 << (batch - 1).bit_length())
    rows = jnp.pad(x.astype(jnp.bfloat16), ((0, slots - batch), (0, 0)))
    operands = [q.planes[0], q.scales()]
    zero = q.zero_points()
    if zero is not None:
        assert isinstance(element, Int), "others have no zero point"
        operands.append(zero.astype(jnp.float32) - element.offset)
    specs = [pl.BlockSpec((tiling.rows, each.shape[1]), lambda i, j: (i, 0)) for each in operands]
    if few:
        shared = [jnp.moveaxis(rows.reshape(slots, columns // neighbours, neighbours), -1, 1).astype(jnp.float32)]
    else:
        shared = [rows.T.reshape(columns // neighbours, neighbours, slots).swapaxes(0, 1)]
        if zero is not None:
            shared.append(jnp.sum(rows.T.reshape(-1, tiling.inputs, slots), axis=1, dtype=jnp.float32))
    specs += [pl.BlockSpec(each.shape, lambda i, j, ndim=each.ndim: (0,) * ndim) for each in shared]
    kernel = _with_lanes if few else _with_tensor_cores
    found = pl.pallas_call(
        partial(kernel, _Job(element, group, zero is not None, tiling, columns, not interpret)),
        grid=(out // tiling.rows, tiling.splits),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, slots, tiling.rows), lambda i, j: (j, 0, i)),
        out_shape=jax.ShapeDtypeStruct((tiling.splits, slots, out), jnp.float32),
        interpret=interpret,
        name="packed_matmul",
        **triton_options(tiling.warps, interpret),
    )(*operands, *shared)
    return jnp.sum(found[:, :batch], axis=0)


class _Job(NamedTuple):
    """What is static in a kernel."""

    element: Element
    group: int
    has_zero: bool
    tiling: Tiling
    columns: int
    assembly: bool

    @property
    def width(self) -> int:
        """Bytes of a row in a step."""
        return self.tiling.inputs * self.element.bits // 8

    @property
    def groups(self) -> int:
        """Of a row, in a step."""
        return max(1, self.tiling.inputs // self.group)

    @property
    def steps(self) -> int:
        """Of a program."""
        return self.columns // self.tiling.inputs // self.tiling.splits


def _with_lanes(job: _Job, codes: Any, *refs: Any) -> None:
    """Every byte's place has sums of its own, which are added up in the end: nothing moves between threads."""
    from jax.experimental import pallas as pl

    element, group, tiling, width, count, steps = job.element, job.group, job.tiling, job.width, job.groups, job.steps
    scales, zeros, x, out = refs if job.has_zero else (refs[0], None, *refs[1:])
    first = pl.program_id(1) * steps
    slots = x.shape[0]

    def spread(per_group: Array) -> Array:
        whole = jnp.broadcast_to(per_group[:, :, None], (tiling.rows, count, width // count))
        return whole.reshape(tiling.rows, width)

    def one_step(step: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        step = first + step
        groups, place = pl.ds(step * tiling.inputs // group, count), pl.ds(step * width, width)
        found = [level.astype(jnp.float32) for level in levels(codes[:, place], element, assembly=job.assembly)]
        if zeros is not None:
            zero = spread(zeros[:, groups])
            found = [level - zero for level in found]
        scale = spread(scales[:, groups])
        news = []
        for slot, total in enumerate(totals):
            part = found[0] * x[slot, 0, place][None, :]
            for index in range(1, len(found)):
                part += found[index] * x[slot, index, place][None, :]
            news.append(total + part * scale)
        return tuple(news)

    nothing = tuple(jnp.zeros((tiling.rows, width), jnp.float32) for _ in range(slots))
    for slot, total in enumerate(jax.lax.fori_loop(0, steps, one_step, nothing)):
        out[slot, :] = jnp.sum(total, axis=1)


def _with_tensor_cores(job: _Job, codes: Any, *refs: Any) -> None:
    """A step's levels are one side of a product; what the next step needs is loaded meanwhile."""
    from jax.experimental import pallas as pl

    group, tiling, width, count, steps = job.group, job.tiling, job.width, job.groups, job.steps
    scales, zeros, x, sums, out = refs if job.has_zero else (refs[0], None, refs[1], None, refs[2])
    scale_first = tiling.scale_first or count > 1
    first = pl.program_id(1) * steps

    def load(step: Any) -> tuple[Array, ...]:
        """All that a step needs: codes, scales, zero points with sums of x, slices of x."""
        step = first + jnp.minimum(step, steps - 1)
        groups = pl.ds(step * tiling.inputs // group, count)
        slices = tuple(x[index, pl.ds(step * width, width), :] for index in range(8 // job.element.bits))
        offsets = () if zeros is None or sums is None else (zeros[:, groups], sums[pl.ds(step, 1), :])
        return (codes[:, pl.ds(step * width, width)], scales[:, groups], *offsets, *slices)

    def one_step(step: Any, carry: tuple[Array, tuple[Array, ...]]) -> Any:
        total, (packed, scale, *rest) = carry
        following = load(step + 1)
        zero, sums_of_x, slices = (rest[0], rest[1], rest[2:]) if job.has_zero else (None, None, rest)
        part = total if scale_first else jnp.zeros(total.shape, jnp.float32)
        for level, part_of_x in zip(levels(packed, job.element, assembly=job.assembly), slices, strict=True):
            if scale_first:
                level = _scaled(level, scale, zero)
            if not job.assembly:  # interpreted: a CPU may have no product of bfloat16; this one has the same values
                level, part_of_x = level.astype(jnp.float32), part_of_x.astype(jnp.float32)
            part += jnp.dot(level, part_of_x, preferred_element_type=jnp.float32)
        if not scale_first:
            part = part if zero is None or sums_of_x is None else part - zero * sums_of_x
            part = total + part * scale
        return part, following

    start = jnp.zeros((tiling.rows, x.shape[-1]), jnp.float32)
    out[...] = jax.lax.fori_loop(0, steps, one_step, (start, load(0)))[0].T


def _scaled(level: Array, scale: Array, zero: Array | None) -> Array:
    """Levels [rows, width] less zero points, times scales [rows, groups], rounded as decoded weights are."""
    rows, count = scale.shape
    spread = level.reshape(rows, count, -1).astype(jnp.float32)
    if zero is not None:
        spread = spread - zero[:, :, None]
    return (spread * scale[:, :, None]).astype(jnp.bfloat16).reshape(level.shape)
