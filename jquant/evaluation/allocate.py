"""Spends a budget of bits where they count: one scheme a layer, the least summed loss that the budget allows.

    min Σ_l s_l(q_l)    subject to    Σ_l bits_l(q_l) ≤ budget

A multiple-choice knapsack, solved exactly by dynamic programming over bits in units of their greatest common divisor.
Where that would take more than 50,000 steps, costs are rounded up to a larger unit: the budget still holds, and the
solution is the best of those whose rounded costs fit. The loss of several layers is taken for the sum of each alone,
which holds to second order where errors are small and independent; measure the result.

Reference: Kellerer, Pferschy & Pisinger, Knapsack Problems (2004), ch. 11.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jquant.core.errors import InputError
from jquant.evaluation.sensitivity import LayerSensitivity

_STEPS = 50_000


class Allocation(NamedTuple):
    """A scheme for each layer, what it holds, and the loss that the sum predicts."""

    schemes: dict[str, str]
    bits: int
    weights: int
    predicted: float  # Σ s_l

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.weights


def allocate(found: Sequence[LayerSensitivity], bits_per_weight: float) -> Allocation:
    """The best choice for a budget.

    Args:
        found: of every layer, each scheme that it may take.
        bits_per_weight: the mean over all layers that is allowed, scales included.

    Raises:
        InputError: the budget is below what the smallest schemes take, or a loss is not finite.
    """
    options: dict[str, list[LayerSensitivity]] = {}
    for each in found:
        if not math.isfinite(each.kl):
            raise InputError(f"layer {each.path} at {each.scheme}: its loss is {each.kl}: leave that scheme out")
        options.setdefault(each.path, []).append(each)
    if not options:
        raise InputError("no layers: there is nothing to allocate bits to")
    weights = sum(choices[0].weights for choices in options.values())
    budget = math.floor(bits_per_weight * weights + 1e-6)
    least = sum(min(choice.bits for choice in choices) for choices in options.values())
    if least > budget:
        raise InputError(
            f"{bits_per_weight:g} bits a weight: the smallest schemes take {least / weights:.3f}; raise the budget, or "
            "allow smaller schemes"
        )
    chosen = _solve(options, budget)
    return Allocation(
        schemes={path: choice.scheme for path, choice in chosen.items()},
        bits=sum(choice.bits for choice in chosen.values()),
        weights=weights,
        predicted=sum(choice.kl for choice in chosen.values()),
    )


def _solve(options: Mapping[str, list[LayerSensitivity]], budget: int) -> dict[str, LayerSensitivity]:
    """Costs are counted above each layer's cheapest choice, so that they and the budget left are small."""
    cheapest = {path: min(choice.bits for choice in choices) for path, choices in options.items()}
    room = budget - sum(cheapest.values())
    extra = [choice.bits - cheapest[path] for path, choices in options.items() for choice in choices]
    unit = math.gcd(*extra) or 1
    unit = max(unit, -(-room // _STEPS))
    steps = room // unit
    best, picks = np.zeros(steps + 1), []
    for path, choices in options.items():
        table, pick = np.full(steps + 1, math.inf), np.zeros(steps + 1, np.int16)
        for index, choice in enumerate(choices):
            cost = -(-(choice.bits - cheapest[path]) // unit)
            if cost > steps:
                continue
            candidate = np.full(steps + 1, math.inf)
            candidate[cost:] = best[: steps + 1 - cost] + choice.kl
            better = candidate < table
            table, pick = np.where(better, candidate, table), np.where(better, index, pick)
        best = table
        picks.append(pick)
    place, chosen = steps, {}
    for (path, choices), pick in zip(reversed(list(options.items())), reversed(picks), strict=True):
        choice = choices[int(pick[place])]
        chosen[path] = choice
        place -= -(-(choice.bits - cheapest[path]) // unit)
    return {path: chosen[path] for path in options}


class Move(NamedTuple):
    """One change to one layer, and what it gains for what it costs."""

    path: str
    before: str
    after: str
    gain: float  # nats a token of KL
    bits_per_weight: float  # of the whole model that it adds; negative: it saves
    per_bit: float  # gain for a bit a weight of the whole model


def moves(found: Sequence[LayerSensitivity], base: str) -> list[Move]:
    """Every change from a uniform scheme that gains, best for its bits first; what gains and costs nothing leads."""
    options: dict[str, dict[str, LayerSensitivity]] = {}
    for each in found:
        options.setdefault(each.path, {})[each.scheme] = each
    if not all(base in choices for choices in options.values()):
        raise InputError(f"{base} was not measured on every layer")
    weights = sum(choices[base].weights for choices in options.values())
    listed = []
    for path, choices in options.items():
        for name, choice in choices.items():
            gain, added = choices[base].kl - choice.kl, (choice.bits - choices[base].bits) / weights
            if name != base and gain > 0:
                listed.append(Move(path, base, name, gain, added, gain / added if added > 0 else math.inf))
    return sorted(listed, key=lambda move: (-move.per_bit, -move.gain))
