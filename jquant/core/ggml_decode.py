"""ggml's block types decoded: bytes to float32, bit for bit as ggml does, on numpy and jax arrays alike.

A type is a function from `blocks` uint8[..., bytes] to `Parts`: codes, one scale a tile and perhaps one offset;
x = code · scale + offset, formed in one place. A file is read through numpy, chunk by chunk and without a compilation;
a packed weight is decoded under jit. Nothing rounds twice where compilers may fuse a product and a sum: an f16 scale
times a whole sub-scale times a code has at most 24 significant bits, so products are exact.

Reference: ggml/docs/gguf.md, ggml-common.h; SPEC 3. Checked against gguf-py's `dequantize`. On a backend that flushes
subnormal numbers (XLA's are such), values of ggml_mxfp4 below 2⁻¹²⁶ come out as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from jquant.core.formats import DOUBLED_E2M1, IQ4_NL_LEVELS, select_by_bits

AnyArray = Array | np.ndarray
Blocks = UInt8[AnyArray, "*n bytes"]

_CACHED = 1 << 16  # elements, a multiple of every tile: a quarter of a megabyte of values stays in a second-level cache
_NIBBLES, _PAIRS, _BITS = (0, 4), (0, 2, 4, 6), tuple(range(8))


class Parts(NamedTuple):
    """What a block holds: element j is codes[j] · scale[t] + offset[t], t the tile of equal length that j lies in."""

    codes: Any  # integers or float32 [..., elements]
    scale: Any  # float32 [..., tiles]
    offset: Any = None  # float32 [..., tiles], or None for none


def decode(name: str, blocks: UInt8[Array, "*n bytes"]) -> Float32[Array, "*n elements"]:
    """The values of blocks of a type, traced or not."""
    parts = PARTS[name](blocks)
    # Scales are computed before the elements are; fused into their loop they would be computed once for each.
    scale, offset = jax.lax.optimization_barrier((parts.scale, parts.offset))
    values = parts.codes.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
    return _flat(values if offset is None else values + offset[..., None])


def decode_into(out: Float32[np.ndarray, "n elements"], name: str, blocks: UInt8[np.ndarray, "n bytes"]) -> None:
    """The same in numpy, to `out`, which is C-contiguous."""
    parts = PARTS[name](blocks)
    codes, values, scale = parts.codes.reshape(-1), out.reshape(-1), parts.scale.reshape(-1)
    offset = None if parts.offset is None else parts.offset.reshape(-1)
    tile = values.size // scale.size
    for start in range(0, values.size, _CACHED):
        some, tiles = values[start : start + _CACHED], slice(start // tile, (start + _CACHED) // tile)
        np.copyto(some, codes[start : start + _CACHED], casting="unsafe")
        some *= np.repeat(scale[tiles], tile)  # one long loop over repeated scales beats a short loop a tile
        if offset is not None:
            some += np.repeat(offset[tiles], tile)


def q4_0(blocks: Blocks) -> Parts:
    """x = d · (q − 8); f16 d, 16 bytes of nibbles (low: elements 0–15, high: 16–31)."""
    return Parts(_signed(_nibbles(blocks, 2), 8), _half(blocks, 0))


def q4_1(blocks: Blocks) -> Parts:
    """x = d · q + m; f16 d, f16 m, 16 bytes of nibbles."""
    return Parts(_nibbles(blocks, 4), _half(blocks, 0), _half(blocks, 2))


def q5_0(blocks: Blocks) -> Parts:
    """x = d · (q − 16); f16 d, 32 fifth bits (element j at bit j), 16 bytes of nibbles."""
    return Parts(_signed(_nibbles(blocks, 6) | _fifth_bits(blocks, 2), 16), _half(blocks, 0))


def q5_1(blocks: Blocks) -> Parts:
    """x = d · q + m; f16 d, f16 m, 32 fifth bits, 16 bytes of nibbles."""
    return Parts(_nibbles(blocks, 8) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2))


def q8_0(blocks: Blocks) -> Parts:
    """x = d · q; f16 d, int8[32]."""
    return Parts(_int8(_bytes(blocks, 2, 34)), _half(blocks, 0))


def q2_k(blocks: Blocks) -> Parts:
    """x = (d · sc) · q − (dmin · mn) in 16 sub-blocks of 16; 16 bytes of sc (low) and mn (high), codes, f16 d and dmin.

    Each half of 128 elements takes 32 bytes of codes: element 32k + j is at bits 2k and 2k + 1 of byte j.
    """
    both = _bytes(blocks, 0, 16)
    scale, minimum = (both & 15).astype(np.float32), (both >> 4).astype(np.float32)
    return Parts(_cut(blocks, 16, 80, 32, _PAIRS), scale * _half(blocks, 80), minimum * -_half(blocks, 82))


def q3_k(blocks: Blocks) -> Parts:
    """x = (d · (sc − 32)) · (q − 4) in 16 sub-blocks of 16; third bits, two-bit codes, 12 bytes of six-bit sc, f16 d.

    Element 32k + j has its third bit at bit k of byte j of 32; the lower two lie as in Q2_K.
    """
    codes = _cut(blocks, 32, 96, 32, _PAIRS) | (_cut(blocks, 0, 32, 32, _BITS) * np.uint8(4))
    return Parts(_signed(codes, 4), _signed(_six_bit(blocks, 96), 32).astype(np.float32) * _half(blocks, 108))


def q4_k(blocks: Blocks) -> Parts:
    """x = (d · sc) · q − (dmin · mn) in 8 sub-blocks of 32; f16 d, f16 dmin, 12 bytes of six-bit sc and mn, nibbles.

    Of the four runs of 32 nibble bytes, run i holds sub-block 2i in its low nibbles and 2i + 1 in its high ones.
    """
    return Parts(_cut(blocks, 16, 144, 32, _NIBBLES), *_scale_and_offset(blocks))


def q5_k(blocks: Blocks) -> Parts:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: that of element j of sub-block k is bit k of byte j."""
    codes = _cut(blocks, 48, 176, 32, _NIBBLES) | (_cut(blocks, 16, 48, 32, _BITS) * np.uint8(16))
    return Parts(codes, *_scale_and_offset(blocks))


