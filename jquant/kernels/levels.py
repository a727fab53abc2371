"""Packed codes to their levels in bfloat16, inside a kernel: in jnp, or in NVIDIA's assembly for four bytes at a time.

What Triton makes of shifts and casts of bytes takes some twenty instructions a weight, a code that is looked up a load
each; a byte permutation (PRMT) builds or looks up four bytes at once, so these take one to three.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jquant.core.formats import Codebook, Element, Float, Int


def known(element: Element) -> bool:
    """Whether `levels` reads this format: codes of 2, 4 or 8 bits, which lie in one plane; no large codebooks."""
    if isinstance(element, Codebook):
        return element.bits == 4
    return isinstance(element, Int | Float) and element.bits in (2, 4, 8)


def levels(packed: Array, element: Element, *, assembly: bool) -> list[Array]:
    """The levels of the 8/bits codes that each byte holds, the low bits' first; of integers code − offset.

    Args:
        packed: uint8 [rows, bytes].
        element: `known(element)` must hold.
        assembly: as NVIDIA's instructions (compute capability 8.0), in a Triton kernel only.

    Returns:
        bfloat16 arrays of the shape of `packed`. Exact, but for codebooks, which are rounded once.
    """
    if assembly:
        return _by_assembly(packed, element)
    wide = packed.astype(jnp.int32)
    count = 8 // element.bits
    return [_level((wide >> (element.bits * index)) & (2**element.bits - 1), element) for index in range(count)]


def _level(code: Array, element: Element) -> Array:
    if isinstance(element, Codebook):
        value = jnp.zeros(code.shape, jnp.float32)
        for index, level in enumerate(element.levels()):
            value = jnp.where(code == index, jnp.float32(level), value)
        return value.astype(jnp.bfloat16)
    value = (
        code.astype(jnp.float32) - element.offset
        if isinstance(element, Int)
        else element.decode(code.astype(jnp.uint8))
    )
    return value.astype(jnp.bfloat16)


def _by_assembly(packed: Array, element: Element) -> list[Array]:
    from jax.experimental.pallas import triton

    found = []
    for index in range(8 // element.bits):
        found += triton.elementwise_inline_asm(
            "{\n" + "\n".join(assembly_of(element, index)) + "\n}",
            args=[packed],
            constraints="=r,=r,r",
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.bfloat16)],
        )
    return found


def assembly_of(element: Element, index: int) -> list[str]:
    """For the codes `index` of four bytes in $2: their levels two by two in $0 and $1."""
    if isinstance(element, Int):
        return _eight_bits(element) if element.bits == 8 else _small_integers(element, index)
    assert isinstance(element, Float | Codebook), "`known` refuses others"
    if element.bits == 4:
        return _table(element, index)
    assert isinstance(element, Float), "`known` refuses others"
    return _small_floats(element)


def _small_integers(element: Int, index: int) -> list[str]:
    """A code below the byte 0x43 is 128 + code in bfloat16."""
    mask = 0x01010101 * (2**element.bits - 1)
    return [
        ".reg .b32 t, one, less;",
        f"mov.b32 one, {_pair(1)};",
        f"mov.b32 less, {_pair(-128 - element.offset)};",
        f"shr.b32 t, $2, {element.bits * index};",
        f"and.b32 t, t, {mask:#x};",
        "prmt.b32 $0, t, 0x43434343, 0x4140;",
        "prmt.b32 $1, t, 0x43434343, 0x4342;",
        "fma.rn.bf16x2 $0, $0, one, less;",
        "fma.rn.bf16x2 $1, $1, one, less;",
    ]


def _eight_bits(element: Int) -> list[str]:
    """A code below the bytes 0x4B0000 is 2²³ + code in float32."""
    lines = [".reg .f32 f<4>;", ".reg .b32 t;"]
    origin = int(np.float32(2**23 + element.offset).view(np.uint32))
    for place in range(4):
        lines += [f"prmt.b32 t, $2, 0x4B000000, {0x7650 + place:#x};", f"mov.b32 f{place}, t;"]
        lines.append(f"sub.f32 f{place}, f{place}, 0f{origin:08X};")
    return [*lines, "cvt.rn.bf16x2.f32 $0, f1, f0;", "cvt.rn.bf16x2.f32 $1, f3, f2;"]


def _small_floats(element: Float) -> list[str]:
    """Exponent and mantissa moved to where bfloat16 has them, then scaled by the difference of the biases."""
    lines = [".reg .b32 t, s, scale, zero;", f"mov.b32 scale, {_pair(2.0 ** (127 - element.bias))};"]
    lines.append("mov.b32 zero, 0x80008000;")
    for half, selector in enumerate((0x1404, 0x3424)):
        lines += [f"prmt.b32 s, $2, 0, {selector:#x};", "and.b32 t, s, 0x7F007F00;"]
        lines += [f"shr.b32 t, t, {1 + element.mantissa_bits};", "and.b32 s, s, 0x80008000;", "or.b32 t, t, s;"]
        lines.append(f"fma.rn.bf16x2 ${half}, t, scale, zero;")
    return lines


def _table(element: Codebook | Float, index: int) -> list[str]:
    """High and low bytes of 16 levels, each looked up four at a time: among eight by three bits, twice, then by the
    fourth."""
    table = table_of(element).astype(jnp.bfloat16).view(np.uint16)
    low, high = ((table >> shift).astype(np.uint8).view(np.uint32) for shift in (0, 8))
    lines = [".reg .b32 w, i, s, a, b, h, l;", f"shr.b32 w, $2, {4 * index};", "and.b32 w, w, 0x0F0F0F0F;"]
    lines += ["shr.b32 i, w, 4;", "or.b32 w, w, i;", "prmt.b32 w, w, 0, 0x4420;"]  # four codes side by side
    lines += ["and.b32 i, w, 0x7777;", "and.b32 s, w, 0x8888;", "shr.b32 s, s, 1;", "or.b32 s, s, 0x3210;"]
    for name, words in (("h", high), ("l", low)):
        for part, pair in (("a", words[:2]), ("b", words[2:])):
            lines += [f"mov.b32 {name}, {pair[0]:#x};", f"mov.b32 {part}, {pair[1]:#x};"]
            lines.append(f"prmt.b32 {part}, {name}, {part}, i;")
        lines.append(f"prmt.b32 {name}, a, b, s;")
    return [*lines, "prmt.b32 $0, l, h, 0x5140;", "prmt.b32 $1, l, h, 0x7362;"]


def table_of(element: Codebook | Float) -> np.ndarray:
    """The values of the 16 codes of a format of 4 bits, float32; a code beyond a codebook's levels has the last."""
    levels = element.levels()
    if isinstance(element, Codebook):
        return np.pad(levels, (0, 16 - len(levels)), mode="edge")
    positive = levels[levels >= 0]
    return np.concatenate([positive, -positive])


def _pair(value: float) -> str:
    """A bfloat16 twice, as a constant of 32 bits."""
    bits = int(np.asarray(value, jnp.bfloat16).view(np.uint16))
    return f"{bits << 16 | bits:#x}"
