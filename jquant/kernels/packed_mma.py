"""x · dequantize(Q)ᵀ for a few rows of x on Hopper, in one kernel: nothing is put in order before it, or summed after.

    y = Σ_groups s_g · Σ_{k in g} x_k·(code_k − zero)

Generation takes one token at a time, and then a product is as long as the reading of its codes; a second kernel that
XLA must put before or after would show. So x is read as it is: mma.sync takes both operands from registers, and a
thread loads the x that belongs to its codes. Two groups of four warps share the inputs of 64 rows of the weight; their
sums meet in shared memory and leave rounded to the dtype asked for.

Sums of a group are scaled, by scales that are on chip from the start. Only scales of a byte (MX, NVFP4) come a step at
a time, and weights are scaled by them in the registers, exactly, as in packed_wgmma.py.

Reference: NVIDIA's PTX ISA, mma.m16n8k16, for where operands lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jquant.core.formats import Int
from jquant.core.qtensor import QTensor
from jquant.core.scales import FloatScale, NestedScale
from jquant.kernels import wgmma_registers as registers
from jquant.kernels.levels import known
from jquant.kernels.mma_registers import COLUMNS, products
from jquant.kernels.wgmma_registers import BLOCK, LANES, ROWS, Codes, load, mosaic

SHARES = 2  # groups of four warps, each with a part of every step
_MEMORY, _ALIGNED = 232_448, 1024  # bytes of shared memory; arrays begin at multiples
_COPIED = 256  # values in a row of a copy, at most


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut."""

    inputs: int  # a step
    stages: int  # steps whose operands are on chip


def tiling_of(rows: int, q: QTensor) -> Tiling | None:
    """What was fastest on an H100, with fewer stages where shared memory holds no more; None where it holds not two."""
    for stages in (4, 3, 2):
        found = Tiling(inputs=512, stages=stages)
        if _bytes_on_chip(found, rows, q) <= _MEMORY:
            return found
    return None


