"""X_q · W_qᵀ · s_x · s_w + b on Hopper's tensor cores, int8 or fp8, scaled and rounded before it leaves the chip.

    y[m, n] = (Σ_k x_mk · w_nk) · s_m · s_n + b_n        int8: int32 sums, exact; fp8: float32 sums

XLA writes the sums to memory and scales them in another kernel: at 8192³ a third of the time. Here a program makes 128
× 256 of yᵀ: weights are the left operand, for int8 by way of registers, where codes with an offset (128 + w, as a
QTensor holds them) become signed ones by one operation a word. Neighbouring programs share the rows of x (a cluster,
TMA multicast): otherwise what comes out of the L2 cache would be the limit. Results turn on their way through shared
memory (stmatrix), so that y is [batch, out].

Reference: SmoothQuant (Xiao et al., 2211.10438), 2; NVIDIA's PTX ISA, wgmma and stmatrix, for where operands lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32

from jquant.kernels.wgmma_registers import ROWS, load, mosaic

_WARPGROUPS = 2  # of 64 rows of the weight each
_COLUMNS = 256  # rows of x, a program
_STEP = 128  # inputs, which are bytes
_STORED = 64  # columns that are written at a time


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut."""

    stages: int = 4  # steps whose operands are on chip
    cluster: int = 2  # programs that share rows of x
    width: int = 8  # of the stripe in which programs follow each other, in tiles


def fits(rows: int, out: int, inputs: int) -> bool:
    """Whether the kernel multiplies rows of x with weights [out, inputs], and is worth its whole tiles."""
    return rows > _COLUMNS // 2 and out % (ROWS * _WARPGROUPS) == 0 and inputs % _STEP == 0


