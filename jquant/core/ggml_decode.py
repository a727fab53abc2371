"""ggml's block types decoded: bytes to float32, bit for bit as ggml does, on numpy and jax arrays alike.

Each decoder maps `blocks` uint8[..., bytes] to float32[..., elements]. A file is read through numpy, chunk by chunk
and without a compilation; a packed weight is decoded under jit. Nothing rounds twice where compilers may fuse a product
and a sum: an f16 scale times a whole sub-scale times a code has at most 24 significant bits, so products are exact.

Reference: ggml/docs/gguf.md, ggml-common.h; SPEC 3. Checked against gguf-py's `dequantize`. On a backend that flushes
subnormal numbers (XLA's are such), values of ggml_mxfp4 below 2⁻¹²⁶ come out as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from jquant.core.formats import DOUBLED_E2M1, IQ4_NL_LEVELS, select_by_bits

AnyArray = Array | np.ndarray
Blocks = UInt8[AnyArray, "*n bytes"]
Values = Float32[AnyArray, "*n elements"]
Decoder = Callable[[Any], Any]

_NIBBLES, _PAIRS, _BITS = (0, 4), (0, 2, 4, 6), tuple(range(8))


def q4_0(blocks: Blocks) -> Values:
    """x = d · (q − 8); f16 d, 16 bytes of nibbles (low: elements 0–15, high: 16–31)."""
    return _signed(_nibbles(blocks, 2), 8) * _half(blocks, 0)


def q4_1(blocks: Blocks) -> Values:
    """x = d · q + m; f16 d, f16 m, 16 bytes of nibbles."""
    return _nibbles(blocks, 4).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def q5_0(blocks: Blocks) -> Values:
    """x = d · (q − 16); f16 d, 32 fifth bits (element j at bit j), 16 bytes of nibbles."""
    return _signed(_nibbles(blocks, 6) | _fifth_bits(blocks[..., 2:6]), 16) * _half(blocks, 0)


def q5_1(blocks: Blocks) -> Values:
    """x = d · q + m; f16 d, f16 m, 32 fifth bits, 16 bytes of nibbles."""
    codes = _nibbles(blocks, 8) | _fifth_bits(blocks[..., 4:8])
    return codes.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def q8_0(blocks: Blocks) -> Values:
    """x = d · q; f16 d, int8[32]."""
    return _int8(blocks[..., 2:34]).astype(np.float32) * _half(blocks, 0)


def q2_k(blocks: Blocks) -> Values:
    """x = (d · sc) · q − (dmin · mn) in 16 sub-blocks of 16; 16 bytes of sc (low) and mn (high), codes, f16 d and dmin.

    Each half of 128 elements takes 32 bytes of codes: element 32k + j is at bits 2k and 2k + 1 of byte j.
    """
    codes = _cut(blocks, 16, 80, 32, _PAIRS).reshape(*blocks.shape[:-1], 16, 16)
    scale = _once((blocks[..., 0:16] & 15).astype(np.float32) * _half(blocks, 80))
    minimum = _once((blocks[..., 0:16] >> 4).astype(np.float32) * _half(blocks, 82))
    return _flat(codes.astype(np.float32) * scale[..., None] - minimum[..., None])


def q3_k(blocks: Blocks) -> Values:
    """x = (d · (sc − 32)) · (q − 4) in 16 sub-blocks of 16; third bits, two-bit codes, 12 bytes of six-bit sc, f16 d.

    Element 32k + j has its third bit at bit k of byte j of 32; the lower two lie as in Q2_K.
    """
    codes = _cut(blocks, 32, 96, 32, _PAIRS) | (_cut(blocks, 0, 32, 32, _BITS) << 2)
    scale = _once(_signed(_six_bit(blocks[..., 96:108]), 32) * _half(blocks, 108))
    return _flat(_signed(codes, 4).reshape(*blocks.shape[:-1], 16, 16) * scale[..., None])


def q4_k(blocks: Blocks) -> Values:
    """x = (d · sc) · q − (dmin · mn) in 8 sub-blocks of 32; f16 d, f16 dmin, 12 bytes of six-bit sc and mn, nibbles.

    Of the four runs of 32 nibble bytes, run i holds sub-block 2i in its low nibbles and 2i + 1 in its high ones.
    """
    return _by_scale_and_minimum(_cut(blocks, 16, 144, 32, _NIBBLES), blocks)


def q5_k(blocks: Blocks) -> Values:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: that of element j of sub-block k is bit k of byte j."""
    codes = _cut(blocks, 48, 176, 32, _NIBBLES) | (_cut(blocks, 16, 48, 32, _BITS) << 4)
    return _by_scale_and_minimum(codes, blocks)