def _bytes_on_chip(tiling: Tiling, rows: int, q: QTensor) -> int:
    columns, group = q.matrix_shape[1], q.scheme.tile(*q.matrix_shape)[1]
    stage = ROWS * tiling.inputs * q.scheme.element.bits // 8 + 2 * rows * tiling.inputs
    held = 4 * ROWS * SHARES * COLUMNS
    if _sums_scaled(q):
        held += (1 if q.zero_planes is None else 2) * 4 * ROWS * _pitch(-(-columns // group))
    else:
        stage += ROWS * tiling.inputs // group
    if registers.looked_up(q.scheme.element):
        held += 4 * 256 * LANES
    return tiling.stages * stage + held + 6 * _ALIGNED


def _sums_scaled(q: QTensor) -> bool:
    return registers.scale_bytes_of(q) is None


def _pitch(groups: int) -> int:
    """Values a row of what is held of all groups: odd, or neighbouring rows would lie in the same bank."""
    return groups + 1 - groups % 2


def fits(q: QTensor, rows: int) -> bool:
    """Whether the kernel reads such a weight: one plane of codes, groups of neighbours in a row; and so few rows."""
    if q.scheme.block is not None or q.groups is not None or q.ndim != 2 or not known(q.scheme.element):
        return False
    tile_rows, group = q.scheme.tile(*q.matrix_shape)
    out, columns = q.matrix_shape
    if tile_rows != 1 or q.scheme.element.bits < 4 or out % ROWS or columns % 512 or not 0 < rows <= COLUMNS:
        return False
    sums = _sums_scaled(q)
    whole = group >= (32 if sums else 16) and group & (group - 1) == 0
    # Bytes of scales are copied a step at a time, 16 of a row at least.
    return (whole or group == columns) and (sums or group <= 32) and tiling_of(rows, q) is not None


def packed_matmul(
    x: Float[Array, "batch in"], q: QTensor, *, dtype: DTypeLike = jnp.float32, tiling: Tiling | None = None
) -> Float[Array, "batch out"]:
    """x · dequantize(q)ᵀ.

    Args:
        x: rounded to bfloat16; eight rows at most.
        q: `fits(q, len(x))` must hold.
        dtype: of the result, rounded once from float32; float32 and bfloat16 need no kernel of their own.
        tiling: by default what was fastest on an H100.
    """
    batch, inputs = x.shape
    tiling = tiling_of(batch, q) if tiling is None else tiling
    assert tiling is not None, "`fits` refuses others"
    job = _job_of(q, tiling, batch, dtype)
    operands = [q.planes[0], x.astype(jnp.bfloat16).reshape(batch, inputs // _COPIED, _COPIED)]
    if not job.sums_scaled:
        operands.append(jax.lax.bitcast_convert_type(q.stored.scale, jnp.uint8))
        if job.divided:
            assert q.stored.scale2 is not None
            operands.append(q.stored.scale2.reshape(1))
    else:
        as_stored = isinstance(q.scheme.scale, FloatScale) and q.scheme.scale.bits > 8
        operands.append(q.stored.scale if as_stored else q.scales())
        operands += [] if q.zero_planes is None else [q.zero_planes[0]]
    if registers.looked_up(q.scheme.element):
        operands.append(jnp.asarray(registers.table(q.scheme.element)))
    return _run(job, *operands).astype(dtype)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is static in a kernel."""

    tiling: Tiling
    batch: int
    out: int
    inputs: int
    dtype: np.dtype[Any]
    codes: Codes
    divided: bool  # sums, by the nested scale

    @property
    def sums_scaled(self) -> bool:
        """Rather than weights."""
        return self.codes.scale_bytes is None

    @property
    def groups(self) -> int:
        """Of a row; the last may be shorter."""
        return -(-self.inputs // self.codes.group)


def _job_of(q: QTensor, tiling: Tiling, batch: int, dtype: DTypeLike) -> _Job:
    out, inputs = q.matrix_shape
    codes = Codes(
        element=q.scheme.element,
        inputs=tiling.inputs,
        group=q.scheme.tile(*q.matrix_shape)[1],
        has_zero=q.zero_planes is not None,
        scale_bytes=registers.scale_bytes_of(q),
        in_rows=True,
    )
    return _Job(
        tiling=tiling,
        batch=batch,
        out=out,
        inputs=inputs,
        dtype=jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32),
        codes=codes,
        divided=not _sums_scaled(q) and isinstance(q.scheme.scale, NestedScale),
    )


@partial(jax.jit, static_argnums=0)
def _run(job: _Job, *operands: Array) -> Float[Array, "batch out"]:
    """Jitted, so that a program's equal products are lowered once: each takes Python a fifth of a second."""
    return _call(job)(*operands)


def _call(job: _Job) -> Any:
    """The kernel as a function of codes, x [batch, in/256, 256], scales, zero points, the nested scale, and a table."""
    from jax import lax
    from jax.experimental import pallas as pl

    plgpu = mosaic()

    codes, step, batch = job.codes, job.tiling.inputs, job.batch
    width, own_step = step // codes.per_byte, step // SHARES
    of_block = BLOCK * codes.per_byte
    own_groups = max(1, own_step // codes.group)
    # Of a step, multiplied in a row: a group, or what of it there is; else as much as takes few registers.
    part = own_step // own_groups if job.sums_scaled else min(own_step, 128)

    def kernel(*refs: Any, staged: Any, met: Any, held: Any = None, table: Any = None) -> None:
        packed_ref, x_ref, scale_ref, *others, out_ref = refs
        row, mine = lax.axis_index("rows"), lax.axis_index("warpgroup")
        rows = pl.ds(row * ROWS, ROWS)

        def sums_of_groups(index: Any, own: Any, x: Any, total: Any) -> Any:
            for begin in range(0, own_step, part):
                first, blocks = begin // of_block, part // of_block
                levels = registers.levels(codes, own, table, first, blocks)
                value, *sums = products(codes, levels, x, own_step, first, batch)
                group = (index * step + mine * own_step + begin) // codes.group
                if codes.has_zero:
                    zero = registers.column(codes, held.at[1], pl.ds(0, ROWS), group)
                    value = value - sums[0] * lax.broadcast_in_dim(zero, value.shape, [0])
                factor = registers.column(codes, held.at[0], pl.ds(0, ROWS), group)
                total = total + value * lax.broadcast_in_dim(factor, value.shape, [0])
            return total

        def products_of_weights(own: Any, x: Any, scale: Any, total: Any) -> Any:
            of_mine = registers.part_of(codes, scale, pl.ds(0, ROWS), pl.ds(mine * own_groups, own_groups))
            for begin in range(0, own_step, part):
                first = begin // of_block
                weights = registers.weights(codes, own, table, [of_mine], first, part // of_block)
                total = total + products(codes, weights, x, own_step, first, batch)[0]
            return total

        def multiply(indices: Any, packed: Any, x: Any, *given: Any) -> Any:
            of_mine = pl.ds(mine * (width // SHARES), width // SHARES)
            own = load(packed.at[:, of_mine], layout=plgpu.Layout.WGMMA_8BIT)
            return (
                sums_of_groups(indices[0], own, x, *given) if job.sums_scaled else products_of_weights(own, x, *given)
            )

        def work(run: Any) -> None:
            if table is not None:
                registers.fill(others[-1], table)
            if held is not None:
                _hold(scale_ref.at[rows], others[0] if codes.has_zero else None, row, held, codes)
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)
            total = run(plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), plgpu.Layout.WGMMA))
            staged[pl.ds(mine * ROWS, ROWS), :] = total
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

            @pl.when(mine == 0)
            def _() -> None:
                _finish(staged, out_ref.at[:, rows], others[0] if job.divided else None, job)

        swizzle = min(128, width)
        tiled = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
        specs = [
            plgpu.BlockSpec((ROWS, width), lambda t: (row, t), transforms=tiled),
            plgpu.BlockSpec((batch, step // _COPIED, _COPIED), lambda t: (0, t, 0)),
        ]
        if not job.sums_scaled:
            specs.append(plgpu.BlockSpec((ROWS, codes.groups), lambda t: (row, t)))
        plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(job.inputs // step,),
            memory_registers=40,
            in_specs=specs,
            wg_axis="warpgroup",
            num_compute_wgs=SHARES,
            max_concurrent_steps=job.tiling.stages,
            compute_context=work,
        )(packed_ref, x_ref, *([] if job.sums_scaled else [scale_ref]))

    scratch = {
        "staged": plgpu.SMEM((ROWS * SHARES, COLUMNS), jnp.float32),
        "met": plgpu.Barrier(num_arrivals=SHARES),
    }
    if job.sums_scaled:
        scratch["held"] = plgpu.SMEM((2 if codes.has_zero else 1, ROWS, _pitch(job.groups)), jnp.float32)
    if registers.looked_up(codes.element):
        scratch["table"] = plgpu.SMEM((256, LANES), jnp.int32)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, job.out), job.dtype),
        grid=(job.out // ROWS,),
        grid_names=("rows",),
        num_threads=SHARES + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
    )


def _hold(scale: Any, zeros: Any, row: Any, held: Any, codes: Codes) -> None:
    """Scales of 64 rows and all groups, and zero points, to shared memory as float32 [1 or 2, 64, pitch].

    Args:
        scale: [64, groups] of any float.
        zeros: codes packed along the rows, uint8 [groups, out·bits/8], or None.
        row: which 64 rows these are.
        held: where to.
        codes: what they are.
    """
    plgpu = mosaic()
    from jax.experimental import pallas as pl
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref

    bytes_of_rows = ROWS // codes.per_byte
    planes = [] if zeros is None else [zeros.at[:, pl.ds(row * bytes_of_rows, bytes_of_rows)]]
    groups = scale.shape[1]
    threads, at_once = 128 * SHARES, 16  # loads that are under way at a time
    elements = ROWS * groups

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (2 + len(planes)))
    def copy(_: Any, scale: Any, held: Any, *planes: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        thread, word = _thread(), registers.Places.constant

        def value_at(which: int, row: Any, group: Any) -> Any:
            if which == 0:
                value = memref.load(scale, [row, group])
                return value if value.type == f32 else arith.extf(f32, value)
            byte = arith.extui(i32, memref.load(planes[0], [group, arith.divui(row, _number(codes.per_byte))]))
            shift = arith.muli(arith.remui(row, _number(codes.per_byte)), _number(codes.element.bits))
            code = arith.andi(arith.shrui(byte, arith.index_cast(i32, shift)), word(2**codes.element.bits - 1))
            assert isinstance(codes.element, Int), "others have no zero point"
            return arith.sitofp(f32, arith.subi(code, word(codes.element.offset)))

        for which in range(1 + len(planes)):
            for begin in range(0, elements, threads * at_once):
                found = []
                for first in range(begin, min(elements, begin + threads * at_once), threads):
                    # Threads beyond the last element write that one too.
                    element = arith.minui(arith.addi(thread, _number(first)), _number(elements - 1))
                    # Neighbouring threads read neighbours: scales lie a row side by side, zero points a group.
                    inner = _number(groups if which == 0 else ROWS)
                    outer, inside = arith.divui(element, inner), arith.remui(element, inner)
                    row, group = (outer, inside) if which == 0 else (inside, outer)
                    found.append((value_at(which, row, group), row, group))
                for value, row, group in found:
                    memref.store(value, held, [_number(which), row, group])

    copy(scale, held, *planes)


def _finish(staged: Any, out: Any, second: Any, job: _Job) -> None:
    """Sums of all groups of warps [64 · groups, 8], over the nested scale where there is one, to out [batch, 64]."""
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = mosaic()
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref

    divisors = [] if second is None else [second]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (2 + len(divisors)))
    def write(_: Any, staged: Any, out: Any, *divisors: Any) -> None:
        thread = arith.remui(_thread(), _number(128))
        row, lead = arith.remui(thread, _number(ROWS)), arith.divui(thread, _number(ROWS))
        for begin in range(0, job.batch, 128 // ROWS):
            column = arith.addi(lead, _number(begin))
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, column, _number(job.batch))):
                total = memref.load(staged, [row, column])
                for other in range(1, SHARES):
                    total = arith.addf(total, memref.load(staged, [arith.addi(row, _number(other * ROWS)), column]))
                for each in divisors:
                    total = arith.divf(total, memref.load(each, [_number(0)]))
                if job.dtype == jnp.bfloat16:
                    total = arith.truncf(ir.BF16Type.get(), total)
                memref.store(total, out, [column, row])

    write(staged, out, *divisors)


def _thread() -> Any:
    """Its number in the program, as an index."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.index_cast(ir.IndexType.get(), mgpu.utils.thread_idx())


def _number(value: int) -> Any:
    """A constant index."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.constant(ir.IndexType.get(), ir.IntegerAttr.get(ir.IndexType.get(), value))
