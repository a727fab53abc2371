"""The Pareto frontier: the points that no other point beats in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jquant.core.errors import InputError
from jquant.sweep.results import Cell

Metric = Literal["perplexity", "kl"]


def pareto_front(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the points not dominated, where less is better in x and in y.

    Point j dominates i where x_j ≤ x_i and y_j ≤ y_i and one of them is less; equal points do not dominate each other.
    A point with a NaN or an infinite coordinate is never on the frontier.

    Args:
        x, y: [n] coordinates.

    Returns:
        Indices by ascending x; equal points in their given order.

    Raises:
        InputError: where x and y differ in length.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise InputError(f"pareto_front got shapes {xs.shape} and {ys.shape}; give two sequences of one length")
    finite = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    front: list[int] = []
    for index in finite[np.lexsort((ys[finite], xs[finite]))]:
        last = front[-1] if front else None
        if last is None or ys[index] < ys[last] or (xs[index], ys[index]) == (xs[last], ys[last]):
            front.append(int(index))
    return front


def frontier(cells: Sequence[Cell], metric: Metric) -> list[int]:
    """Indices of the cells on the frontier of bits per weight against `metric`, by ascending bits."""
    return pareto_front([cell.bits_per_weight for cell in cells], [getattr(cell, metric) for cell in cells])
