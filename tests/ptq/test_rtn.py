"""Rounding with searched ranges: against a plain search in numpy, never worse than the whole range, on every scheme."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.range_search import RangeSearch, search_parameters
from jquant.core.scheme import scheme
from jquant.core.tiles import to_tiles
from jquant.ptq import rtn
from jquant.ptq.rtn import RTNConfig
from tests.cases import BLOCK_SCHEMES
from tests.jitted import dequantize, quantize

RNG = np.random.default_rng(0)
W = RNG.standard_t(5, (20, 160)).astype(np.float32)
W[3], W[5] = 0, 0.7
SEARCH = RTNConfig(range="mse")
# One of each element and of each scale format; all pairs of tests/cases.py would only compile longer.
SEARCHED = (
    "int4:g32",
    "int3:g50:asym",
    "int2:channel:restricted",
    "int4:tensor:e4m3",
    "int8:b8x32:asym:fp16",
    "int4:g32:bf16",
    "fp8_e4m3:channel",
    "fp6_e2m3:g16:nested",
    "mxfp4",
    "mxint8:rceil",
    "nvfp4",
    "nf4:g64:dq",
    "codebook(-1.0/0.25):g32",
)


def _lost(values: np.ndarray, spec: str) -> np.ndarray:
    """Σ|e|^2.4 of each tile."""
    lost = np.abs(np.asarray(values, np.float64) - W) ** 2.4
    return np.asarray(to_tiles(jnp.asarray(lost, jnp.float32), scheme(spec))).sum(axis=(-3, -1))


@pytest.mark.parametrize("spec", SEARCHED)
def test_searched_ranges_never_lose_more(spec: str) -> None:
    found = rtn.solve(jnp.asarray(W), None, scheme(spec), config=SEARCH).qtensor
    rounded = quantize(jnp.asarray(W), scheme(spec))
    assert found.nbytes == rounded.nbytes
    ours, whole = (_lost(np.asarray(dequantize(each)), spec) for each in (found, rounded))
    if not spec.endswith("dq"):  # whose scales are rounded together after the search
        assert (ours <= whole * (1 + 1e-4) + 1e-6).all()
    assert ours.sum() <= whole.sum()
    assert not np.asarray(dequantize(found))[3].any() or spec.startswith("codebook")


@pytest.mark.parametrize("asymmetric", [False, True])
def test_it_is_the_search_of_ist_daslab(asymmetric: bool) -> None:
    spec = scheme("int4:g32:asym" if asymmetric else "int4:g32")
    group = W.reshape(-1, 32).astype(np.float64)
    low, high = np.minimum(group.min(axis=1), 0), np.maximum(group.max(axis=1), 0)
    if not asymmetric:
        high = np.abs(group).max(axis=1)
        low = -high
    best = np.full(len(group), np.inf)
    for index in range(80):
        factor = 1 - index / 100
        scale = factor * (high - low) / 15
        scale = np.where(scale > 0, scale, 1)[:, None]
        if asymmetric:
            zero = np.clip(np.rint(-factor * low[:, None] / scale), 0, 15)
            value = (np.clip(np.rint(group / scale) + zero, 0, 15) - zero) * scale
        else:
            value = np.clip(np.rint(group / scale), -8, 7) * scale
        best = np.minimum(best, (np.abs(value - group) ** 2.4).sum(axis=1))
    found = rtn.solve(jnp.asarray(W), None, spec, config=SEARCH).qtensor
    np.testing.assert_allclose(_lost(np.asarray(dequantize(found)), str(spec)).reshape(-1), best, rtol=1e-3, atol=1e-6)


def test_stacks_and_coarser_searches() -> None:
    spec = scheme("int3:g32")
    stack = jnp.stack([jnp.asarray(W), jnp.asarray(2 * W[::-1])])
    both = search_parameters(to_tiles(stack, spec), spec)
    for index in range(2):
        np.testing.assert_array_equal(both.scale[index], search_parameters(to_tiles(stack[index], spec), spec).scale)
    narrow = search_parameters(to_tiles(stack, spec), spec, config=RangeSearch(grid=10, max_shrink=0.1))
    np.testing.assert_array_equal(narrow.scale, search_parameters(to_tiles(stack, spec), spec, config=WHOLE).scale)


WHOLE = RangeSearch(grid=1, max_shrink=1)


@pytest.mark.parametrize("spec", ["int2:g32", "int4:g32", "int4:g32:asym", "nf4:g32", "int4:g32:bf16"])
def test_all_tries_are_made_where_the_narrowest_is_best(spec: str) -> None:
    """Two columns that do not count make ranges five times too wide; that of a group without them is soon found."""
    x = np.random.default_rng(4).uniform(-1, 1, (8, 64)).astype(np.float32)
    x[:, 40], x[:, 50], importance = 5, -5, np.ones(64, np.float32)
    importance[[40, 50]] = 0
    kind = scheme(spec)
    tiles = to_tiles(jnp.asarray(x), kind)
    weights = to_tiles(jnp.asarray(importance)[None], kind)
    scale = search_parameters(tiles, kind, importance=weights, config=RangeSearch(exponent=2.0)).scale
    widest = search_parameters(tiles, kind, config=WHOLE).scale
    shrink = np.asarray(scale / widest, np.float64)
    assert np.all(shrink[..., 0] > 0.5)
    assert np.all(shrink[..., 1] < 0.35)


@pytest.mark.parametrize("spec", BLOCK_SCHEMES[:2])
def test_block_types_of_ggml_search_themselves(spec: str) -> None:
    wide = jnp.asarray(np.tile(W, (1, 8)))
    assert rtn.solve(wide, None, scheme(spec)).qtensor.shape == wide.shape
    with pytest.raises(InputError, match="takes no range search"):
        rtn.solve(wide, None, scheme(spec), config=SEARCH)


@pytest.mark.parametrize("wrong", [{"grid": 0}, {"max_shrink": 0.0}, {"max_shrink": 1.5}, {"exponent": 0.0}])
def test_searches_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="range search with"):
        RangeSearch(**wrong)
