"""Dense streams of codes: exact inverses, and the bits of the definition."""

from __future__ import annotations

import numpy as np
import pytest

from jquant.io.bit_stream import pack_words, unpack_words, word_count


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 50, 96])
def test_there_and_back_and_bit_by_bit(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, count), dtype=np.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (3, word_count(count, bits))
    assert np.array_equal(unpack_words(words, bits, count), codes)
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    each = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits].reshape(3, -1)
    assert np.array_equal(stream[:, : count * bits], each)
    assert not stream[:, count * bits :].any()