def q6_k(blocks: Blocks) -> Values:
    """x = (d · sc) · (q − 32) in 16 sub-blocks of 16; 128 bytes of low nibbles, 64 of upper pairs, int8 sc[16], f16 d.

    Each half of 128 elements takes 64 bytes of low nibbles (elements 0–63 low, 64–127 high) and 32 bytes of upper
    pairs (element 32k + j: bits 2k and 2k + 1 of byte j).
    """
    codes = _cut(blocks, 0, 128, 64, _NIBBLES) | (_cut(blocks, 128, 192, 32, _PAIRS) << 4)
    scale = _once(_int8(blocks[..., 192:208]).astype(np.float32) * _half(blocks, 208))
    return _flat(_signed(codes, 32).reshape(*blocks.shape[:-1], 16, 16) * scale[..., None])


def iq4_nl(blocks: Blocks) -> Values:
    """x = d · level(q), sixteen uneven levels; f16 d, 16 bytes of nibbles."""
    return _levels(IQ4_NL_LEVELS, _nibbles(blocks, 2)) * _half(blocks, 0)


def mxfp4(blocks: Blocks) -> Values:
    """x = 2^(e − 128) · level(q), the levels twice those of e2m1; one byte e, 16 bytes of nibbles.

    Half the exponent at a time: e = 0 would be a subnormal power, though its larger products are none.
    """
    exponent = blocks[..., 0:1].astype(np.int32)
    levels = _levels(DOUBLED_E2M1, _nibbles(blocks, 1))
    return levels * _power_of_two((exponent >> 1) - 64) * _power_of_two(exponent - (exponent >> 1) - 64)


def nvfp4(blocks: Blocks) -> Values:
    """x = s · level(q) / 2 in 4 sub-blocks of 16, the levels twice those of e2m1; 4 bytes s, 8 bytes of nibbles each.

    s is an e4m3 without a sign: its top bit is ignored, and 7F, the NaN of e4m3, is 0.
    """
    levels = _levels(DOUBLED_E2M1, _cut(blocks, 4, 36, 8, _NIBBLES)).reshape(*blocks.shape[:-1], 4, 16)
    return _flat(levels * halved_ue4m3(blocks[..., 0:4])[..., None])


def halved_ue4m3(codes: UInt8[AnyArray, "..."]) -> Float32[AnyArray, "..."]:
    """Half the value of an unsigned e4m3, which the doubled levels of e2m1 make whole again."""
    xp = _namespace(codes)
    exponent, mantissa = (codes >> 3).astype(np.int32) & 15, (codes & 7).astype(np.int32)
    whole = mantissa + xp.where(exponent > 0, 8, 0)
    value = whole.astype(np.float32) * _power_of_two(xp.maximum(exponent, 1) - 11)
    return xp.where(codes == 0x7F, np.float32(0), value)


