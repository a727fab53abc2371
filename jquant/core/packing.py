"""Codes to packed bytes and back, exactly. The layout is known here and in kernels/, nowhere else.

A code of b bits is cut into planes whose widths are powers of two (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1), low
bits last. A plane of width w holds 8/w neighbours in a byte, the first in the low bits. So every width is dense, a
shard of whole bytes is a shard of whole codes, and every step is a pairwise merge of bytes that compilers vectorize.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

Planes = tuple[Array, ...]

_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def pack(codes: UInt8[Array, "... n"], bits: int) -> Planes:
    """Packs codes in [0, 2**bits) along the last axis.

    Args:
        codes: uint8 [..., n].
        bits: 1 to 8.

    Returns:
        One uint8 array [..., ⌈n·w/8⌉] a plane, widest plane first; `unpack(…, bits, n)` is the exact inverse.
    """
    if bits == 8:
        return (codes,)
    # The barrier keeps the encoder out of the byte shuffles: fused into them it runs scalar, 2.5× slower on CPU.
    codes = jax.lax.optimization_barrier(codes)
    planes, shift = [], bits
    for width in _WIDTHS[bits]:
        shift -= width
        plane = codes if width == 8 else (codes >> shift) & (2**width - 1)
        planes.append(_merge(plane, width))
    return tuple(planes)


def unpack(planes: Planes, bits: int, count: int) -> UInt8[Array, "... n"]:
    """The exact inverse of `pack`: uint8 codes [..., count]."""
    codes, shift = None, bits
    for plane, width in zip(planes, _WIDTHS[bits], strict=True):
        shift -= width
        part = _split(plane, width)[..., :count] << shift
        codes = part if codes is None else codes | part
    assert codes is not None
    return codes


def packed_bytes(bits: int, count: int) -> int:
    """Bytes that `count` codes take."""
    return sum(-(-count * width // 8) for width in _WIDTHS[bits])


def _merge(plane: Array, width: int) -> Array:
    """Neighbouring codes into one byte: pairs of width w become one of width 2w, until it is 8."""
    short = -plane.shape[-1] % (8 // width)
    if short:
        plane = jnp.pad(plane, [(0, 0)] * (plane.ndim - 1) + [(0, short)])
    while width < 8:
        pairs = plane.reshape(*plane.shape[:-1], plane.shape[-1] // 2, 2)
        word = jax.lax.bitcast_convert_type(pairs, jnp.uint16)
        plane = (word | (word >> (8 - width))).astype(jnp.uint8)
        width *= 2
    return plane


def _split(plane: Array, width: int) -> Array:
    """The inverse of `_merge`, padding included."""
    merged = 8
    while merged > width:
        merged //= 2
        word = plane.astype(jnp.uint16)
        word = (word | (word << (8 - merged))) & (0x0101 * (2**merged - 1))
        pairs = jax.lax.bitcast_convert_type(word, jnp.uint8)
        plane = pairs.reshape(*plane.shape[:-1], plane.shape[-1] * 2)
    return plane
