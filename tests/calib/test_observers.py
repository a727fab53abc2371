"""Laws of all observers over one table: streamed = at once = merged = sharded; masks; numpy; data that cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jquant.calib import absmax, absmean, gram, histogram, mse_range, percentile
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from tests.jitted import dequantize, quantize

CHANNELS = 12
RNG = np.random.default_rng(0)
X = (RNG.standard_t(4, (4, 80, CHANNELS)) * np.exp(RNG.standard_normal(CHANNELS))).astype(np.float32)
X[0] *= 1e-3  # later batches widen the range
FLAT = X.reshape(-1, CHANNELS)
INT4 = scheme("int4:tensor")


class Observer(NamedTuple):
    module: ModuleType
    init: Callable[[], Any]
    finalize: Callable[[Any], Any]
    exact: bool = True  # no sums of floats, so shards and parts give the same bits


OBSERVERS = {
    "gram": Observer(gram, partial(gram.init, CHANNELS), lambda state: gram.finalize(state).matrix, exact=False),
    "absmax": Observer(absmax, partial(absmax.init, CHANNELS), absmax.finalize),
    "absmean": Observer(absmean, partial(absmean.init, CHANNELS), absmean.finalize, exact=False),
    "percentile": Observer(percentile, percentile.init, partial(percentile.finalize, percent=99.0)),
    "percentile a channel": Observer(
        percentile, partial(percentile.init, CHANNELS, bins=64), partial(percentile.finalize, percent=90.0)
    ),
    "mse_range": Observer(mse_range, mse_range.init, partial(mse_range.finalize, scheme=INT4)),
}
EACH = pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)


def _at_once(observer: Observer, x: np.ndarray = X, mask: np.ndarray | None = None) -> Any:
    masked = None if mask is None else jnp.asarray(mask)
    return observer.module.update(observer.init(), jnp.asarray(x), masked)


def _assert_same(observer: Observer, found: Any, expected: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0 if observer.exact else 1e-5, atol=0 if observer.exact else 1e-4)


@EACH
def test_batches_stream_and_merge(observer: Observer) -> None:
    update = jax.jit(observer.module.update)
    states = [update(observer.init(), jnp.asarray(batch)) for batch in X]
    streamed = observer.init()
    for batch in X:
        streamed = update(streamed, jnp.asarray(batch))
    at_once = _at_once(observer)
    _assert_same(observer, streamed, at_once)
    _assert_same(observer, observer.module.merge(*states), at_once)
    _assert_same(observer, observer.module.merge(*states[::-1]), at_once)
    assert {leaf.shape for leaf in jax.tree.leaves(streamed)} == {leaf.shape for leaf in jax.tree.leaves(states[0])}


@EACH
def test_masked_rows_do_not_count_whatever_they_hold(observer: Observer) -> None:
    mask = RNG.random(X.shape[:2]) < 0.7
    poisoned = np.where(mask[..., None], X, np.nan)
    _assert_same(observer, _at_once(observer, poisoned, mask), _at_once(observer, X[mask]))


@EACH
def test_shards_of_the_data_give_what_all_of_it_gives(observer: Observer) -> None:
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    assert mesh.size == 8
    sharded = jax.device_put(jnp.asarray(FLAT), NamedSharding(mesh, PartitionSpec("data")))
    whole = NamedSharding(mesh, PartitionSpec())
    found = jax.jit(observer.module.update, out_shardings=whole)(observer.init(), sharded)
    _assert_same(observer, found, _at_once(observer, FLAT))

    # Each device by itself, then merged: as processes of their own do.
    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False)
    def apart(rows: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], observer.module.update(observer.init(), rows))

    states = apart(sharded)
    merged = observer.module.merge(*(jax.tree.map(lambda leaf, index=index: leaf[index], states) for index in range(8)))
    _assert_same(observer, merged, _at_once(observer, FLAT))


@EACH
@pytest.mark.parametrize(("value", "message"), [(np.nan, "a NaN or an infinity"), (np.inf, "NaN"), (0.0, "are zero")])
def test_data_that_cannot_serve_is_refused(observer: Observer, value: float, message: str) -> None:
    x = X * 0 if value == 0 else np.where(np.arange(CHANNELS) == 3, np.float32(value), X)
    observer.module.check(_checked(observer, _at_once(observer)), "layer a")
    with pytest.raises(InputError, match=f"layer a: .*{message}"):
        observer.module.check(_checked(observer, _at_once(observer, x)), "layer a")


def _checked(observer: Observer, state: Any) -> Any:
    """What an observer's `check` looks at: a histogram knows more than what is made of it."""
    if isinstance(state, histogram.HistogramState):
        return state
    return gram.finalize(state) if observer.module is gram else observer.finalize(state)