DECODERS: dict[str, Decoder] = {
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


def _by_scale_and_minimum(codes: Any, blocks: Any) -> Any:
    """Q4_K and Q5_K from their codes [..., 256] and the first 16 bytes of their blocks."""
    scale, minimum = _six_bit_pairs(blocks[..., 4:16])
    scale = _once(scale.astype(np.float32) * _half(blocks, 0))
    minimum = _once(minimum.astype(np.float32) * _half(blocks, 2))
    values = codes.astype(np.float32).reshape(*blocks.shape[:-1], 8, 32)
    return _flat(values * scale[..., None] - minimum[..., None])


def _once(scales: Any) -> Any:
    """The scales of sub-blocks, computed before the elements are: fused into their loop, once for each."""
    return scales if isinstance(scales, np.ndarray) else jax.lax.optimization_barrier(scales)


def _six_bit_pairs(packed: Any) -> tuple[Any, Any]:
    """Scales and minima uint8[..., 8] from the 12 bytes of a Q4_K or Q5_K block (`get_scale_min_k4` in ggml-quants.c).

    Bytes 0–3 and 4–7 hold scales and minima 0–3 in their low six bits and, in the top two, the upper bits of scales
    and minima 4–7, whose lower four bits are the nibbles of bytes 8–11.
    """
    xp = _namespace(packed)
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = xp.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    minimum = xp.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    return scale, minimum


def _six_bit(packed: Any) -> Any:
    """Scales uint8[..., 16] from the 12 bytes of a Q3_K block: nibbles of bytes 0–7, upper pairs in bytes 8–11."""
    return _cut(packed, 0, 8, 8, _NIBBLES) | (_cut(packed, 8, 12, 4, _PAIRS) << 4)


def _nibbles(blocks: Any, start: int) -> Any:
    """uint8[..., 32] from the 16 bytes at `start`: all low nibbles, then all high ones."""
    return _cut(blocks, start, start + 16, 16, _NIBBLES)


def _cut(blocks: Any, start: int, stop: int, run: int, shifts: tuple[int, ...]) -> Any:
    """The bytes from `start` to `stop` cut into codes, uint8[..., codes]: of every `run` bytes first the codes at the
    first shift, then those at the next."""
    mask = (1 << (8 // len(shifts))) - 1
    if isinstance(blocks, np.ndarray):
        # Numpy is slow at short inner loops: runs are moved as single items, and all bytes are shifted in one loop.
        packed = np.ascontiguousarray(blocks[..., start:stop].view(f"V{run}")).view(np.uint8)
        parts = [((packed >> shift if shift else packed) & mask).view(f"V{run}") for shift in shifts]
        return _flat(np.stack(parts, axis=-1).view(np.uint8))
    runs = blocks[..., start:stop].reshape(*blocks.shape[:-1], -1, 1, run)
    codes = (runs >> np.array(shifts, np.uint8)[:, None]) & mask
    return codes.reshape(*blocks.shape[:-1], -1)


def _fifth_bits(packed: Any) -> Any:
    """uint8[..., 32] of 0 or 16 from the 32 bits of uint8[..., 4], lowest bit first."""
    if isinstance(packed, np.ndarray):
        return np.unpackbits(packed, axis=-1, bitorder="little") << 4
    return _flat(((packed[..., None] >> np.arange(8, dtype=np.uint8)) & 1) << 4)


def _half(blocks: Any, at: int) -> Any:
    """The f16 at byte `at` of every block, as float32[..., 1]."""
    pair = blocks[..., at : at + 2]
    if isinstance(pair, np.ndarray):
        return pair.view("<f2").astype(np.float32)
    return jax.lax.bitcast_convert_type(pair, jnp.float16).astype(jnp.float32)[..., None]


def _int8(codes: Any) -> Any:
    return codes.view(np.int8) if isinstance(codes, np.ndarray) else jax.lax.bitcast_convert_type(codes, jnp.int8)


def _signed(codes: Any, zero: int) -> Any:
    """float32 of codes − zero; in bytes, which numpy is fast at."""
    return (_int8(codes) - np.int8(zero)).astype(np.float32)


def _levels(values: tuple[int, ...], codes: Any) -> Any:
    """float32 levels of codes; numpy has no faster way than to look them up, XLA no slower one."""
    table = np.asarray(values, np.float32)
    return np.take(table, codes) if isinstance(codes, np.ndarray) else select_by_bits(codes, table, 4)


def _power_of_two(exponent: Any) -> Any:
    """2^exponent as float32, exactly, for int32 exponents −126 … 127."""
    bits = (exponent + 127) << 23
    return bits.view(np.float32) if isinstance(bits, np.ndarray) else jax.lax.bitcast_convert_type(bits, jnp.float32)


def _flat(x: Any) -> Any:
    """The last two axes as one."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _namespace(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp
