"""The block types of ggml: how many bytes hold how many weights, and vectorised decoders to float32.

Each decoder maps `blocks` uint8[n, bytes] to `out` float32[n, elements], in place. To add a type, write its decoder
and name it in its row of the table at the end of the file; everything else follows from the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jquant.core.errors import InputError

Decoder = Callable[[np.ndarray, np.ndarray], None]

CHUNK = 1 << 17  # elements decoded at a time: 512 kB of output and its codes stay in a core's second-level cache


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One ggml type: `elements` weights in `nbytes` bytes. `decoder` is None where jquant can only list the type."""

    name: str
    ggml_id: int
    elements: int
    nbytes: int
    decoder: Decoder | None = None


def decode(block_type: BlockType, raw: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Decodes whole blocks to float32, bit for bit as ggml's own numpy package does.

    Args:
        block_type: a row of `BLOCK_TYPES`.
        raw: uint8[n · nbytes], the blocks one after the other.
        out: C-contiguous float32 of any shape with n · elements values, filled in place; None allocates a flat one.

    Returns:
        `out`.

    Raises:
        InputError: the type has no decoder, or the sizes of `raw` and `out` do not agree.

    Reference: ggml/docs/gguf.md and ggml-common.h; checked against gguf-py's `dequantize`.
    """
    if block_type.decoder is None:
        raise InputError(f"ggml type {block_type.name} cannot be decoded; jquant decodes {', '.join(DECODABLE)}")
    count, rest = divmod(raw.size, block_type.nbytes)
    if rest:
        raise InputError(
            f"{raw.size} bytes are no whole number of {block_type.name} blocks of {block_type.nbytes} bytes"
        )
    if out is None:
        out = np.empty(count * block_type.elements, np.float32)
    if out.dtype != np.float32 or not out.flags.c_contiguous or out.size != count * block_type.elements:
        raise InputError(
            f"out must be C-contiguous float32 of {count * block_type.elements} values, got {out.dtype} of {out.size}"
        )
    blocks = raw.reshape(count, block_type.nbytes)
    rows = out.reshape(count, block_type.elements)
    step = max(1, CHUNK // block_type.elements)
    # A scale of Inf or NaN yields Inf and NaN weights; who loads the model names the tensor.
    with np.errstate(invalid="ignore"):
        for start in range(0, count, step):
            block_type.decoder(blocks[start : start + step], rows[start : start + step])
    return out


def _f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks.view("<f4")


def _f16(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks.view("<f2")


def _bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    """A bfloat16 is the upper half of a float32."""
    bits = out.view(np.uint32)
    bits[...] = blocks.view("<u2")
    bits <<= np.uint32(16)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d · (q − 8); f16 d, 16 bytes of nibbles (low: elements 0–15, high: 16–31)."""
    codes = _nibbles(blocks[:, 2:18]).view(np.int8)
    codes -= np.int8(8)
    out[...] = codes
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d · q + m; f16 d, f16 m, 16 bytes of nibbles."""
    out[...] = _nibbles(blocks[:, 4:20])
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d · (q − 16); f16 d, 32 fifth bits (element j at bit j), 16 bytes of nibbles."""
    codes = _nibbles(blocks[:, 6:22])
    codes |= _fifth_bits(blocks[:, 2:6])
    codes = codes.view(np.int8)
    codes -= np.int8(16)
    out[...] = codes
    out *= _half(blocks, 0)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d · q + m; f16 d, f16 m, 32 fifth bits, 16 bytes of nibbles."""
    codes = _nibbles(blocks[:, 8:24])
    codes |= _fifth_bits(blocks[:, 4:8])
    out[...] = codes
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = d · q; f16 d, int8[32]."""
    out[...] = blocks[:, 2:34].view(np.int8)
    out *= _half(blocks, 0)


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = (d · sc) · q − (dmin · mn) in 8 sub-blocks of 32; f16 d, f16 dmin, 12 bytes of 6-bit sc and mn, nibbles.

    Of the four runs of 32 nibble bytes, run i holds sub-block 2i in its low nibbles and 2i + 1 in its high ones.
    """
    scale, minimum = _six_bit_pairs(blocks[:, 4:16])
    nibbles = blocks[:, 16:144].reshape(-1, 4, 32)
    codes = np.empty((len(blocks), 4, 2, 32), np.uint8)
    np.bitwise_and(nibbles, 15, out=codes[:, :, 0])
    np.right_shift(nibbles, 4, out=codes[:, :, 1])
    rows = out.reshape(-1, 8, 32)
    rows[...] = codes.reshape(-1, 8, 32)
    rows *= (_half(blocks, 0) * scale)[:, :, None]
    rows -= (_half(blocks, 2) * minimum)[:, :, None]


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """x = (d · sc) · (q − 32) in 16 sub-blocks of 16; 128 bytes of low nibbles, 64 of upper pairs, int8 sc[16], f16 d.

    Each half of 128 elements takes 64 bytes of low nibbles (elements 0–63 low, 64–127 high) and 32 bytes of upper
    pairs (element 32k + j: bits 2k and 2k + 1 of byte j).
    """
    low = blocks[:, 0:128].reshape(-1, 2, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    codes = np.empty((len(blocks), 2, 2, 64), np.uint8)
    np.bitwise_and(low, 15, out=codes[:, :, 0])
    np.right_shift(low, 4, out=codes[:, :, 1])
    quarters = codes.reshape(-1, 2, 4, 32)
    quarters[:, :, 0] |= (high << 4) & 0x30
    quarters[:, :, 1] |= (high << 2) & 0x30
    quarters[:, :, 2] |= high & 0x30
    quarters[:, :, 3] |= (high >> 2) & 0x30
    signed = codes.view(np.int8)
    signed -= np.int8(32)
    rows = out.reshape(-1, 16, 16)
    rows[...] = signed.reshape(-1, 16, 16)
    rows *= (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[:, :, None]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 at byte `at` of every block, as float32[n, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8[n, 2k] from uint8[n, k]: all low nibbles of a block, then all high ones."""
    half = packed.shape[1]
    codes = np.empty((len(packed), 2 * half), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, :half])
    np.right_shift(packed, 4, out=codes[:, half:])
    return codes


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """uint8[n, 32] of 0 or 16 from the 32 bits of uint8[n, 4], lowest bit first."""
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    bits <<= np.uint8(4)
    return bits


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima float32[n, 8] from the 12 bytes of a Q4_K or Q5_K block (`get_scale_min_k4` in ggml-quants.c).

    Bytes 0–3 and 4–7 hold scales and minima 0–3 in their low six bits and, in the top two, the upper bits of scales
    and minima 4–7, whose lower four bits are the nibbles of bytes 8–11.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minimum = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _table() -> tuple[BlockType, ...]:
    """Every type of ggml.h (enum ggml_type) that a file may hold; sizes as in ggml-common.h."""
    rows: tuple[tuple[str, int, int, int, Decoder | None], ...] = (
        # name, id, elements, bytes, decoder
        ("F32", 0, 1, 4, _f32),
        ("F16", 1, 1, 2, _f16),
        ("Q4_0", 2, 32, 18, _q4_0),
        ("Q4_1", 3, 32, 20, _q4_1),
        ("Q5_0", 6, 32, 22, _q5_0),
        ("Q5_1", 7, 32, 24, _q5_1),
        ("Q8_0", 8, 32, 34, _q8_0),
        ("Q8_1", 9, 32, 36, None),
        ("Q2_K", 10, 256, 84, None),
        ("Q3_K", 11, 256, 110, None),
        ("Q4_K", 12, 256, 144, _q4_k),
        ("Q5_K", 13, 256, 176, None),
        ("Q6_K", 14, 256, 210, _q6_k),
        ("Q8_K", 15, 256, 292, None),
        ("IQ2_XXS", 16, 256, 66, None),
        ("IQ2_XS", 17, 256, 74, None),
        ("IQ3_XXS", 18, 256, 98, None),
        ("IQ1_S", 19, 256, 50, None),
        ("IQ4_NL", 20, 32, 18, None),
        ("IQ3_S", 21, 256, 110, None),
        ("IQ2_S", 22, 256, 82, None),
        ("IQ4_XS", 23, 256, 136, None),
        ("I8", 24, 1, 1, None),
        ("I16", 25, 1, 2, None),
        ("I32", 26, 1, 4, None),
        ("I64", 27, 1, 8, None),
        ("F64", 28, 1, 8, None),
        ("IQ1_M", 29, 256, 56, None),
        ("BF16", 30, 1, 2, _bf16),
        ("TQ1_0", 34, 256, 54, None),
        ("TQ2_0", 35, 256, 66, None),
        ("MXFP4", 39, 32, 17, None),
        ("NVFP4", 40, 64, 36, None),
        ("Q1_0", 41, 128, 18, None),
    )
    return tuple(
        BlockType(name=name, ggml_id=ggml_id, elements=elements, nbytes=nbytes, decoder=decoder)
        for name, ggml_id, elements, nbytes, decoder in rows
    )


BLOCK_TYPES = _table()
BY_ID = {row.ggml_id: row for row in BLOCK_TYPES}
BY_NAME = {row.name: row for row in BLOCK_TYPES}
DECODABLE = tuple(row.name for row in BLOCK_TYPES if row.decoder is not None)