@partial(jax.jit, static_argnames="tiling")
def matmul(
    x: Array,
    weight: Array,
    x_scale: Float32[Array, " batch"],
    weight_scale: Float32[Array, " out"],
    bias: Float32[Array, " out"] | None = None,
    *,
    tiling: Tiling | None = None,
) -> BFloat16[Array, "batch out"]:
    """y of above.

    Args:
        x: int8 or float8_e4m3fn [batch, in].
        weight: of int8 x the codes as they are packed, uint8 128 + w; else fp8 as x. [out, in]; see `fits`.
        x_scale: a row of x.
        weight_scale: a row of the weight.
        bias: added in float32.
        tiling: by default what was fastest on an H100.

    Jitted, so that a program's equal products are lowered once.
    """
    tiling = Tiling() if tiling is None else tiling
    batch, out = len(x), len(weight)
    padded = -(-batch // _COLUMNS) * _COLUMNS
    # Scales of the padding too: what is read must be there.
    x = jnp.pad(x, ((0, padded - batch), (0, 0)))
    x_scale = jnp.pad(x_scale, (0, padded - batch))
    per_row = [weight_scale] if bias is None else [weight_scale, bias]
    return _call(padded, out, x.shape[1], x.dtype, tiling)(weight, x, x_scale, *per_row)[:batch]


def _call(batch: int, out: int, inputs: int, dtype: Any, tiling: Tiling) -> Any:
    """The kernel as a function of weight, x, scales of x and of the weight, and a bias or none."""
    from jax import lax
    from jax.experimental import pallas as pl

    plgpu = mosaic()

    is_int = dtype == jnp.int8
    rows = ROWS * _WARPGROUPS
    cluster = tiling.cluster if out % (rows * tiling.cluster) == 0 else 1
    tiles = (out // rows // cluster, batch // _COLUMNS)
    parts = 2 if is_int else 1  # of a step: see packed_wgmma.py
    part = _STEP // parts

    def kernel(weight_ref: Any, x_ref: Any, x_scale_ref: Any, *refs: Any, staged: Any) -> None:
        *per_row, out_ref = refs
        group, column = plgpu.planar_snake(lax.axis_index("tiles"), tiles, 0, tiling.width)
        row = group * cluster + lax.axis_index("cluster")
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * ROWS, ROWS)
        begin_row = row * rows + warpgroup * ROWS

        def multiply(_: Any, codes: Any, x: Any, total: Any) -> Any:
            if is_int:
                packed = load(codes.at[mine], layout=plgpu.Layout.WGMMA_8BIT)
                for begin in range(0, _STEP, part):
                    plgpu.wgmma(total, _signed(packed, begin, part), x.at[:, begin : begin + part].T)
                    plgpu.wgmma_wait(1)
            else:
                plgpu.wgmma(total, codes.at[mine], x.T)
                plgpu.wgmma_wait(1)
            return total

        def store(total: Any) -> None:
            by_row = [
                load(ref.at[pl.ds(begin_row, ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                for ref in per_row
            ]
            for index, begin in enumerate(range(0, _COLUMNS, _STORED)):
                here = staged.at[warpgroup, index % 2]
                begin_column = column * _COLUMNS + begin
                by_column = load(
                    x_scale_ref.at[pl.ds(begin_column, _STORED)],
                    layout=plgpu.Layout.WGMMA.reduce(0),
                    optimized=False,
                )
                value = total[:, begin : begin + _STORED].astype(jnp.float32)
                value = value * lax.broadcast_in_dim(by_column, value.shape, [1])
                value = value * lax.broadcast_in_dim(by_row[0], value.shape, [0])
                if len(by_row) > 1:
                    value = value + lax.broadcast_in_dim(by_row[1], value.shape, [0])
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                _store_turned(value.astype(jnp.bfloat16), here)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(here, out_ref.at[pl.ds(begin_column, _STORED), pl.ds(begin_row, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        def work(run: Any) -> None:
            def whole(total: Any) -> None:
                run(total)
                store(total[...])

            pl.run_scoped(whole, plgpu.ACC((ROWS, _COLUMNS), jnp.int32 if is_int else jnp.float32))

        def block(sizes: tuple[int, int], index: Any, swizzle: int, shared: tuple[str, ...]) -> Any:
            return plgpu.BlockSpec(sizes, index, transforms=_tiled(swizzle, 8), delay_release=1, collective_axes=shared)

        plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(inputs // _STEP,),
            memory_registers=40,
            in_specs=[
                block((rows, _STEP), lambda t: (row, t), _STEP, ()),
                block((_COLUMNS, _STEP), lambda t: (column, t), part, ("cluster",) if cluster > 1 else ()),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=_WARPGROUPS,
            max_concurrent_steps=tiling.stages,
            compute_context=work,
        )(weight_ref, x_ref)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, out), jnp.bfloat16),
        grid=(tiles[0] * tiles[1],),
        grid_names=("tiles",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types={"staged": plgpu.SMEM((_WARPGROUPS, 2, _STORED, ROWS), jnp.bfloat16, transforms=_tiled(128, 16))},
    )


def _tiled(swizzle: int, bits: int) -> tuple[Any, ...]:
    plgpu = mosaic()
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def _signed(packed: Any, begin: int, count: int) -> Any:
    """Columns of codes with an offset of 128, [64, inputs of a step], as signed ones: the highest bit flipped."""
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = mosaic()
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    shape = plgpu.ShapeDtypeStruct((ROWS, count), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_8BIT,), return_type=shape)
    def flip(_: Any, codes: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        highest = arith.constant(i32, ir.IntegerAttr.get(i32, -0x7F7F7F80))  # 0x80808080
        chosen = codes.registers[:, begin // 16 : (begin + count) // 16]
        found = np.empty(chosen.shape, dtype=object)
        for index, register in np.ndenumerate(chosen):
            flipped = arith.xori(mgpu.utils.bitcast(register, i32), highest)
            found[index] = mgpu.utils.bitcast(flipped, register.type)
        return mgpu.FragmentedArray(_registers=found, _layout=codes.layout, _is_signed=True)

    return flip(packed)


def _store_turned(value: Any, staged: Any) -> None:
    """bfloat16 [64 rows, 64 columns] to shared memory [64 columns, 64 rows], in 128-byte swizzle.

    A matrix of 8 × 8 is stored by its columns, 16 bytes each. Column c begins at byte 128·c; its eight rows from 8·i
    on are the sixteen bytes number i xor c mod 8 there.
    """
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = mosaic()
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(_tiled(128, 16))))
    def store(_: Any, value: Any, staged: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)

        def number(given: int) -> Any:
            return arith.constant(i32, ir.IntegerAttr.get(i32, given))

        thread = arith.remui(mgpu.utils.thread_idx(), number(128))
        lane, warp = arith.remui(thread, number(32)), arith.divui(thread, number(32))
        inside, matrix = arith.remui(lane, number(8)), arith.divui(lane, number(8))
        # Lane 8·m + i gives the place of column i of matrix m: rows of half m mod 2, of the (m div 2)-th eight columns.
        half, later = arith.remui(matrix, number(2)), arith.divui(matrix, number(2))
        chunk = arith.xori(arith.addi(arith.muli(warp, number(2)), half), inside)
        own_column = arith.addi(arith.muli(later, number(8)), inside)
        origin = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(staged))
        at = arith.addi(arith.muli(own_column, number(128)), arith.muli(chunk, number(16)))
        at = arith.addi(origin, at)
        words: dict[tuple[int, int], Any] = {}
        for index, register in np.ndenumerate(value.registers):
            words[index[1], index[4]] = mgpu.utils.bitcast(register, i32)  # of eight columns, and a half of 16 rows
        for eight in range(0, _STORED // 8, 2):
            four = [words[eight, 0], words[eight, 1], words[eight + 1, 0], words[eight + 1, 1]]
            place = arith.addi(at, number(128 * 8 * eight))
            lines = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"), [place, *four], lines, "r,r,r,r,r,~{memory}", has_side_effects=True
            )

    store(value, staged)