def q6_k(blocks: Blocks) -> Parts:
    """x = (d · sc) · (q − 32) in 16 sub-blocks of 16; 128 bytes of low nibbles, 64 of upper pairs, int8 sc[16], f16 d.

    Each half of 128 elements takes 64 bytes of low nibbles (elements 0–63 low, 64–127 high) and 32 bytes of upper
    pairs (element 32k + j: bits 2k and 2k + 1 of byte j).
    """
    codes = _cut(blocks, 0, 128, 64, _NIBBLES) | (_cut(blocks, 128, 192, 32, _PAIRS) * np.uint8(16))
    return Parts(_signed(codes, 32), _int8(_bytes(blocks, 192, 208)).astype(np.float32) * _half(blocks, 208))


def iq4_nl(blocks: Blocks) -> Parts:
    """x = d · level(q), sixteen uneven levels; f16 d, 16 bytes of nibbles."""
    return Parts(_levels(IQ4_NL_LEVELS, _nibbles(blocks, 2)), _half(blocks, 0))


def mxfp4(blocks: Blocks) -> Parts:
    """x = 2^(e − 128) · level(q), the levels twice those of e2m1; one byte e, 16 bytes of nibbles.

    Half the exponent at a time: e = 0 would be a subnormal power, though its larger products are none.
    """
    exponent = _bytes(blocks, 0, 1).astype(np.int32)
    levels = _levels(DOUBLED_E2M1, _nibbles(blocks, 1)).astype(np.float32)
    return Parts(levels * _power_of_two((exponent >> 1) - 64), _power_of_two(exponent - (exponent >> 1) - 64))


def nvfp4(blocks: Blocks) -> Parts:
    """x = s · level(q) / 2 in 4 sub-blocks of 16, the levels twice those of e2m1; 4 bytes s, 8 bytes of nibbles each.

    s is an e4m3 without a sign: its top bit is ignored, and 7F, the NaN of e4m3, is 0.
    """
    return Parts(_levels(DOUBLED_E2M1, _cut(blocks, 4, 36, 8, _NIBBLES)), halved_ue4m3(_bytes(blocks, 0, 4)))


def halved_ue4m3(codes: UInt8[AnyArray, "..."]) -> Float32[AnyArray, "..."]:
    """Half the value of an unsigned e4m3, which the doubled levels of e2m1 make whole again."""
    xp = _namespace(codes)
    exponent, mantissa = (codes >> 3).astype(np.int32) & 15, (codes & 7).astype(np.int32)
    whole = mantissa + xp.where(exponent > 0, 8, 0)
    value = whole.astype(np.float32) * _power_of_two(xp.maximum(exponent, 1) - 11)
    return xp.where(codes == 0x7F, np.float32(0), value)


PARTS: dict[str, Callable[[Any], Parts]] = {
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q5_0": q5_0,
    "q5_1": q5_1,
    "q8_0": q8_0,
    "q2_k": q2_k,
    "q3_k": q3_k,
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
    "iq4_nl": iq4_nl,
    "ggml_mxfp4": mxfp4,
    "ggml_nvfp4": nvfp4,
}


def _scale_and_offset(blocks: Any) -> tuple[Any, Any]:
    """d · sc and −dmin · mn, float32[..., 8], from the first 16 bytes of a Q4_K or Q5_K block (`get_scale_min_k4`).

    Of the twelve from byte 4 on, bytes 0–3 and 4–7 hold sc and mn 0–3 in their low six bits and, in the top two, the
    upper bits of sc and mn 4–7, whose lower four bits are the nibbles of bytes 8–11.
    """
    first, second, third = _bytes(blocks, 4, 8), _bytes(blocks, 8, 12), _bytes(blocks, 12, 16)
    scale = _join(first & 63, (third & 15) | ((first >> 6) << 4)).astype(np.float32)
    minimum = _join(second & 63, (third >> 4) | ((second >> 6) << 4)).astype(np.float32)
    return scale * _half(blocks, 0), minimum * -_half(blocks, 2)


