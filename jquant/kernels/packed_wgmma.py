"""x · dequantize(Q)ᵀ on Hopper's tensor cores, from the packed codes, for any number of rows of x.

    y = Σ_groups s_g · Σ_{k in g} x_k·(code_k − zero)

Copies run ahead of the work (TMA), codes become levels in the registers in which a tensor core takes its left operand,
and nothing is put back in order: a thread holds four bytes of a row side by side, so a product takes the inputs in the
order in which their codes lie there, and x is permuted to it (`permuted`).

        bytes of a row, 16 a block      thread 0: 0…3    thread 1: 4…7    thread 2: 8…11    thread 3: 12…15
        products of 16 inputs each      the first codes of all bytes, then the second ones, …

Few rows of x: the sums of a group are scaled. Many: weights are scaled and rounded to bfloat16 as decoded ones are.

Reference: Frantar et al., MARLIN, 2408.11743; NVIDIA's PTX ISA, wgmma.m64nNk16, for where operands lie.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32

from jquant.core.formats import Element, Int
from jquant.core.qtensor import QTensor
from jquant.kernels.levels import assembly_of, known

_BLOCK = 16  # bytes of a row that four threads hold
_ROWS = 64  # of the weight, a group of four warps
_MANY = 128
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
    warpgroups: int = 2  # of 64 rows of the weight each


def tiling_of(batch: int, q: QTensor) -> Tiling:
    """What was fastest on an H100."""
    group = q.scheme.tile(*q.matrix_shape)[1]
    wide = group >= 64
    columns = max(8, 1 << (batch - 1).bit_length())
    per_byte = 8 // q.scheme.element.bits
    if columns <= 16:
        found = Tiling(columns=columns, inputs=256 * per_byte, splits=2, stages=4, scale_first=not wide)
    elif columns <= 64:
        found = Tiling(columns=columns, inputs=128, splits=2, stages=6, scale_first=not wide)
    elif columns <= 128:
        found = Tiling(columns=columns, inputs=128, splits=2, stages=4, scale_first=not wide)
    elif columns <= 256:
        found = Tiling(columns=128, inputs=128, splits=1, stages=4, scale_first=not wide)
    else:
        found = Tiling(columns=256, inputs=64, splits=1, stages=4, scale_first=True)
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
    """Of shared memory: operands of all stages, and results on their way out."""
    rows, per_row = _ROWS * tiling.warpgroups, 1 if q.zero_planes is None else 2
    groups = max(1, tiling.inputs // q.scheme.tile(*q.matrix_shape)[1])
    codes = rows * tiling.inputs * q.scheme.element.bits // 8
    stage = codes + 2 * tiling.columns * tiling.inputs + 4 * groups * (per_row * rows + tiling.columns)
    return tiling.stages * (stage + 4 * _ALIGNED) + 4 * rows * min(tiling.columns, _STORED)


def fits(q: QTensor, rows: int = _MANY) -> bool:
    """Whether the kernel reads such a weight: one plane of codes, groups of neighbours in a row.

    Left to packed_matmul.py, or to XLA: groups shorter than 64 for up to 16 `rows` of x, where their scales keep
    this one from being faster; and zero points of such groups, or with more than 256 rows.
    """
    if q.scheme.block is not None or q.groups is not None or q.ndim != 2 or not known(q.scheme.element):
        return False
    tile_rows, group = q.scheme.tile(*q.matrix_shape)
    out, columns = q.matrix_shape
    if group < 64 and (rows <= 16 or q.zero_planes is not None):
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
    batch, out = len(x), q.matrix_shape[0]
    element, group = q.scheme.element, q.scheme.tile(*q.matrix_shape)[1]
    padded = -(-batch // tiling.columns) * tiling.columns
    rows = permuted(jnp.pad(x.astype(jnp.bfloat16), ((0, padded - batch), (0, 0))), 8 // element.bits)
    job = _Job(element, group, q.zero_planes is not None, tiling, (padded, out, q.matrix_shape[1]))
    parameters = [q.scales()]
    zero = q.zero_points()
    if zero is not None:
        assert isinstance(element, Int), "others have no zero point"
        parameters.append(zero.astype(jnp.float32) - element.offset)
    operands = [q.planes[0], rows, *(each if job.in_rows else each.T for each in parameters)]
    if zero is not None and not tiling.scale_first:
        # A sum for each step of a group, in the order of steps.
        width = min(group, tiling.inputs)
        operands.append(jnp.sum(rows.reshape(padded, -1, width), axis=2, dtype=jnp.float32).T)
    found = _call(job)(*operands)
    return jnp.sum(found, axis=0)[:, :batch].T


def permuted(x: BFloat16[Array, "batch in"], count: int) -> BFloat16[Array, "batch in"]:
    """x in the order in which products take its columns, where a byte holds `count` codes.

    Input 16·count·b + 4·count·t + count·(2h + e) + c, the c-th code of byte 2h + e of thread t in block b, comes c-th
    among the products of its block, and there at 8h + 2t + e: threads hold pairs, and two of them, eight columns apart.
    """
    split = x.reshape(len(x), -1, 4, 2, 2, count)
    return split.transpose(0, 1, 5, 3, 2, 4).reshape(x.shape)


class _Job(NamedTuple):
    """What is static in a kernel."""

    element: Element
    group: int
    has_zero: bool
    tiling: Tiling
    sizes: tuple[int, int, int]  # rows of x with padding, rows and columns of the weight

    @property
    def per_byte(self) -> int:
        """Codes."""
        return 8 // self.element.bits

    @property
    def groups(self) -> int:
        """Of a row, in a step; 1 where a group is longer."""
        return max(1, self.tiling.inputs // self.group)

    @property
    def in_rows(self) -> bool:
        """Whether parameters are copied as they lie, [out, groups]: a copy takes 16 bytes of a row or more."""
        return 4 * self.groups >= 16


def _call(job: _Job) -> Any:
    """The kernel as a function of codes, x, parameters [out, groups] or [groups, out], and sums of x."""
    from jax import lax
    from jax.experimental import pallas as pl

    plgpu = _mosaic()

    tiling = job.tiling
    padded, out, inputs = job.sizes
    rows, columns, step = _ROWS * tiling.warpgroups, tiling.columns, tiling.inputs
    width, steps = step // job.per_byte, inputs // step // tiling.splits
    stored = min(columns, _STORED)
    blocks_of_group = min(job.group, step) // (_BLOCK * job.per_byte)

    def kernel(*refs: Any, staged: Any) -> None:
        *operands, out_ref = refs
        row, split, column = (lax.axis_index(name) for name in ("rows", "splits", "columns"))
        mine = pl.ds(lax.axis_index("warpgroup") * _ROWS, _ROWS)

        def sums_scaled(_: Any, *given: Any) -> Any:
            codes, x, scale, *rest, total = given
            packed = _load(codes.at[mine], layout=plgpu.Layout.WGMMA_8BIT)

            def multiply(*sums: Any) -> Any:
                size = step // job.groups
                for index, part in enumerate(sums):
                    levels = _levels(packed, job.element, index * blocks_of_group, blocks_of_group)
                    plgpu.wgmma(part, levels, x.at[:, index * size : (index + 1) * size].T)
                found = total
                for index, part in enumerate(sums):
                    value = plgpu.wgmma_accumulator_load(part, wait_n=len(sums) - 1 - index)
                    if job.has_zero:
                        zero = lax.broadcast_in_dim(_column(job, rest[0], mine, index), value.shape, [0])
                        of_x = _load(rest[1].at[index], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                        value = value - zero * lax.broadcast_in_dim(of_x, value.shape, [1])
                    found = found + value * lax.broadcast_in_dim(_column(job, scale, mine, index), value.shape, [0])
                return found

            return pl.run_scoped(multiply, *[plgpu.ACC((_ROWS, columns), jnp.float32)] * job.groups)

        def weights_scaled(_: Any, *given: Any) -> Any:
            codes, x, *parameters, total = given
            packed = _load(codes.at[mine], layout=plgpu.Layout.WGMMA_8BIT)
            plgpu.wgmma(total, _weights(job, packed, [_of_rows(job, each, mine) for each in parameters]), x.T)
            # Products read their registers on and on: the next step may not fill them before this one is done.
            plgpu.wgmma_wait(0)
            return total

        def store(total: Any) -> None:
            for begin in range(0, columns, stored):
                staged.at[mine][...] = total[:, begin : begin + stored]
                plgpu.commit_smem()
                where = pl.ds(row * rows + lax.axis_index("warpgroup") * _ROWS, _ROWS)
                to = out_ref.at[split, where, pl.ds(column * columns + begin, stored)]
                plgpu.copy_smem_to_gmem(staged.at[mine], to)
                plgpu.wait_smem_to_gmem(0)

        def work(run: Any) -> None:
            if tiling.scale_first:

                def whole(total: Any) -> None:
                    run(total)
                    store(total[...])

                pl.run_scoped(whole, plgpu.ACC((_ROWS, columns), jnp.float32))
            else:
                nothing = jnp.zeros((_ROWS, columns), jnp.float32)
                store(run(plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)))

        def tiled(block: tuple[int, int], index: Any, swizzle: int, bits: int) -> Any:
            transforms = (plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle))
            return plgpu.BlockSpec(block, index, transforms=transforms)

        def groups_at(t: Any) -> Any:
            at = split * steps + t
            return at if step >= job.group else at * step // job.group

        per_row = (
            plgpu.BlockSpec((rows, job.groups), lambda t: (row, groups_at(t)))
            if job.in_rows
            else plgpu.BlockSpec((job.groups, rows), lambda t: (groups_at(t), row))
        )
        specs = [
            tiled((rows, width), lambda t: (row, split * steps + t), min(128, width), 8),
            tiled((columns, step), lambda t: (column, split * steps + t), 128, 16),
            *[per_row] * (2 if job.has_zero else 1),
        ]
        if len(operands) > len(specs):
            specs.append(plgpu.BlockSpec((job.groups, columns), lambda t: (split * steps + t, column)))
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

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiling.splits, out, padded), jnp.float32),
        grid=(out // rows, tiling.splits, padded // columns),
        grid_names=("rows", "splits", "columns"),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={"staged": plgpu.SMEM((rows, stored), jnp.float32)},
    )


def _mosaic() -> Any:
    """Imported when a kernel is made; its decorators hide what pyright would have to know."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _load(ref: Any, **options: Any) -> Any:
    plgpu = _mosaic()

    load: Any = plgpu.load
    # JAX 0.10 wants an index, 0.11 wants none.
    wants = inspect.signature(load).parameters["idx"].default is inspect.Parameter.empty
    return load(ref, (), **options) if wants else load(ref, **options)


