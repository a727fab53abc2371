"""Two models on the same items: what was lost, and how sure that is. Pairs tell far smaller losses from noise.

    degradation = 1 − mean(quantized) / mean(reference)
    McNemar: of n items that one model has right and the other wrong, k lost; k ~ Binomial(n, ½) if nothing changed

Reference: McNemar 1947, exact form; percentile bootstrap: Efron 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jquant.core.errors import InputError

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_CELLS = 10_000_000  # counts drawn at a time


class Interval(NamedTuple):
    """Within which a value lies with a confidence of 95 %; NaN where one item alone was seen, an infinite end where the
    items leave it open."""

    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Items whose answer changed sides."""

    lost: int  # right before, wrong now
    gained: int
    p_value: float  # of McNemar's test, exact and two-sided: how often chance alone gives so uneven a split


def flips(reference: Sequence[float], quantized: Sequence[float]) -> Flips:
    """Of items scored 0 or 1. Raises InputError where a score is another."""
    before, after = _pairs(reference, quantized)
    if not np.isin(np.concatenate([before, after]), (0.0, 1.0)).all():
        raise InputError("flips are of items that are right (1) or wrong (0): these scores are others")
    lost, gained = int(np.sum(before > after)), int(np.sum(before < after))
    return Flips(lost=lost, gained=gained, p_value=mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """min(1, 2·P[Binomial(lost + gained, ½) ≤ min(lost, gained)]), exactly."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def degradation(reference: float, quantized: float) -> float:
    """The share of the reference's score that is lost; negative for a gain, NaN where there was none to lose."""
    return 1 - quantized / reference if reference else math.nan


def degradation_interval(reference: Sequence[float], quantized: Sequence[float], *, seed: int = 0) -> Interval:
    """Of the degradation, items drawn anew in pairs.

    Where the reference has so few items right that some draws hold none, a gain in these is without bound: −inf.
    Where no item was lost the bootstrap knows of no loss at all: then the upper end is what n items without one leave
    open, 1 − 0.025^(1/n) of them.
    """
    before, after = _pairs(reference, quantized)

    def statistic(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return 1 - means[:, 1] / means[:, 0]

    found = bootstrap(np.stack([before, after], axis=1), statistic, seed=seed)
    if len(before) > 1 and not (before > after).any() and before.mean() > 0:
        unseen = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(before))
        return Interval(found.low, max(found.high, min(1.0, unseen / float(before.mean()))))
    return found


def bootstrap(
    rows: Float[np.ndarray, "items columns"],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of statistic(means of the columns), whole rows drawn anew.

    Args:
        rows: one an item. Equal ones are drawn together, by their multinomial counts.
        statistic: of [resamples, columns] means, [resamples].
        resamples: draws.
        seed: of the draws; equal seeds give equal intervals.
    """
    if len(rows) < 2:
        return UNKNOWN
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    parts = []
    step = max(1, _CELLS // len(kinds))
    for start in range(0, resamples, step):
        drawn = generator.multinomial(len(rows), counts / len(rows), size=min(step, resamples - start))
        parts.append(statistic(drawn @ kinds / len(rows)))
    values = np.concatenate(parts)
    values = values[~np.isnan(values)]
    if not len(values):
        return UNKNOWN
    tail = 100 * (1 - CONFIDENCE) / 2
    if np.isfinite(values).all():
        return Interval(*(float(edge) for edge in np.percentile(values, [tail, 100 - tail])))
    low, high = np.percentile(values, tail, method="lower"), np.percentile(values, 100 - tail, method="higher")
    return Interval(float(low), float(high))  # between an infinity and a number there is nothing to interpolate


def _pairs(reference: Sequence[float], quantized: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    before, after = np.asarray(reference, np.float64), np.asarray(quantized, np.float64)
    if before.shape != after.shape or before.ndim != 1:
        raise InputError(f"{before.size} items of the reference and {after.size} of the model: they must be the same")
    if not before.size:
        raise InputError("no items: there is nothing to compare")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise InputError("a score is NaN or infinite: run the benchmark again")
    return before, after
