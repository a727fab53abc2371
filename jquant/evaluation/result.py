"""What a measured number must carry: its error, how it was measured, and on what."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jquant.data.blocks import Windows


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How tokens were cut and scored. Numbers compare only at equal protocols and equal hashes.

    Windows are cut from the token stream of the whole text; a BOS that the tokenizer adds stands only at its start.
    In a window each token is predicted from those before it; its first token is context alone.
    """

    window: int  # tokens
    stride: int  # tokens from one window's start to the next; equal to `window` where they do not overlap
    windows: int
    tokens_total: int  # of the whole text
    tokens_scored: int
    add_bos: bool
    text_name: str
    text_sha256: str  # of the text's utf-8 bytes
    tokens_sha256: str  # of the token ids that were used

    @classmethod
    def of(cls, windows: Windows) -> Protocol:
        return cls(
            window=windows.window,
            stride=windows.stride,
            windows=len(windows.tokens),
            tokens_total=windows.total_tokens,
            tokens_scored=windows.tokens_scored,
            add_bos=windows.add_bos,
            text_name=windows.text_name,
            text_sha256=windows.text_sha256,
            tokens_sha256=windows.sha256,
        )

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number: mean over scored tokens, its standard error over windows, and its protocol."""

    value: float
    stderr: float
    protocol: Protocol


@dataclass(frozen=True, kw_only=True)
class Perplexity(Result):
    """`value` = exp(nll); `stderr` is that of `nll`, in nats a token, so value's own is about value · stderr."""

    nll: float


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Of a model from its reference: KL(reference ‖ model) in nats a token, and how often the top token agrees."""

    kl: Result
    top1: Result


def mean_and_stderr(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Token-weighted mean over windows, and its standard error from the spread of the windows.

        mean = Σ sums / Σ counts,    stderr = √( n/(n−1) · Σ (sums − mean·counts)² ) / Σ counts

    Args:
        sums: over the scored tokens of each window, [windows].
        counts: of scored tokens in each window, [windows].

    Returns:
        The mean, and the standard error of that ratio; NaN for one window, which says nothing about spread.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    mean, n = sums.sum() / counts.sum(), len(sums)
    if n < 2:
        return float(mean), math.nan
    residual = sums - mean * counts
    return float(mean), float(np.sqrt(np.sum(residual**2) * n / (n - 1)) / counts.sum())
