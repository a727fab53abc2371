"""Codes to the registers in which Hopper's tensor cores take their left operand: what packed_wgmma.py and packed_mma.py
compute between their copies and their products, in Mosaic's dialect and NVIDIA's assembly.

A thread of the four warps that hold 64 rows holds, of two rows (`half` 0 and 1), four bytes in every block of 16:

    bytes of a row, 16 a block      thread 0: 0…3    thread 1: 4…7    thread 2: 8…11    thread 3: 12…15

A product takes 16 inputs, of which a thread holds two pairs. Which codes make a pair is free, as x is put in the same
order (`packed_wgmma.permuted`): the same code of neighbouring bytes, or, where levels are looked up, both of one byte.

Reference: NVIDIA's PTX ISA, wgmma.m64nNk16, for where operands lie; OCP MX 1.0 and OFP8 1.0 for scales in bytes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jquant.core.formats import Codebook, Element, Float, Int
from jquant.core.qtensor import QTensor
from jquant.core.scales import FloatScale, NestedScale, PowerOfTwoScale
from jquant.kernels.levels import assembly_of, table_of

BLOCK = 16  # bytes of a row that four threads hold
ROWS = 64  # of the weight, a group of four warps
LANES = 32  # of a warp, each with its own copy of a table: then none waits for another

ScaleBytes = Literal["e8m0", "e4m3"]


@dataclass(frozen=True, kw_only=True)
class Codes:
    """What is static in the decoding of a step of a row."""

    element: Element
    inputs: int  # of the step
    group: int
    has_zero: bool
    scale_bytes: ScaleBytes | None  # how scales are copied; None: float32
    in_rows: bool  # scales and zero points are [out, groups] there, else [groups, out]

    @property
    def per_byte(self) -> int:
        """Codes."""
        return 8 // self.element.bits

    @property
    def groups(self) -> int:
        """Of a row, in a step; 1 where a group is longer."""
        return max(1, self.inputs // self.group)


def mosaic() -> Any:
    """Imported when a kernel is made; its decorators hide what pyright would have to know."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def load(ref: Any, **options: Any) -> Any:
    """Pallas's `load` of all that a reference names: JAX 0.10 wants an index for that, 0.11 wants none."""
    function: Any = mosaic().load
    wants = inspect.signature(function).parameters["idx"].default is inspect.Parameter.empty
    return function(ref, (), **options) if wants else function(ref, **options)


def looked_up(element: Element) -> bool:
    """Whether levels come from a table of all bytes in shared memory, which is faster than computing them."""
    return element.bits == 4 and isinstance(element, Codebook | Float)


def table(element: Element) -> np.ndarray:
    """int32 [256]: of each byte, the bfloat16 levels of its low code (low half) and of its high one."""
    assert isinstance(element, Codebook | Float), "`looked_up` refuses others"
    level = table_of(element).astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return (level[byte & 15] | level[byte >> 4] << 16).view(np.int32)


def scale_bytes_of(q: QTensor) -> ScaleBytes | None:
    """How a kernel may read scales as they are stored, one byte each: where levels times them are exact in bfloat16."""
    small = isinstance(q.scheme.element, Float) or (isinstance(q.scheme.element, Int) and q.scheme.element.bits <= 4)
    if not small or q.zero_planes is not None:
        return None
    scale = q.scheme.scale
    if isinstance(scale, PowerOfTwoScale):
        return "e8m0"
    return "e4m3" if isinstance(scale, NestedScale) or (isinstance(scale, FloatScale) and scale.bits == 8) else None


def fill(given: Any, held: Any) -> None:
    """Copies a table int32 [256] to shared memory [256, 32] and waits for it; every group of four warps does it."""
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = mosaic()
    from jaxlib.mlir.dialects import arith, memref

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def copy(_: Any, given: Any, held: Any) -> None:
        places = Places(mgpu.utils.thread_idx())
        count = 8  # loads that are under way at a time
        for begin in range(0, 256 // 4, count):
            rows = [arith.addi(places.constant(4 * each), places.warp) for each in range(begin, begin + count)]
            values = [memref.load(given, [_index(row)]) for row in rows]
            for row, value in zip(rows, values, strict=True):
                memref.store(value, held, [_index(row), _index(places.lane)])
        mgpu.utils.warpgroup_barrier()

    copy(given, held)


def levels(codes: Codes, packed: Any, held: Any, first: int, blocks: int) -> Any:
    """The levels of so many blocks of bytes [64, bytes], as a product takes them; `held` is the table or None."""
    plgpu = mosaic()

    shape = plgpu.ShapeDtypeStruct((ROWS, blocks * BLOCK * codes.per_byte), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    tables = [] if held is None else [held]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_8BIT, *[plgpu.RefType()] * len(tables)), return_type=shape)
    def unpack(_: Any, codes_: Any, *tables: Any) -> Any:
        registers = codes_.registers[:, first : first + blocks]
        return _assembled(registers, codes.element, tables, lambda pair, *_: pair)

    return unpack(packed, *tables)