def _six_bit(blocks: Any, start: int) -> Any:
    """Scales uint8[..., 16] from the 12 bytes of a Q3_K block: nibbles of bytes 0–7, upper pairs in bytes 8–11."""
    return _cut(blocks, start, start + 8, 8, _NIBBLES) | (_cut(blocks, start + 8, start + 12, 4, _PAIRS) << 4)


def _nibbles(blocks: Any, start: int) -> Any:
    """uint8[..., 32] from the 16 bytes at `start`: all low nibbles, then all high ones."""
    return _cut(blocks, start, start + 16, 16, _NIBBLES)


def _cut(blocks: Any, start: int, stop: int, run: int, shifts: tuple[int, ...]) -> Any:
    """The bytes from `start` to `stop` cut into codes, uint8[..., codes]: of every `run` bytes first the codes at the
    first shift, then those at the next."""
    mask = (1 << (8 // len(shifts))) - 1
    if isinstance(blocks, np.ndarray):
        packed = _bytes(blocks, start, stop).reshape(-1).view(np.uint32)  # four bytes at a time: shifts are faster so
        codes = np.empty((packed.nbytes // run, len(shifts)), f"V{run}")
        for place, shift in enumerate(shifts):
            codes[:, place] = ((packed >> np.uint32(shift)) & np.uint32(0x01010101 * mask)).view(codes.dtype)
        return codes.view(np.uint8).reshape(*blocks.shape[:-1], -1)
    runs = blocks[..., start:stop].reshape(*blocks.shape[:-1], -1, 1, run)
    return ((runs >> np.array(shifts, np.uint8)[:, None]) & mask).reshape(*blocks.shape[:-1], -1)


def _bytes(blocks: Any, start: int, stop: int) -> Any:
    """The bytes from `start` to `stop` of every block, in numpy side by side and moved as single items: its loops are
    slow where they are short."""
    part = blocks[..., start:stop]
    if isinstance(part, np.ndarray):
        return np.ascontiguousarray(part.view(f"V{stop - start}")).view(np.uint8)
    return part


def _join(first: Any, second: Any) -> Any:
    """uint8[..., 4] twice to [..., 8]."""
    if isinstance(first, np.ndarray):
        return np.stack([first.view("u4"), second.view("u4")], axis=-1).view(np.uint8).reshape(*first.shape[:-1], 8)
    return jnp.concatenate([first, second], axis=-1)


def _fifth_bits(blocks: Any, start: int) -> Any:
    """uint8[..., 32] of 0 or 16 from the 32 bits in the 4 bytes at `start`, lowest bit first."""
    packed = _bytes(blocks, start, start + 4)
    if isinstance(packed, np.ndarray):
        return np.unpackbits(packed, bitorder="little").reshape(*blocks.shape[:-1], 32) * np.uint8(16)
    return _flat(((packed[..., None] >> np.arange(8, dtype=np.uint8)) & 1) << 4)


def _half(blocks: Any, at: int) -> Any:
    """The f16 at byte `at` of every block, as float32[..., 1]."""
    pair = _bytes(blocks, at, at + 2)
    if isinstance(pair, np.ndarray):
        return pair.view("<f2").astype(np.float32)
    return jax.lax.bitcast_convert_type(pair, jnp.float16).astype(jnp.float32)[..., None]


def _int8(codes: Any) -> Any:
    return codes.view(np.int8) if isinstance(codes, np.ndarray) else jax.lax.bitcast_convert_type(codes, jnp.int8)


def _signed(codes: Any, zero: int) -> Any:
    """int8 of codes − zero."""
    return _int8(codes) - np.int8(zero)


def _levels(values: tuple[int, ...], codes: Any) -> Any:
    """The levels of codes. Numpy's own way to look them up takes thrice the time of a bytearray's."""
    if isinstance(codes, np.ndarray):
        table = np.resize(np.asarray(values, np.int8), 256).tobytes()
        return np.frombuffer(bytearray(codes).translate(table), np.int8).reshape(codes.shape)
    return select_by_bits(codes, np.asarray(values, np.float32), 4)


def _power_of_two(exponent: Any) -> Any:
    """2^exponent as float32, exactly, for int32 exponents −126 … 127."""
    bits = (exponent + 127) << 23
    return bits.view(np.float32) if isinstance(bits, np.ndarray) else jax.lax.bitcast_convert_type(bits, jnp.float32)


def _flat(x: Any) -> Any:
    """The last two axes as one."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _namespace(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp
