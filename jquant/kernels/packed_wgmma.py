"""x · dequantize(Q)ᵀ on Hopper's tensor cores, from the packed codes, for any number of rows of x (up to eight:
packed_mma.py).

    y = Σ_groups s_g · Σ_{k in g} x_k·(code_k − zero)

Copies run ahead of the work (TMA), codes become levels in the registers in which a tensor core takes its left operand,
and nothing is put back in order: a thread holds four bytes of a row side by side, so a product takes the inputs in the
order in which their codes lie there, and x is permuted to it (`permuted`); wgmma_registers.py has the registers.

Few rows of x and long groups: the sums of a group are scaled. Else weights are scaled, and rounded to bfloat16 as
decoded ones are, in parts of a step: while one part is multiplied the next is decoded.

Reference: Frantar et al., MARLIN, 2408.11743; NVIDIA's PTX ISA, wgmma.m64nNk16, for where operands lie.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32

from jquant.core.formats import Int
from jquant.core.qtensor import QTensor
from jquant.core.scales import NestedScale
from jquant.kernels import wgmma_registers as registers
from jquant.kernels.levels import known
from jquant.kernels.wgmma_registers import BLOCK, LANES, ROWS, Codes, load, mosaic

_FEW, _MANY = 16, 128  # rows of x
_MEMORY, _ALIGNED = 232_448, 1024  # bytes of shared memory; arrays begin at multiples
_STORED = 64  # columns that are written at a time


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut."""

    columns: int  # rows of x, a program
    inputs: int  # a step
    splits: int  # programs that share the inputs of a row
    stages: int  # steps whose operands are on chip
    scale_first: bool  # weights are scaled and rounded, then multiplied; else sums of a group are scaled
    warpgroups: int = 2  # of four warps; four of them hung on an H100
    parts: int = 1  # of a step, decoded one after the other; only where weights are scaled
    cluster: int = 1  # programs that share rows of x, each with rows of the weight of its own
    share_rows: bool = False  # groups of warps take parts of a step of the same 64 rows, else 64 rows each


