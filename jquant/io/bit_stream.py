"""Codes as a dense stream of bits in 32-bit words, lowest bits first: how compressed-tensors and GPTQ store them.

    word k of a row holds bits 32·k … 32·k + 31 of the stream; code i takes bits b·i … b·i + b − 1

Widths that do not divide 32 cross from one word to the next. A row's last word is filled with zeros.
"""

from __future__ import annotations

import numpy as np

_RUN = 32  # codes that fill whole words, whatever their width


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs along the last axis.

    Args:
        codes: uint8 [..., n], each below 2**bits.
        bits: 1 to 8.

    Returns:
        int32 [..., ⌈n·bits/32⌉].
    """
    *batch, count = codes.shape
    padded = np.zeros((*batch, -(-count // _RUN), _RUN), np.uint8)
    padded.reshape(*batch, -1)[..., :count] = codes
    words = np.zeros((*padded.shape[:-1], bits), np.uint32)
    for index in range(_RUN):
        word, shift = divmod(index * bits, 32)
        code = padded[..., index].astype(np.uint32)
        words[..., word] |= code << np.uint32(shift)
        if shift + bits > 32:
            words[..., word + 1] |= code >> np.uint32(32 - shift)
    return words.reshape(*batch, -1)[..., : word_count(count, bits)].view(np.int32)


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The exact inverse of `pack_words`: uint8 [..., count]."""
    *batch, given = words.shape
    runs = -(-count // _RUN)
    padded = np.zeros((*batch, runs * bits), np.uint32)
    padded[..., :given] = np.ascontiguousarray(words).view(np.uint32)
    padded = padded.reshape(*batch, runs, bits)
    codes = np.empty((*batch, runs, _RUN), np.uint8)
    mask = np.uint32(2**bits - 1)
    for index in range(_RUN):
        word, shift = divmod(index * bits, 32)
        code = padded[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            code = code | (padded[..., word + 1] << np.uint32(32 - shift))
        codes[..., index] = code & mask
    return codes.reshape(*batch, -1)[..., :count]


def word_count(count: int, bits: int) -> int:
    """Words that so many codes take."""
    return -(-count * bits // 32)
