"""The types of ggml that a file may hold: how many bytes hold how many weights, and how they are decoded, in numpy.

To add a type, name its decoder, which fills floats [n, elements] from `blocks` uint8[n, bytes], in its row of the table
at the end of the file. Those of the quantized types are core's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jquant.core.errors import InputError
from jquant.io.mapped import aligned_empty

Decoder = Callable[[np.ndarray, np.ndarray], None]

CHUNK = (
    1 << 19
)  # elements decoded at a time: enough to outweigh some fifty calls of numpy, and their codes stay in cache


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
        out = aligned_empty((count * block_type.elements,), np.dtype(np.float32))
    if out.dtype != np.float32 or not out.flags.c_contiguous or out.size != count * block_type.elements:
        raise InputError(
            f"out must be C-contiguous float32 of {count * block_type.elements} values, got {out.dtype} of {out.size}"
        )
    blocks = raw.reshape(count, block_type.nbytes)
    rows = out.reshape(count, block_type.elements)
    step = max(1, CHUNK // block_type.elements)
    if count > step:
        _keep_freed_memory()
    # A scale of Inf or NaN yields Inf and NaN weights; who loads the model names the tensor.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, count, step):
            block_type.decoder(blocks[start : start + step], rows[start : start + step])
    return out


def _keep_freed_memory() -> None:
    """Lets glibc hold on to what temporary arrays free, which it else returns to the system and takes, zeroed, anew.

    That can take more time than all else. Its bound is twice the largest mapped piece freed so far, at most 64 MiB
    (M_TRIM_THRESHOLD in mallopt(3)); this one is never touched.
    """
    np.empty(16 << 20, np.uint8)


def _f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    """A bfloat16 is the upper half of a float32."""
    np.left_shift(blocks.view("<u2"), np.uint32(16), out=out.view(np.uint32))


def _of_core(name: str) -> Decoder:
    """A decoder of core, which is imported with its first block: it brings jax, and listing a file needs none."""

    def decoder(blocks: np.ndarray, out: np.ndarray) -> None:
        from jquant.core.ggml_decode import decode_into

        decode_into(out, name, blocks)

    return decoder


def _table() -> tuple[BlockType, ...]:
    """Every type of ggml.h (enum ggml_type) that a file may hold; sizes as in ggml-common.h."""
    rows: tuple[tuple[str, int, int, int, Decoder | None], ...] = (
        # name, id, elements, bytes, decoder
        ("F32", 0, 1, 4, _f32),
        ("F16", 1, 1, 2, _f16),
        ("Q4_0", 2, 32, 18, _of_core("q4_0")),
        ("Q4_1", 3, 32, 20, _of_core("q4_1")),
        ("Q5_0", 6, 32, 22, _of_core("q5_0")),
        ("Q5_1", 7, 32, 24, _of_core("q5_1")),
        ("Q8_0", 8, 32, 34, _of_core("q8_0")),
        ("Q8_1", 9, 32, 36, None),
        ("Q2_K", 10, 256, 84, _of_core("q2_k")),
        ("Q3_K", 11, 256, 110, _of_core("q3_k")),
        ("Q4_K", 12, 256, 144, _of_core("q4_k")),
        ("Q5_K", 13, 256, 176, _of_core("q5_k")),
        ("Q6_K", 14, 256, 210, _of_core("q6_k")),
        ("Q8_K", 15, 256, 292, None),
        ("IQ2_XXS", 16, 256, 66, None),
        ("IQ2_XS", 17, 256, 74, None),
        ("IQ3_XXS", 18, 256, 98, None),
        ("IQ1_S", 19, 256, 50, None),
        ("IQ4_NL", 20, 32, 18, _of_core("iq4_nl")),
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
        ("MXFP4", 39, 32, 17, _of_core("ggml_mxfp4")),
        ("NVFP4", 40, 64, 36, _of_core("ggml_nvfp4")),
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
