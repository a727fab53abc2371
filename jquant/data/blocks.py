"""Token ids cut into evaluation windows and calibration blocks."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int, Int32

from jquant.core.errors import InputError
from jquant.data.text import Text


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Evaluation windows of one text, and the mask that scores each token at most once."""

    tokens: Int32[np.ndarray, "n window"]
    scored: Bool[np.ndarray, "n window-1"]  # [i, j]: does tokens[i, j + 1], given tokens[i, :j + 1], count?
    stride: int  # tokens between the starts of neighbouring windows
    total_tokens: int  # of the whole text, beyond the windows too
    sha256: str  # of the ids that the windows cover, as little-endian int32
    text_name: str = ""  # of the text the ids come from, where `text_windows` made them
    text_sha256: str = ""
    add_bos: bool = False  # whether BOS stands before the text's first token

    @property
    def window(self) -> int:
        """Tokens in a window."""
        return self.tokens.shape[1]

    @property
    def tokens_scored(self) -> int:
        """Target tokens that count."""
        return int(self.scored.sum())


def windows(
    ids: Int[np.ndarray, " tokens"] | Sequence[int], *, window: int, stride: int | None = None, limit: int | None = None
) -> Windows:
    """Cut token ids into windows that start every `stride` tokens.

    Window i is ids[i·stride : i·stride + window]; only whole windows are taken, so up to stride − 1 tokens at the end
    stay out. The first window scores all its targets; a later one those that no earlier window holds, its last
    `stride`. Without overlap (stride = window) each window scores window − 1 targets, and its first token goes
    unscored; with stride < window every token but the text's first is scored exactly once, up to the last window's end.

    Args:
        ids: [tokens] token ids of the whole text.
        window: tokens in a window, at least 2.
        stride: 1 to `window`; the default is `window`.
        limit: take only the first windows; the default is all.

    Returns:
        The windows with their mask, the number of tokens in the text, and the hash of the ids used.

    Raises:
        InputError: for a window, stride or limit out of range, or a text shorter than one window.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise InputError(f"window {window} scores no token; give at least 2")
    if not 1 <= stride <= window:
        raise InputError(f"stride {stride} is outside 1 to {window} (the window); a larger one would skip tokens")
    if limit is not None and limit < 1:
        raise InputError(f"limit of {limit} windows leaves nothing to evaluate; give at least 1, or none for all")
    ids = _checked(ids, length=window, what="window")

    starts = np.arange(0, ids.size - window + 1, stride)[:limit]
    tokens = ids[starts[:, None] + np.arange(window)]
    scored = np.broadcast_to(np.arange(1, window) >= window - stride, (starts.size, window - 1)).copy()
    scored[0] = True
    tokens.setflags(write=False)
    scored.setflags(write=False)
    used = ids[: starts[-1] + window]
    return Windows(
        tokens=tokens,
        scored=scored,
        stride=stride,
        total_tokens=ids.size,
        sha256=hashlib.sha256(used.astype("<i4").tobytes()).hexdigest(),
    )


class TextTokenizer(Protocol):
    """What of a tokenizer is needed here; io/tokenizer.py has one."""

    @property
    def add_bos(self) -> bool: ...

    def encode(self, text: str) -> np.ndarray: ...


def text_windows(
    text: Text, tokenizer: TextTokenizer, *, window: int, stride: int | None = None, limit: int | None = None
) -> Windows:
    """`windows` of a text's tokens, with the text's name and hash. BOS, where the tokenizer adds it, comes once."""
    cut = windows(tokenizer.encode(text.content), window=window, stride=stride, limit=limit)
    return dataclasses.replace(cut, text_name=text.name, text_sha256=text.sha256, add_bos=bool(tokenizer.add_bos))


def sample_blocks(
    ids: Int[np.ndarray, " tokens"] | Sequence[int], *, length: int, count: int, seed: int
) -> Int32[np.ndarray, "count length"]:
    """Draw calibration blocks at random places of a text.

    Where count·length tokens exist the blocks do not overlap: with F = tokens − count·length free tokens,
    start_i = u_(i) + i·length for sorted uniform u in [0, F]. Otherwise the starts are spread evenly, which shares out
    the least overlap possible, and the seed sets only the order.

    Args:
        ids: [tokens] token ids of the whole text.
        length: tokens in a block, at least 1.
        count: blocks, at least 1.
        seed: of the Philox generator, at least 0; equal seeds give equal blocks on every machine.

    Returns:
        [count, length] token ids; no two blocks start at the same place.

    Raises:
        InputError: for a text too short for one block or for `count` different ones, or an argument out of range.
    """
    if length < 1 or count < 1 or seed < 0:
        raise InputError(
            f"length {length}, count {count}, seed {seed}: length and count are at least 1, seed at least 0"
        )
    ids = _checked(ids, length=length, what="block")
    last = ids.size - length
    if count > last + 1:
        raise InputError(
            f"{count} blocks of {length} tokens asked of a text of {ids.size} tokens, which holds {last + 1} "
            "different ones; give a longer text, or fewer or shorter blocks"
        )
    rng = np.random.Generator(np.random.Philox(seed))
    free = ids.size - count * length
    if free >= 0:
        starts = np.sort(rng.integers(0, free, size=count, endpoint=True)) + np.arange(count) * length
    else:
        starts = np.arange(count) * last // (count - 1)
    return ids[rng.permutation(starts)[:, None] + np.arange(length)]


def _checked(
    ids: Int[np.ndarray, " tokens"] | Sequence[int], *, length: int, what: str
) -> Int32[np.ndarray, " tokens"]:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"token ids are {array.dtype}{list(array.shape)}; give one row of integers")
    if array.size < length:
        raise InputError(
            f"the text has {array.size} tokens, fewer than one {what} of {length}; "
            f"give a longer text or a shorter {what}"
        )
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise InputError(f"token ids span {array.min()} to {array.max()}; ids lie in 0 to 2^31 − 1")
    return array.astype(np.int32)
