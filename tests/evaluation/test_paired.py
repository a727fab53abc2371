"""Paired statistics against scipy, and against every outcome there is where there are few."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from jquant.core.errors import InputError
from jquant.evaluation.paired import bootstrap, degradation, degradation_interval, flips, mcnemar


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 3), (9, 2), (2, 9), (120, 80), (1500, 1300)])
def test_mcnemar_is_the_two_sided_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_enumeration() -> None:
    outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=7)]
    as_uneven = sum(abs(k - 3.5) >= abs(6 - 3.5) for k in outcomes) / len(outcomes)
    assert mcnemar(6, 1) == as_uneven


def test_flips_count_both_directions() -> None:
    found = flips([1, 1, 0, 0, 1], [0, 1, 1, 0, 0])
    assert (found.lost, found.gained) == (2, 1)
    assert found.p_value == 1.0
    with pytest.raises(InputError, match="right \\(1\\) or wrong \\(0\\)"):
        flips([0.5, 1], [1, 1])


def test_bootstrap_by_enumeration_of_all_resamples() -> None:
    rows = np.asarray([[0.0], [1.0], [5.0], [11.0]])
    every = np.sort([np.mean(draw) for draw in itertools.product(rows[:, 0], repeat=4)])
    found = bootstrap(rows, lambda means: means[:, 0], resamples=40_000)
    exact = np.percentile(every, [2.5, 97.5])
    assert np.asarray(found) == pytest.approx(exact, abs=0.6)
    assert found == bootstrap(rows, lambda means: means[:, 0], resamples=40_000)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 samples of 200 paired answers with a true degradation of 10 %."""
    generator, held = np.random.default_rng(0), 0
    for seed in range(300):
        before = generator.random(200) < 0.6
        after = np.where(before, generator.random(200) < 0.85, generator.random(200) < 0.075)
        low, high = degradation_interval(before.astype(float).tolist(), after.astype(float).tolist(), seed=seed)
        held += low <= 0.1 <= high
    assert 0.925 <= held / 300 <= 0.975


def test_no_loss_among_few_items_proves_little() -> None:
    right = [1.0] * 20
    assert degradation_interval(right, right) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert degradation_interval([1.0] * 2000, [1.0] * 2000).high < 0.002
    assert degradation_interval([1, 0, 0, 0], [1, 1, 1, 0]).high == 1.0  # no more than everything can be lost
    assert all(map(math.isnan, degradation_interval([1.0], [1.0])))


def test_a_reference_that_is_hardly_ever_right_leaves_a_gain_open() -> None:
    """Of all 256 draws of four items, some hold no right answer of the reference and one of the model."""
    low, high = degradation_interval([1, 0, 0, 0], [0, 1, 0, 0])
    assert (low, high) == (-math.inf, 1.0)
    assert degradation_interval([1.0] * 3 + [0.0] * 161, [0.0] * 3 + [1.0] + [0.0] * 160).low == -math.inf


def test_degradation() -> None:
    assert degradation(0.5, 0.45) == pytest.approx(0.1)
    assert degradation(0.5, 0.6) == pytest.approx(-0.2)
    assert math.isnan(degradation(0.0, 0.3))


def test_items_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InputError, match="3 items of the reference and 2 of the model"):
        degradation_interval([1, 0, 1], [1, 0])
    with pytest.raises(InputError, match="NaN"):
        flips([1, math.nan], [1, 1])
    with pytest.raises(InputError, match="no items"):
        flips([], [])
