"""Windows score each token once and blocks lie where they should, for every size tried."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.data.blocks import sample_blocks, windows

SIZES = [
    (tokens, window, stride) for tokens in (8, 9, 23, 64) for window in (2, 3, 8) for stride in range(1, window + 1)
]


def _scored_positions(tokens: int, window: int, stride: int) -> list[int]:
    cut = windows(np.arange(tokens), window=window, stride=stride)
    return [int(cut.tokens[i, j + 1]) for i, j in np.argwhere(cut.scored)]


@pytest.mark.parametrize(("tokens", "window", "stride"), SIZES)
def test_overlapping_windows_score_each_token_once_and_disjoint_ones_all_but_their_first(
    tokens: int, window: int, stride: int
) -> None:
    cut = windows(np.arange(tokens), window=window, stride=stride)
    end = int(cut.tokens[-1, -1]) + 1
    assert tokens - end < stride
    firsts = set(range(0, end, window)) if stride == window else {0}
    assert _scored_positions(tokens, window, stride) == [p for p in range(end) if p not in firsts]
    assert cut.tokens_scored == end - len(firsts)


@pytest.mark.parametrize(("tokens", "window", "stride"), SIZES)
def test_windows_are_slices_of_the_text(tokens: int, window: int, stride: int) -> None:
    ids = np.random.default_rng(0).integers(0, 49152, tokens)
    cut = windows(ids, window=window, stride=stride)
    assert cut.tokens.dtype == np.int32
    assert cut.tokens.shape == (cut.tokens.shape[0], cut.window) == (*cut.scored.shape[:1], window)
    for i, row in enumerate(cut.tokens):
        np.testing.assert_array_equal(row, ids[i * stride : i * stride + window])
    assert (cut.total_tokens, cut.stride) == (tokens, stride)


def test_the_limit_takes_the_first_windows_and_the_hash_covers_what_they_use() -> None:
    ids = list(range(100))
    every, first = windows(ids, window=16), windows(ids, window=16, limit=2)
    assert every.tokens.shape == (6, 16)
    np.testing.assert_array_equal(first.tokens, every.tokens[:2])
    np.testing.assert_array_equal(first.scored, np.ones((2, 15), bool))
    assert first.total_tokens == 100
    assert first.sha256 == hashlib.sha256(np.arange(32, dtype="<i4").tobytes()).hexdigest()
    assert first.sha256 == windows(ids[:40], window=16, stride=8, limit=3).sha256 != every.sha256
    assert windows(ids, window=16, limit=99).tokens.shape == every.tokens.shape


def test_windows_cannot_be_written_to() -> None:
    cut = windows(range(8), window=4)
    for array in (cut.tokens, cut.scored):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0


@pytest.mark.parametrize(
    ("tokens", "length", "count"), [(64, 8, 8), (65, 8, 8), (200, 7, 20), (1000, 16, 5), (5, 5, 1)]
)
def test_blocks_do_not_overlap_where_they_need_not(tokens: int, length: int, count: int) -> None:
    for seed in range(5):
        blocks = sample_blocks(np.arange(tokens), length=length, count=count, seed=seed)
        assert blocks.shape == (count, length)
        assert blocks.dtype == np.int32
        assert np.unique(blocks).size == count * length
        np.testing.assert_array_equal(np.diff(blocks, axis=1), 1)


@pytest.mark.parametrize(("tokens", "length", "count"), [(64, 8, 9), (64, 8, 57), (10, 9, 2), (20, 8, 3)])
def test_blocks_that_must_overlap_are_spread_evenly_over_the_whole_text(tokens: int, length: int, count: int) -> None:
    starts = np.sort(sample_blocks(np.arange(tokens), length=length, count=count, seed=3)[:, 0])
    steps = np.diff(starts)
    assert (starts[0], starts[-1]) == (0, tokens - length)
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1


def test_blocks_follow_their_seed_and_reach_every_place() -> None:
    ids = np.arange(50)
    first = sample_blocks(ids, length=5, count=4, seed=7)
    np.testing.assert_array_equal(first, sample_blocks(list(range(50)), length=5, count=4, seed=7))
    assert not np.array_equal(first, sample_blocks(ids, length=5, count=4, seed=8))
    starts = np.concatenate([sample_blocks(ids, length=5, count=4, seed=seed)[:, 0] for seed in range(200)])
    assert set(starts) == set(range(46))
    # numpy promises the stream of Philox and of integers() from one version to the next; recorded with numpy 2.4.6.
    assert first[:, 0].tolist() == [18, 8, 24, 45]


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        (range(9), {"window": 1}, "window 1 scores no token"),
        (range(9), {"window": -4}, "window -4 scores no token"),
        (range(9), {"window": 4, "stride": 0}, r"stride 0 is outside 1 to 4"),
        (range(9), {"window": 4, "stride": 5}, r"stride 5 is outside 1 to 4"),
        (range(9), {"window": 4, "limit": 0}, "limit of 0 windows"),
        (range(9), {"window": 10}, "has 9 tokens, fewer than one window of 10; give a longer text or a shorter window"),
        ([], {"window": 2}, "has 0 tokens"),
        ([[1, 2], [3, 4]], {"window": 2}, r"token ids are int64\[2, 2\]"),
        ([0.5, 1.5], {"window": 2}, r"token ids are float64\[2\]"),
        ([0, -1], {"window": 2}, "token ids span -1 to 0"),
        ([0, 2**31], {"window": 2}, "token ids span 0 to 2147483648"),
    ],
)
def test_windows_refuse_what_they_cannot_cut(ids: list[int], options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        windows(ids, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 0, "count": 1, "seed": 0}, "length 0, count 1, seed 0"),
        ({"length": 1, "count": 0, "seed": 0}, "length 1, count 0, seed 0"),
        ({"length": 1, "count": 1, "seed": -1}, "length 1, count 1, seed -1"),
        ({"length": 10, "count": 1, "seed": 0}, "9 tokens, fewer than one block of 10"),
        (
            {"length": 8, "count": 3, "seed": 0},
            "3 blocks of 8 tokens asked of a text of 9 tokens, which holds 2 different",
        ),
    ],
)
def test_blocks_refuse_what_they_cannot_draw(options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sample_blocks(range(9), **options)