def _levels(packed: Any, element: Element, first: int, blocks: int) -> Any:
    """The levels of so many blocks of bytes [64, bytes], as a product takes them."""
    plgpu = _mosaic()

    count = 8 // element.bits
    shape = plgpu.ShapeDtypeStruct((_ROWS, blocks * _BLOCK * count), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_8BIT,), return_type=shape)
    def unpack(_: Any, codes: Any) -> Any:
        return _assembled(codes.registers[:, first : first + blocks], element, lambda pair, *_: pair)

    return unpack(packed)


def _weights(job: _Job, packed: Any, parameters: list[Any]) -> Any:
    """Scaled and rounded weights [64, inputs of a step], as a product takes them."""
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = _mosaic()
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    shape = plgpu.ShapeDtypeStruct((_ROWS, job.tiling.inputs), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    kinds = (plgpu.Layout.WGMMA_8BIT, *[plgpu.RefType()] * len(parameters))
    of_block, of_thread = _BLOCK * job.per_byte, 4 * job.per_byte  # inputs

    @plgpu.inline_mgpu(arg_types=kinds, return_type=shape)
    def scale(_: Any, codes: Any, *refs: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        places = _Places(mgpu.utils.thread_idx())
        known: dict[tuple[int, int, int], Any] = {}

        def parameter(ref: int, half: int, block: int) -> Any:
            """Of the group that a thread's codes of a block lie in."""
            first = block * of_block
            key = (ref, half, first // min(job.group, of_block))
            if key not in known:
                group = places.constant(first // job.group if job.tiling.inputs > job.group else 0)
                if job.group < of_block:
                    inside = arith.divui(places.quarter, places.constant(max(1, job.group // of_thread)))
                    group = arith.addi(group, inside)
                known[key] = places.load(refs[ref], half, group, in_rows=job.in_rows)
            return known[key]

        def scaled(pair: Any, block: int, half: int) -> Any:
            less = "sub.f32 a, a, $3; sub.f32 b, b, $3;" if job.has_zero else ""
            lines = (
                "{ .reg .f32 a, b; .reg .b32 t; shl.b32 t, $1, 16; mov.b32 a, t; and.b32 t, $1, 0xFFFF0000; "
                f"mov.b32 b, t; {less} mul.f32 a, a, $2; mul.f32 b, b, $2; cvt.rn.bf16x2.f32 $0, b, a; }}"
            )
            values = [parameter(ref, half, block) for ref in range(len(refs))]
            return llvm.inline_asm(i32, [pair, *values], lines, ",".join(["=r", "r", *["f"] * len(values)]))

        return _assembled(codes.registers, job.element, scaled)

    return scale(packed, *parameters)


def _assembled(registers: np.ndarray, element: Element, finish: Any) -> Any:
    """Registers of four bytes each, [1, blocks, 1, 1, row halves, …], to those of a product's left operand."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
    two = ir.Type.parse("!llvm.struct<(i32, i32)>")
    count = 8 // element.bits
    found = np.empty((1, 2 * count * registers.shape[1], *registers.shape[2:]), dtype=object)
    for index, register in np.ndenumerate(registers):
        block, half = index[1], index[4]
        for code in range(count):
            lines = "{ " + " ".join(assembly_of(element, code)) + " }"
            both: Any = llvm.inline_asm(two, [mgpu.utils.bitcast(register, i32)], lines, "=r,=r,r")
            for side in range(2):
                value = finish(llvm.extractvalue(i32, both, [side]), block, half)
                place = (0, 2 * count * block + 2 * code + side, *index[2:])
                found[place] = mgpu.utils.bitcast(value, pair)
    return mgpu.FragmentedArray(_registers=found, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


class _Places:
    """Where a thread's rows lie among the 64 of its four warps: 16 a warp, 8 a half, four threads a row."""

    def __init__(self, thread: Any) -> None:
        from jaxlib.mlir.dialects import arith

        inside = arith.remui(thread, self.constant(128))
        lane = arith.remui(inside, self.constant(32))
        warp_rows = arith.muli(arith.divui(inside, self.constant(32)), self.constant(16))
        self.row = arith.addi(warp_rows, arith.divui(lane, self.constant(4)))
        self.quarter = arith.remui(lane, self.constant(4))

    @staticmethod
    def constant(value: int) -> Any:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        i32 = ir.IntegerType.get_signless(32)
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def load(self, ref: Any, half: int, group: Any, *, in_rows: bool) -> Any:
        """The parameter of a group of the thread's row in a half."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref

        row = arith.addi(self.row, self.constant(8 * half))
        where = [arith.index_cast(ir.IndexType.get(), each) for each in ([row, group] if in_rows else [group, row])]
        return memref.load(ref, where)


def _of_rows(job: _Job, parameters: Any, rows: Any) -> Any:
    return parameters.at[rows] if job.in_rows else parameters.at[:, rows]


def _column(job: _Job, parameters: Any, rows: Any, index: int) -> Any:
    """A parameter of each row, of the group `index` of a step."""
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = _mosaic()
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    shape = plgpu.ShapeDtypeStruct((_ROWS,), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(1))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=shape)
    def load(_: Any, ref: Any) -> Any:
        places, one = _Places(mgpu.utils.thread_idx()), ir.VectorType.get((1,), ir.F32Type.get())
        found = np.empty((1, 1, 2, 1, 1), dtype=object)
        for half in range(2):
            value = places.load(ref, half, places.constant(index), in_rows=job.in_rows)
            found[0, 0, half, 0, 0] = vector.broadcast(one, value)
        return mgpu.FragmentedArray(_registers=found, _layout=mgpu.WGMMA_ROW_LAYOUT, _is_signed=None)

    return load(_of_rows(job, parameters, rows))
