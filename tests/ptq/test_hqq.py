"""HQQ: heavy-tailed weights lose less in its own measure, by much; what it does not serve is refused."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.ptq import hqq
from jquant.ptq.hqq import HQQConfig
from tests.jitted import dequantize, quantize

W = np.random.default_rng(0).standard_t(4, (32, 256)).astype(np.float32)
W[3, :64], W[4, 64:128] = 0, 0.7


def _lost(values: np.ndarray) -> float:
    return float((np.abs(np.asarray(values, np.float64) - W) ** 0.7).sum())


# The share of rounding's error that is left at most; measured on these weights and rounded up.
@pytest.mark.parametrize(
    ("spec", "share"),
    [
        ("int4:g64:asym", 0.98),
        ("int3:g64:asym", 0.93),
        ("int2:g64:asym", 0.9),
        ("int2:g50:asym:fp16", 0.9),
        ("int4:b10x32:asym:bf16", 0.99),
    ],
)
def test_less_is_lost_than_by_rounding(spec: str, share: float) -> None:
    found = hqq.solve(jnp.asarray(W), None, scheme(spec)).qtensor
    rounded = quantize(jnp.asarray(W), scheme(spec))
    assert found.nbytes == rounded.nbytes
    assert _lost(np.asarray(dequantize(found))) < share * _lost(np.asarray(dequantize(rounded)))
    assert not np.asarray(dequantize(hqq.solve(jnp.asarray(0 * W), None, scheme(spec)).qtensor)).any()


def test_no_group_gets_worse() -> None:
    spec = scheme("int3:g64:asym")
    found, rounded = hqq.solve(jnp.asarray(W), None, spec).qtensor, quantize(jnp.asarray(W), spec)
    of_groups = [
        (np.abs(np.asarray(dequantize(each), np.float64) - W) ** 0.7).reshape(-1, 64).sum(axis=1)
        for each in (found, rounded)
    ]
    assert (of_groups[0] <= of_groups[1] * (1 + 1e-5)).all()


def test_the_unit_of_the_weights_does_not_matter() -> None:
    spec = scheme("int3:g64:asym")
    found = hqq.solve(jnp.asarray(W), None, spec).qtensor
    smaller = hqq.solve(jnp.asarray(W / 64), None, spec).qtensor
    assert (np.asarray(found.codes()) == np.asarray(smaller.codes())).mean() > 0.999


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int4:g64", "use int4:g64:asym, or another method"),
        ("nf4", "only integers have"),
        ("q4_k", "only integers have"),
    ],
)
def test_schemes_without_zero_points_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hqq.solve(jnp.asarray(W), None, scheme(spec))


@pytest.mark.parametrize("wrong", [{"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"turns": 0}])
def test_configs_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="HQQ"):
        HQQConfig(**wrong)
