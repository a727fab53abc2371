"""The allocator against every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.evaluation.allocate import allocate, moves
from jquant.evaluation.sensitivity import LayerSensitivity


def _layer(path: str, scheme: str, kl: float, bits: int, weights: int) -> LayerSensitivity:
    return LayerSensitivity(
        path=path, scheme=scheme, kl=kl, nll_increase=kl, weight_error=kl, bits=bits, weights=weights
    )


def _random(seed: int, layers: int = 6) -> list[LayerSensitivity]:
    generator = np.random.default_rng(seed)
    found = []
    for index in range(layers):
        weights = int(generator.integers(1, 9)) * 64
        worth = generator.exponential()
        found += [
            _layer(f"l{index}", f"int{b}", worth * 4.0**-b * generator.uniform(0.5, 2), b * weights, weights)
            for b in (3, 4, 5)
        ]
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [3.0, 3.3, 4.0, 4.6, 5.0, 9.0])
def test_no_other_choice_within_the_budget_loses_less(seed: int, budget: float) -> None:
    found = _random(seed)
    chosen = allocate(found, budget)
    paths = sorted({each.path for each in found})
    weights = sum(each.weights for each in found if each.scheme == "int3")
    best = min(
        sum(each.kl for each in choice)
        for choice in itertools.product(*([each for each in found if each.path == path] for path in paths))
        if sum(each.bits for each in choice) <= budget * weights + 1e-9
    )
    assert chosen.predicted == pytest.approx(best, rel=1e-12)
    assert chosen.bits <= budget * weights + 1e-9
    by_name = {(each.path, each.scheme): each for each in found}
    assert chosen.predicted == pytest.approx(sum(by_name[item].kl for item in chosen.schemes.items()))


def test_costs_without_a_common_unit_still_hold_the_budget() -> None:
    generator = np.random.default_rng(0)
    found = []
    for index in range(40):
        weights = int(generator.integers(10**6, 10**7)) * 2 + 1
        found += [_layer(f"l{index}", f"int{b}", 4.0**-b, b * weights + index, weights) for b in (3, 4, 5)]
    chosen = allocate(found, 4.0)
    assert 3.99 < chosen.bits_per_weight <= 4.0


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InputError, match=r"2\.5 bits a weight: the smallest schemes take 3\.000"):
        allocate(_random(0), 2.5)
    with pytest.raises(InputError, match="its loss is nan"):
        allocate([_layer("a", "int4", float("nan"), 4, 1)], 8)
    with pytest.raises(InputError, match="no layers"):
        allocate([], 8)


def test_moves_are_ranked_by_what_a_bit_gains() -> None:
    found = [
        _layer("a", "int4", 1.0, 400, 100),
        _layer("a", "int5", 0.2, 500, 100),
        _layer("b", "int4", 0.5, 400, 100),
        _layer("b", "int5", 0.4, 500, 100),
        _layer("b", "nf4", 0.45, 400, 100),
    ]
    listed = moves(found, "int4")
    assert [(move.path, move.after) for move in listed] == [("b", "nf4"), ("a", "int5"), ("b", "int5")]
    assert listed[1].per_bit == pytest.approx(0.8 / 0.5)
    with pytest.raises(InputError, match="int6 was not measured"):
        moves(found, "int6")
