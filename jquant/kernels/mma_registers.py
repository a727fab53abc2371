"""Products with a few rows of x by mma.sync, which takes both operands from registers: what packed_mma.py computes.

A thread has of the left operand the codes of wgmma_registers.py, so of the right one it loads the x that belongs to
them: of the row of x that its number has, four threads each, as many inputs side by side as its four bytes hold codes.

Reference: NVIDIA's PTX ISA, mma.m16n8k16, for where operands lie.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.kernels.wgmma_registers import BLOCK, ROWS, Codes, Places, assembly, looked_up, mosaic

COLUMNS = 8  # rows of x that a product takes, used or not
_ONES = 0x3F803F80  # 1 twice, in bfloat16


def products(codes: Codes, weights: Any, x: Any, own_step: int, first: int, batch: int) -> list[Any]:
    """Weights times x: float32 [64, 8], of which `batch` columns count.

    With zero points there follow the sums of x over the same inputs, in each row of [64, 8].

    Args:
        codes: what they are.
        weights: bfloat16 [64, inputs], of `levels` or `weights`.
        x: in shared memory, bfloat16 [batch, in/256, 256] of a step.
        own_step: inputs of a step that are a group of warps' own.
        first: of their blocks, where the weights begin.
        batch: rows of x, eight at most.
    """
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = mosaic()
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    shape = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, layout=plgpu.Layout.WGMMA)
    of_block, of_thread = BLOCK * codes.per_byte, 4 * codes.per_byte  # inputs

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=[shape] * (2 if codes.has_zero else 1),
    )
    def multiply(_: Any, weights: Any, x: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        places = Places(mgpu.utils.thread_idx())
        row = arith.remui(arith.divui(places.lane, places.constant(4)), places.constant(batch))
        own = arith.muli(arith.divui(mgpu.utils.thread_idx(), places.constant(128)), places.constant(own_step))
        own = arith.addi(own, arith.muli(places.quarter, places.constant(of_thread)))
        own = arith.addi(own, arith.muli(row, places.constant(codes.inputs)))
        origin = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(x))
        origin = arith.addi(origin, arith.muli(own, places.constant(2)))
        words = {}
        for index, register in np.ndenumerate(weights.registers):
            words[index[1], index[4]] = mgpu.utils.bitcast(register, i32)  # of eight inputs, and a half of 16 rows
        nothing = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        ones = [places.constant(_ONES)] * 4
        sums, of_x = [nothing] * 4, [nothing] * 4
        pairs = 2 * codes.per_byte  # of a thread, in a block
        for block in range(weights.shape[1] // of_block):
            inputs = _x_of_block(origin, 2 * (first + block) * of_block, codes)
            for pair in range(0, pairs, 2):
                at = block * pairs + pair
                left = [words[at, 0], words[at, 1], words[at + 1, 0], words[at + 1, 1]]
                sums = _mma(left, inputs[pair : pair + 2], sums)
                if codes.has_zero:
                    of_x = _mma(ones, inputs[pair : pair + 2], of_x)
        two = ir.VectorType.get((2,), f32)

        def whole(four: list[Any]) -> Any:
            found = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((ROWS, COLUMNS)), dtype=object)
            for index in np.ndindex(found.shape):
                half = index[4]
                found[index] = vector.from_elements(two, four[2 * half : 2 * half + 2])
            return mgpu.FragmentedArray(_registers=found, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

        return [whole(each) for each in ([sums, of_x] if codes.has_zero else [sums])]

    return multiply(weights, x)


def _x_of_block(origin: Any, offset: int, codes: Codes) -> list[Any]:
    """Pairs of x that belong to a thread's pairs of codes of a block; `offset` from `origin` is in bytes."""
    count = 2 * codes.per_byte  # words
    names = ", ".join(f"${index}" for index in range(count))
    # Not to be moved across a wait for what it reads, so it is said to have effects.
    lines, wanted = f"ld.shared.v{count}.b32 {{{names}}}, [${count} + {offset}];", ",".join(["=r"] * count)
    words = assembly(lines, f"{wanted},r", [origin], results=count, effects=True)
    if codes.per_byte == 1 or looked_up(codes.element):
        return words
    # Codes of a half of two bytes each: the even ones, and the odd ones.
    found = []
    for selector in ("0x5410", "0x7632"):
        for low, high in (words[:2], words[2:]):
            found += assembly(f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [low, high])
    return found


def _mma(left: list[Any], right: list[Any], sums: list[Any]) -> list[Any]:
    """16 × 8 sums and the products of 16 inputs, a thread's four, four pairs and two pairs."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    f32 = ir.F32Type.get()
    lines = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    kinds = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    all_ = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
    found: Any = llvm.inline_asm(all_, [*left, *right, *sums], lines, kinds)
    return [llvm.extractvalue(f32, found, [index]) for index in range(4)]