def weights(codes: Codes, packed: Any, held: Any, parameters: list[Any], first: int, blocks: int) -> Any:
    """The same levels, less zero points, scaled and rounded.

    Args:
        codes: what they are.
        packed: bytes of the step, uint8 [64, bytes].
        held: the table, or None.
        parameters: in shared memory the scales of the step's groups, and zero points where there are any.
        first: of the step's blocks.
        blocks: how many of them.
    """
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = mosaic()

    shape = plgpu.ShapeDtypeStruct((ROWS, blocks * BLOCK * codes.per_byte), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    tables = [] if held is None else [held]
    kinds = (plgpu.Layout.WGMMA_8BIT, *[plgpu.RefType()] * (len(parameters) + len(tables)))
    of_block, of_thread = BLOCK * codes.per_byte, 4 * codes.per_byte  # inputs

    @plgpu.inline_mgpu(arg_types=kinds, return_type=shape)
    def scale(_: Any, packed: Any, *refs: Any) -> Any:
        from jaxlib.mlir.dialects import arith

        places = Places(mgpu.utils.thread_idx())
        known: dict[tuple[int, int, int], Any] = {}

        def parameter(ref: int, half: int, block: int) -> Any:
            """Of the group that a thread's codes of a block lie in."""
            start = (first + block) * of_block
            key = (ref, half, start // min(codes.group, of_block))
            if key not in known:
                number = start // codes.group if codes.inputs > codes.group else 0
                inside = None
                if codes.group < of_block:
                    inside = arith.divui(places.quarter, places.constant(max(1, codes.group // of_thread)))
                if codes.scale_bytes is not None:
                    known[key] = _pair_of_byte(byte(ref, half, number, inside), codes.scale_bytes)
                else:
                    group = places.constant(number) if inside is None else arith.addi(places.constant(number), inside)
                    known[key] = places.load(refs[ref], half, group, in_rows=codes.in_rows)
            return known[key]

        def byte(ref: int, half: int, number: int, inside: Any) -> Any:
            """The scale of a group, `inside` groups on; a word holds four, and is loaded once."""
            key = (ref, half, -1 - number // 4)
            if key not in known:
                word = places.load_word(refs[ref], half, number // 4)
                known[key] = word if inside is None else arith.shrui(word, arith.muli(inside, places.constant(8)))
            return arith.shrui(known[key], places.constant(8 * (number % 4)))

        def scaled(pair: Any, block: int, half: int) -> Any:
            values = [parameter(ref, half, block) for ref in range(len(parameters))]
            return _scaled(pair, values) if codes.scale_bytes is None else _scaled_exactly(pair, values[0])

        registers = packed.registers[:, first : first + blocks]
        return _assembled(registers, codes.element, refs[len(parameters) :], scaled)

    return scale(packed, *parameters, *tables)


def part_of(codes: Codes, parameters: Any, rows: Any, groups: Any) -> Any:
    """Of the parameters of a step those of some rows and groups."""
    return parameters.at[rows, groups] if codes.in_rows else parameters.at[groups, rows]


def column(codes: Codes, parameters: Any, rows: Any, index: Any) -> Any:
    """A parameter of each row, of the group `index` of a step, which may be the group of warps' own."""
    from jax.experimental.mosaic import gpu as mgpu

    plgpu = mosaic()
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    shape = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(1))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=shape)
    def load(_: Any, ref: Any) -> Any:
        places, one = Places(mgpu.utils.thread_idx()), ir.VectorType.get((1,), ir.F32Type.get())
        found = np.empty((1, 1, 2, 1, 1), dtype=object)
        for half in range(2):
            value = places.load(ref, half, places.constant(0), in_rows=codes.in_rows)
            found[0, 0, half, 0, 0] = vector.broadcast(one, value)
        return mgpu.FragmentedArray(_registers=found, _layout=mgpu.WGMMA_ROW_LAYOUT, _is_signed=None)

    from jax.experimental import pallas as pl

    return load(part_of(codes, parameters, rows, pl.ds(index, 1)))


def _assembled(registers: np.ndarray, element: Element, tables: Any, finish: Any) -> Any:
    """Registers of four bytes each, [1, blocks, 1, 1, row halves, …], to those of a product's left operand."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir

    i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
    count = 8 // element.bits
    found = np.empty((1, 2 * count * registers.shape[1], *registers.shape[2:]), dtype=object)
    where = _where(tables[0]) if tables else None
    for index, register in np.ndenumerate(registers):
        block, half = index[1], index[4]
        four = mgpu.utils.bitcast(register, i32)
        pairs = _computed(four, element) if where is None else _from_table(four, *where)
        for number, each in enumerate(pairs):
            place = (0, 2 * count * block + number, *index[2:])
            found[place] = mgpu.utils.bitcast(finish(each, block, half), pair)
    return mgpu.FragmentedArray(_registers=found, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _computed(four: Any, element: Element) -> list[Any]:
    """Pairs of levels of four bytes: the first codes of bytes 0 and 1, of 2 and 3, then the next codes."""
    found: list[Any] = []
    for code in range(8 // element.bits):
        lines = "{ " + " ".join(assembly_of(element, code)) + " }"
        found += assembly(lines, "=r,=r,r", [four], results=2)
    return found


def _from_table(four: Any, origin: Any, lane: Any) -> list[Any]:
    """Pairs of levels of four bytes, both codes of a byte in each.

    What all lanes share is added last: a load can do that itself.
    """
    lines = ["{ .reg .b32 t;"]
    for byte in range(4):
        shift = f"shl.b32 t, $4, {7};" if byte == 0 else f"shr.b32 t, $4, {8 * byte - 7};"
        lines.append(f"{shift} lop3.b32 t, t, 0x7F80, $6, 0xEA; add.s32 t, t, $5; ld.shared.b32 ${byte}, [t];")
    return assembly(" ".join(lines) + " }", "=r,=r,=r,=r,r,r,r", [four, origin, lane], results=4)


def _where(held: Any) -> tuple[Any, Any]:
    """Where in shared memory a table [256, 32] begins, and the lane's column of it, in bytes."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i32 = ir.IntegerType.get_signless(32)
    places = Places(mgpu.utils.thread_idx())
    return llvm.ptrtoint(i32, mgpu.utils.memref_ptr(held)), arith.muli(places.lane, places.constant(4))


def _scaled(pair: Any, parameters: list[Any]) -> Any:
    """(level − zero) · scale in float32, rounded once."""
    less = "sub.f32 a, a, $3; sub.f32 b, b, $3;" if len(parameters) > 1 else ""
    lines = (
        "{ .reg .f32 a, b; .reg .b32 t; shl.b32 t, $1, 16; mov.b32 a, t; and.b32 t, $1, 0xFFFF0000; "
        f"mov.b32 b, t; {less} mul.f32 a, a, $2; mul.f32 b, b, $2; cvt.rn.bf16x2.f32 $0, b, a; }}"
    )
    return assembly(lines, ",".join(["=r", "r", *["f"] * len(parameters)]), [pair, *parameters])[0]


def _scaled_exactly(pair: Any, scales: Any) -> Any:
    """Two levels by a scale, which is there twice."""
    lines = "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }"
    return assembly(lines, "=r,r,r", [pair, scales])[0]


def _pair_of_byte(byte: Any, kind: ScaleBytes) -> Any:
    """A scale, the lowest byte, twice in bfloat16. Exponents of e8m0 are bfloat16's; e4m3's are 120 less."""
    if kind == "e8m0":
        lines = (
            "{ .reg .b32 t; shl.b32 t, $1, 7; and.b32 t, t, 0x7F80; max.u32 t, t, 0x40; prmt.b32 $0, t, t, 0x1010; }"
        )
    else:
        lines = (
            "{ .reg .b32 t, s, more, zero; prmt.b32 t, $1, 0, 0x0404; and.b32 s, t, 0x80008000; shr.b32 t, t, 4; "
            "and.b32 t, t, 0x07F007F0; or.b32 t, t, s; mov.b32 more, 0x7B807B80; mov.b32 zero, 0x80008000; "
            "fma.rn.bf16x2 $0, t, more, zero; }"
        )
    return assembly(lines, "=r,r", [byte])[0]


def assembly(
    lines: str, constraints: str, operands: list[Any], results: int = 1, *, effects: bool = False
) -> list[Any]:
    """Results of 32 bits; with `effects` it stays between the waits where it was written."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i32 = ir.IntegerType.get_signless(32)
    if results == 1:
        return [llvm.inline_asm(i32, operands, lines, constraints)]
    all_ = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * results)})>")
    found: Any = llvm.inline_asm(all_, operands, lines, constraints, has_side_effects=effects)
    return [llvm.extractvalue(i32, found, [index]) for index in range(results)]


def _index(value: Any) -> Any:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.index_cast(ir.IndexType.get(), value)


class Places:
    """Where a thread's rows lie among the 64 of its four warps: 16 a warp, 8 a half, four threads a row."""

    def __init__(self, thread: Any) -> None:
        from jaxlib.mlir.dialects import arith

        inside = arith.remui(thread, self.constant(128))
        self.lane, self.warp = arith.remui(inside, self.constant(32)), arith.divui(inside, self.constant(32))
        self.row = arith.addi(arith.muli(self.warp, self.constant(16)), arith.divui(self.lane, self.constant(4)))
        self.quarter = arith.remui(self.lane, self.constant(4))

    @staticmethod
    def constant(value: int) -> Any:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        i32 = ir.IntegerType.get_signless(32)
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def load(self, ref: Any, half: int, group: Any, *, in_rows: bool) -> Any:
        """The parameter of a group of the thread's row in a half."""
        from jaxlib.mlir.dialects import arith, memref

        row = arith.addi(self.row, self.constant(8 * half))
        return memref.load(ref, [_index(each) for each in ([row, group] if in_rows else [group, row])])

    def load_word(self, ref: Any, half: int, word: int) -> Any:
        """Four bytes of the thread's row in a half, of bytes [rows, groups]."""
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        row = arith.addi(self.row, self.constant(8 * half))
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        value = vector.load(four, ref, [_index(row), _index(self.constant(4 * word))])
        return mgpu.utils.bitcast(value, ir.IntegerType.get_signless(32))