def tiling_of(batch: int, q: QTensor) -> Tiling:
    """What was fastest on an H100."""
    group = q.scheme.tile(*q.matrix_shape)[1]
    wide = group >= 64
    columns = max(8, 1 << (batch - 1).bit_length())
    per_byte = 8 // q.scheme.element.bits
    if not wide and columns <= 32 and registers.scale_bytes_of(q) is not None:
        found = Tiling(columns=columns, inputs=512, splits=2, stages=4, scale_first=True, parts=4)
    elif columns <= 16:
        found = Tiling(
            columns=columns, inputs=512 * per_byte, splits=1, stages=3, scale_first=not wide, share_rows=True
        )
    elif columns <= 64:
        found = Tiling(columns=columns, inputs=128, splits=2, stages=6, scale_first=not wide)
    elif columns <= 128:
        found = Tiling(columns=columns, inputs=128, splits=2, stages=4, scale_first=not wide)
    elif columns <= 256:
        found = Tiling(columns=128, inputs=128, splits=1, stages=4, scale_first=not wide)
    else:
        found = Tiling(columns=256, inputs=64, splits=1, stages=5, scale_first=True, parts=2, cluster=2)
    while q.matrix_shape[1] % (found.inputs * found.splits):
        smaller = {"splits": found.splits // 2} if found.splits > 1 else {"inputs": found.inputs // 2}
        found = replace(found, **smaller)
    # A copy of sums of x, which zero points need, takes 128 bytes or a multiple.
    if found.columns * max(1, found.inputs // group) % 32 and q.zero_planes is not None:
        found = replace(found, scale_first=True)
    while _bytes_on_chip(found, q) > _MEMORY:
        found = replace(found, stages=found.stages - 1)
    return found


def _bytes_on_chip(tiling: Tiling, q: QTensor) -> int:
    """Of shared memory: operands of all stages, results on their way out, and a table."""
    rows, per_row = ROWS * tiling.warpgroups, 1 if q.zero_planes is None else 2
    rows //= tiling.warpgroups if tiling.share_rows else 1
    groups = max(1, tiling.inputs // q.scheme.tile(*q.matrix_shape)[1])
    codes = rows * tiling.inputs * q.scheme.element.bits // 8
    scale = 4 if bytes_of_scales(q, tiling) is None else 1
    stage = codes + 2 * tiling.columns * tiling.inputs + groups * (scale * per_row * rows + 4 * tiling.columns)
    arrays = 2 + per_row + (q.zero_planes is not None)
    table = 4 * 256 * LANES + _ALIGNED if registers.looked_up(q.scheme.element) else 0
    results = 4 * ROWS * tiling.warpgroups * min(tiling.columns, _STORED)
    return tiling.stages * (stage + arrays * _ALIGNED) + results + table


def bytes_of_scales(q: QTensor, tiling: Tiling) -> registers.ScaleBytes | None:
    """How the kernel reads scales of a byte; None where it reads float32. A copy takes 16 bytes of a row or more."""
    enough = tiling.inputs >= 16 * q.scheme.tile(*q.matrix_shape)[1]
    return registers.scale_bytes_of(q) if tiling.scale_first and enough else None


def fits(q: QTensor, rows: int = _MANY) -> bool:
    """Whether the kernel reads such a weight: one plane of codes, groups of neighbours in a row.

    Left to packed_matmul.py, or to XLA: groups shorter than 64 for up to 16 `rows` of x, where scales of more than a
    byte keep this one from being faster; and zero points of such groups, or with more than 256 rows.
    """
    if q.scheme.block is not None or q.groups is not None or q.ndim != 2 or not known(q.scheme.element):
        return False
    tile_rows, group = q.scheme.tile(*q.matrix_shape)
    out, columns = q.matrix_shape
    if group < 64 and ((rows <= 16 and registers.scale_bytes_of(q) is None) or q.zero_planes is not None):
        return False
    whole = group == columns or (group >= 16 and group & (group - 1) == 0)
    few = q.zero_planes is None or rows <= 256
    return q.scheme.element.bits >= 4 and tile_rows == 1 and out % 128 == 0 and columns % 512 == 0 and whole and few


def packed_matmul(
    x: Float[Array, "batch in"], q: QTensor, *, tiling: Tiling | None = None
) -> Float32[Array, "batch out"]:
    """x · dequantize(q)ᵀ.

    Args:
        x: rounded to bfloat16.
        q: `fits(q)` must hold.
        tiling: by default what was fastest on an H100.
    """
    tiling = tiling_of(len(x), q) if tiling is None else tiling
    batch = len(x)
    element, group = q.scheme.element, q.scheme.tile(*q.matrix_shape)[1]
    padded = -(-batch // tiling.columns) * tiling.columns
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, padded - batch), (0, 0)))
    rows = permuted(x, 8 // element.bits, by_byte=registers.looked_up(element))
    job = _job_of(q, tiling, padded)
    if job.codes.scale_bytes is not None:
        parameters = [jax.lax.bitcast_convert_type(q.stored.scale, jnp.uint8)]
    else:
        parameters = [q.scales()]
    zero = q.zero_points()
    if zero is not None:
        assert isinstance(element, Int), "others have no zero point"
        parameters.append(zero.astype(jnp.float32) - element.offset)
    operands = [q.planes[0], rows, *(each if job.codes.in_rows else each.T for each in parameters)]
    if zero is not None and not tiling.scale_first:
        # A sum for each step of a group, in the order of steps.
        width = min(group, tiling.inputs)
        operands.append(jnp.sum(rows.reshape(padded, -1, width), axis=2, dtype=jnp.float32).T)
    tables = [jnp.asarray(registers.table(element))] if registers.looked_up(element) else []
    found = _run(job, *operands, *tables)
    # Additions, not a reduction: XLA puts them into one kernel with what comes next.
    total = functools.reduce(operator.add, [part[:, :batch] for part in found]).T
    if job.codes.scale_bytes is not None and isinstance(q.scheme.scale, NestedScale):
        assert q.stored.scale2 is not None
        total = total / q.stored.scale2
    return total


def permuted(x: BFloat16[Array, "batch in"], count: int, *, by_byte: bool = False) -> BFloat16[Array, "batch in"]:
    """x in the order in which products take its columns, where a byte holds `count` codes.

    Input 16·count·b + 4·count·t + count·(2h + e) + c, the c-th code of byte 2h + e of thread t in block b, comes c-th
    among the products of its block, and there at 8h + 2t + e: threads hold pairs, and two of them, eight columns apart.

    `by_byte` for two codes a byte that are looked up together: input 32·b + 8·t + 4·p + 2·h + e, the code e of byte
    2p + h, comes p-th, and there at 8h + 2t + e.
    """
    if by_byte and len(x) <= _FEW:
        # A gather is one with what comes before it; a transposition with so short a last axis is a kernel apart.
        order = np.arange(x.shape[1]).reshape(-1, 4, 2, 2, 2).transpose(0, 2, 3, 1, 4).reshape(-1)
        return x[:, order]
    if by_byte:
        return x.reshape(len(x), -1, 4, 2, 2, 2).transpose(0, 1, 3, 4, 2, 5).reshape(x.shape)
    split = x.reshape(len(x), -1, 4, 2, 2, count)
    return split.transpose(0, 1, 5, 3, 2, 4).reshape(x.shape)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is static in a kernel."""

    tiling: Tiling
    rows_of_x: int
    out: int
    inputs: int
    codes: Codes


def _job_of(q: QTensor, tiling: Tiling, padded: int) -> _Job:
    out, inputs = q.matrix_shape
    group = q.scheme.tile(out, inputs)[1]
    kind = bytes_of_scales(q, tiling)
    codes = Codes(
        element=q.scheme.element,
        inputs=tiling.inputs,
        group=group,
        has_zero=q.zero_planes is not None,
        scale_bytes=kind,
        in_rows=kind is not None or 4 * tiling.inputs // group >= 16,  # the least that a copy takes of a row
    )
    return _Job(tiling=tiling, rows_of_x=padded, out=out, inputs=inputs, codes=codes)


@functools.partial(jax.jit, static_argnums=0)
def _run(job: _Job, *operands: Array) -> Float32[Array, "splits out batch"]:
    """Jitted, so that a program's equal products are lowered once: each takes Python a fourth of a second."""
    return _call(job)(*operands)


def _call(job: _Job) -> Any:
    """The kernel as a function of codes, x, parameters [out, groups] or [groups, out], sums of x, and a table."""
    from jax import lax
    from jax.experimental import pallas as pl

    plgpu = mosaic()

    tiling, codes = job.tiling, job.codes
    sharing = tiling.warpgroups if tiling.share_rows else 1
    rows, columns, step = ROWS * tiling.warpgroups // sharing, tiling.columns, tiling.inputs
    width, steps = step // codes.per_byte, job.inputs // step // tiling.splits
    own_step = step // sharing  # inputs that a group of warps takes of it
    cluster = tiling.cluster if job.out % (rows * tiling.cluster) == 0 else 1
    stored = min(columns, _STORED)
    of_block = BLOCK * codes.per_byte
    own_groups = max(1, own_step // codes.group)
    blocks_of_group = own_step // own_groups // of_block
    has_table = registers.looked_up(codes.element)
    part = own_step // tiling.parts  # inputs
    swizzle = min(128, 2 * part)  # of x, whose parts are multiplied one by one

    def kernel(*refs: Any, staged: Any, table: Any = None) -> None:
        *operands, out_ref = refs
        given = operands.pop() if has_table else None
        row, split, column = (lax.axis_index(name) for name in ("rows", "splits", "columns"))
        row = row * cluster + lax.axis_index("cluster")
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(0 if tiling.share_rows else warpgroup * ROWS, ROWS)
        first_group = warpgroup * own_step // codes.group if tiling.share_rows else 0

        def own(ref: Any, size: int, begin: int, count: int) -> Any:
            """Of the columns of a step, of which a group of warps has `size`."""
            return ref.at[:, pl.ds(warpgroup * size + begin if tiling.share_rows else begin, count)]

        def own_codes(ref: Any) -> Any:
            return load(own(ref, width // sharing, 0, width // sharing).at[mine], layout=plgpu.Layout.WGMMA_8BIT)

        def sums_scaled(_: Any, *given: Any) -> Any:
            packed_ref, x, scale, *rest, total = given
            packed = own_codes(packed_ref)

            def multiply(*sums: Any) -> Any:
                size = own_step // own_groups
                for index, sum_ in enumerate(sums):
                    levels = registers.levels(codes, packed, table, index * blocks_of_group, blocks_of_group)
                    plgpu.wgmma(sum_, levels, own(x, own_step, index * size, size).T)
                found = total
                for index, sum_ in enumerate(sums):
                    value = plgpu.wgmma_accumulator_load(sum_, wait_n=len(sums) - 1 - index)
                    group = first_group + index
                    if codes.has_zero:
                        zero = lax.broadcast_in_dim(registers.column(codes, rest[0], mine, group), value.shape, [0])
                        of_x = load(rest[1].at[group], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                        value = value - zero * lax.broadcast_in_dim(of_x, value.shape, [1])
                    factor = registers.column(codes, scale, mine, group)
                    found = found + value * lax.broadcast_in_dim(factor, value.shape, [0])
                return found

            return pl.run_scoped(multiply, *[plgpu.ACC((ROWS, columns), jnp.float32)] * own_groups)

        def weights_scaled(_: Any, *given: Any) -> Any:
            packed_ref, x, *parameters, total = given
            packed = own_codes(packed_ref)
            of_mine = [registers.part_of(codes, each, mine, pl.ds(first_group, own_groups)) for each in parameters]
            for begin in range(0, own_step, part):
                weights = registers.weights(codes, packed, table, of_mine, begin // of_block, part // of_block)
                plgpu.wgmma(total, weights, own(x, own_step, begin, part).T)
                # Products read their registers on and on. Those of a part are filled again two parts later, of the
                # only part in the next turn of this loop.
                plgpu.wgmma_wait(1 if tiling.parts > 1 else 0)
            return total

        def store(total: Any) -> None:
            for begin in range(0, columns, stored):
                here = staged.at[pl.ds(warpgroup * ROWS, ROWS)]
                here[...] = total[:, begin : begin + stored]
                plgpu.commit_smem()
                part_sum = split * sharing + warpgroup if tiling.share_rows else split
                where = pl.ds(row * rows + (0 if tiling.share_rows else warpgroup * ROWS), ROWS)
                plgpu.copy_smem_to_gmem(here, out_ref.at[part_sum, where, pl.ds(column * columns + begin, stored)])
                plgpu.wait_smem_to_gmem(0)

        def work(run: Any) -> None:
            if has_table:
                registers.fill(given, table)
            if tiling.scale_first:

                def whole(total: Any) -> None:
                    run(total)
                    store(total[...])

                pl.run_scoped(whole, plgpu.ACC((ROWS, columns), jnp.float32))
            else:
                nothing = jnp.zeros((ROWS, columns), jnp.float32)
                store(run(plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)))

        # The last part of a step is still being multiplied in the next one.
        block_of = functools.partial(plgpu.BlockSpec, delay_release=int(tiling.parts > 1))

        def tiled(block: tuple[int, int], index: Any, swizzle: int, bits: int, shared: tuple[str, ...] = ()) -> Any:
            transforms = (plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle))
            return block_of(block, index, transforms=transforms, collective_axes=shared)

        def groups_at(t: Any) -> Any:
            at = split * steps + t
            return at if step >= codes.group else at * step // codes.group

        per_row = (
            block_of((rows, codes.groups), lambda t: (row, groups_at(t)))
            if codes.in_rows
            else block_of((codes.groups, rows), lambda t: (groups_at(t), row))
        )
        specs = [
            tiled((rows, width), lambda t: (row, split * steps + t), min(128, width), 8),
            tiled(
                (columns, step),
                lambda t: (column, split * steps + t),
                swizzle,
                16,
                ("cluster",) if cluster > 1 else (),
            ),
            *[per_row] * (2 if codes.has_zero else 1),
        ]
        if len(operands) > len(specs):
            specs.append(block_of((codes.groups, columns), lambda t: (split * steps + t, column)))
        plgpu.emit_pipeline_warp_specialized(
            weights_scaled if tiling.scale_first else sums_scaled,
            grid=(steps,),
            memory_registers=40,
            in_specs=specs,
            wg_axis="warpgroup",
            num_compute_wgs=tiling.warpgroups,
            max_concurrent_steps=tiling.stages,
            compute_context=work,
        )(*operands)

    scratch = {"staged": plgpu.SMEM((ROWS * tiling.warpgroups, stored), jnp.float32)}
    if has_table:
        scratch["table"] = plgpu.SMEM((256, LANES), jnp.int32)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiling.splits * sharing, job.out, job.rows_of_x), jnp.float32),
        grid=(job.out // rows // cluster, tiling.splits, job.rows_of_x // columns),
        grid_names=("rows", "splits", "columns"),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
    )
