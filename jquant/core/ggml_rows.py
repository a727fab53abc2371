"""Rows of an array as ggml's blocks: [..., out, in] to uint8[..., out, blocks · bytes] and back.

The bytes are those of a GGUF file. A row that is no whole number of blocks is padded with zeros, which no file can
express; who writes one refuses.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from jquant.core.errors import InputError
from jquant.core.formats import GGMLBlock
from jquant.core.ggml_decode import decode, halved_ue4m3
from jquant.core.ggml_encode import EXACT
from jquant.core.ggml_search import SEARCHED, TRIES

CHUNK = 1 << 16  # elements searched at a time: with what a step of the search makes of them they stay in cache


def searches(block: GGMLBlock) -> int:
    """How often `encode_rows` rounds an element while it searches, without importance."""
    return 0 if block.name in EXACT else TRIES[block.name]


@partial(jax.jit, static_argnames="block")  # outside jit a call would compile its loop anew, and each small step
def encode_rows(
    x: Float32[Array, "*batch out in"], block: GGMLBlock, importance: Float[Array, " in"] | None = None
) -> UInt8[Array, "*batch out bytes"]:
    """Encodes each row.

    Args:
        x: finite values.
        block: the type.
        importance: weights ≥ 0 of the columns' squared errors, as llama.cpp's importance matrix has them.

    Raises:
        InputError: importance for a type that has no use for it, or of another length than a row.
    """
    if importance is not None and not block.takes_importance:
        raise InputError(f"{block.name} takes no importance: its scales follow from the largest values; leave it out")
    if importance is not None and importance.shape != x.shape[-1:]:
        raise InputError(f"importance of shape {importance.shape} for rows of {x.shape[-1]}: one weight a column")
    tiles = _to_blocks(x, block)
    if importance is None and block.name in EXACT:
        return _flat(EXACT[block.name](tiles))
    weights = None if importance is None else _to_blocks(importance.astype(jnp.float32), block)
    rows = tiles.reshape(-1, *tiles.shape[-2:])
    return _search_in_chunks(rows, weights, block=block).reshape(*x.shape[:-1], -1)


@partial(jax.jit, static_argnames=("block", "columns"))
def decode_rows(
    raw: UInt8[Array, "*batch out bytes"], block: GGMLBlock, columns: int
) -> Float32[Array, "*batch out in"]:
    """Decodes each row to its first `columns` values."""
    values = _flat(decode(block.name, raw.reshape(*raw.shape[:-1], -1, block.nbytes)))
    return values[..., :columns]


def block_scales(raw: UInt8[Array, "*batch out bytes"], block: GGMLBlock) -> Float32[Array, "*batch out scales"]:
    """The floats that the blocks hold, row by row: their scales and, where there are such, minima."""
    blocks = raw.reshape(*raw.shape[:-1], -1, block.nbytes)
    if block.name == "ggml_mxfp4":  # a power of two by its exponent; 255 is infinite
        return jax.lax.bitcast_convert_type(blocks[..., 0].astype(jnp.int32) << 23, jnp.float32)
    if block.name == "ggml_nvfp4":
        return _flat(2 * jnp.asarray(halved_ue4m3(blocks[..., 0:4])))
    pairs = jnp.stack([blocks[..., at : at + 2] for at in block.halves], axis=-2)
    return _flat(jax.lax.bitcast_convert_type(pairs, jnp.float16).astype(jnp.float32))


def _search(block: GGMLBlock, weights: Array | None, rows: Array) -> Array:
    """One chunk of rows [rows, blocks, elements] to [rows, blocks · bytes]."""
    columns = rows.reshape(-1, block.elements).T
    if weights is not None:
        weights = jnp.broadcast_to(weights, rows.shape).reshape(-1, block.elements).T
    return SEARCHED[block.name](columns, weights).T.reshape(rows.shape[0], -1)


def _search_in_chunks(rows: Array, weights: Array | None, *, block: GGMLBlock) -> Array:
    """Rows [rows, blocks, elements] to [rows, blocks · bytes], always in a loop, so that the same program finds all."""
    count = rows.shape[0]
    step = min(count, max(1, CHUNK // (rows.shape[1] * rows.shape[2])))
    short = -count % step
    if short:
        rows = jnp.pad(rows, [(0, short), (0, 0), (0, 0)])
    chunks = rows.reshape(-1, step, *rows.shape[1:])
    encoded = jax.lax.map(partial(_search, block, weights), chunks)
    return encoded.reshape(-1, encoded.shape[-1])[:count]


def _to_blocks(x: Array, block: GGMLBlock) -> Array:
    """[..., in] to [..., blocks, elements], padded with zeros."""
    short = -x.shape[-1] % block.elements
    if short:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, block.elements)


def _flat(x: Array) -> Array:
    """The last two axes as one."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