def test_magnitudes_are_those_of_numpy() -> None:
    np.testing.assert_array_equal(absmax.finalize(_at_once(OBSERVERS["absmax"])), np.abs(FLAT).max(axis=0))
    np.testing.assert_allclose(absmean.finalize(_at_once(OBSERVERS["absmean"])), np.abs(FLAT).mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("bins", [64, 2048])
@pytest.mark.parametrize("percent", [0.1, 50, 99, 99.9, 100])
def test_percentiles_are_at_most_a_bin_above_those_of_numpy(bins: int, percent: float) -> None:
    for channels in (None, CHANNELS):
        state = percentile.init(channels, bins=bins)
        for batch in X:
            state = percentile.update(state, jnp.asarray(batch))
        axis = None if channels is None else 0
        exact = np.percentile(np.abs(FLAT), percent, axis=axis, method="inverted_cdf")
        above = np.asarray(percentile.finalize(state, percent)) - exact
        assert (above >= 0).all()
        assert (above <= 2 * np.abs(FLAT).max(axis=axis) / bins).all()
        if percent == 100:
            assert (above == 0).all()


@pytest.mark.parametrize("spec", ["int4:tensor", "int8:tensor:restricted", "fp4_e2m1:tensor", "nf4:tensor"])
def test_the_range_found_loses_as_little_as_any(spec: str) -> None:
    parsed = scheme(spec)
    found = float(mse_range.finalize(_at_once(OBSERVERS["mse_range"]), parsed))

    def lost(span: float) -> float:
        scale = jnp.full((1, 1), span / parsed.element.reach, jnp.float32)
        value = np.asarray(dequantize(quantize(jnp.asarray(FLAT), parsed, scale=scale)), np.float64)
        return float(((value - FLAT) ** 2).sum())

    largest = float(np.abs(FLAT).max())
    best = min(lost(largest * (1 - index / 100)) for index in range(99))
    assert 0 < found <= largest
    assert lost(found) <= 1.02 * best


def test_ranges_of_nothing_and_of_tiny_values() -> None:
    assert np.isnan(float(percentile.finalize(percentile.init())))
    assert np.isnan(float(mse_range.finalize(mse_range.init(), INT4)))
    with pytest.raises(InputError, match="no rows were seen"):
        percentile.check(percentile.init(), "layer a")
    for size in (1e-30, 1e30):
        state = percentile.update(percentile.init(), jnp.asarray(FLAT[:50] / 100 * np.float32(size)))
        assert float(percentile.finalize(state, 100)) == np.abs(FLAT[:50] / 100 * np.float32(size)).max()
        middle = np.percentile(np.abs(FLAT[:50] / 100 * np.float32(size)), 50, method="inverted_cdf")
        assert float(percentile.finalize(state, 50)) == pytest.approx(middle, rel=0.5)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="1 bins"):
        histogram.init(bins=1)
    for percent in (0, 101):
        with pytest.raises(InputError, match="percentile"):
            percentile.finalize(percentile.init(), percent)
    for spec in ("int4:tensor:asym", "q4_0"):
        with pytest.raises(InputError, match="without zero points"):
            mse_range.finalize(mse_range.init(), scheme(spec))
