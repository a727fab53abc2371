"""The frontier is what the definition says, point by point."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.sweep.pareto import frontier, pareto_front
from jquant.sweep.results import Sweep


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_the_set_of_points_that_none_dominates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 8, (30, 2))]  # many ties
    front = pareto_front(*zip(*points, strict=True))
    assert set(front) == {i for i, p in enumerate(points) if not any(_dominates(q, p) for q in points)}
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_points_without_a_finite_place_are_never_on_it() -> None:
    assert pareto_front([1, 2, 3, math.nan, 0], [math.inf, 5, math.nan, 0, -math.inf]) == [1]
    assert pareto_front([], []) == []


def test_lengths_must_agree() -> None:
    with pytest.raises(InputError, match="shapes"):
        pareto_front([1, 2], [1])


def test_cells_are_compared_by_bits_and_the_metric(sweep: Sweep) -> None:
    by_kl = [sweep.cells[i].scheme for i in frontier(sweep.cells, "kl")]
    assert by_kl[0] == "int2:g32"
    assert by_kl[-1] == "int8:g128"
    assert sweep.cells[frontier(sweep.cells, "perplexity")[-1]].scheme == "mxint8"
