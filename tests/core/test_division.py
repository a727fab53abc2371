"""Division is that of numpy, which is IEEE's, whatever the backend's own quotient is like."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.division import (
    _whole_by_remainder,
    divide_by_refinement,
    exact_divide,
    exact_ratio,
    refine,
    whole_ratio,
)


def _significands(count: int, seed: int) -> np.ndarray:
    """In [1, 2): random ones, and ones with few bits set or missing, whose quotients lie near midpoints."""
    rng = np.random.default_rng(seed)
    mantissa = rng.integers(0, 2**23, count)
    few = rng.integers(0, 2**4, count) << rng.integers(0, 20, count)
    mantissa = np.choose(rng.integers(0, 3, count), [mantissa, few, 2**23 - 1 - few])
    return (1 + mantissa * 2.0**-23).astype(np.float32)


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_a_quotient_two_units_off_is_mended(off: int) -> None:
    a, b = _significands(400_000, 0), _significands(400_000, 1)
    start = (np.float32(a / b).view(np.int32) + off).view(np.float32)
    for run in (refine, jax.jit(refine)):
        assert np.array_equal(np.asarray(run(jnp.asarray(a), jnp.asarray(b), jnp.asarray(start))), a / b)


def test_signs_exponents_zeros_and_what_is_not_finite() -> None:
    rng = np.random.default_rng(2)
    a = np.concatenate([np.ldexp(_significands(200_000, 3), rng.integers(-60, 61, 200_000)), [0, np.inf, np.nan, 3e38]])
    b = np.concatenate([np.ldexp(_significands(200_000, 4), rng.integers(-60, 61, 200_000)), [2, 2, 2, 1e-3]])
    a = (a * np.where(rng.random(len(a)) < 0.5, -1, 1)).astype(np.float32)
    b = b.astype(np.float32)
    with np.errstate(over="ignore"):
        expected = a / b
    for run in (exact_ratio, jax.jit(exact_ratio), jax.jit(divide_by_refinement)):
        assert np.array_equal(np.asarray(run(jnp.asarray(a), jnp.asarray(b))), expected, equal_nan=True)


@pytest.mark.parametrize("divisor", [7.0, 7.5, 15.0, 127.0, 448.0, 6.0])
def test_constants_and_broadcast_divisors(divisor: float) -> None:
    a = np.abs(np.random.default_rng(5).standard_normal((64, 1000), np.float32))
    scale = _significands(64, 6)[:, None]
    assert np.array_equal(jax.jit(exact_divide, static_argnums=1)(jnp.asarray(a), divisor), a / np.float32(divisor))
    assert np.array_equal(jax.jit(exact_ratio)(jnp.asarray(a), jnp.asarray(scale)), a / scale)


@pytest.mark.parametrize("run", [whole_ratio, jax.jit(_whole_by_remainder)], ids=["whole_ratio", "by remainder"])
def test_whole_numbers_are_those_of_the_rounded_quotient(run: Callable[..., jax.Array]) -> None:
    rng = np.random.default_rng(7)
    significands = _significands(300_000, 8)
    b = np.ldexp(significands, rng.integers(-60, 61, len(significands))).astype(np.float32)
    ties = ((rng.integers(-260, 260, len(b)) + 0.5) * b).astype(np.float32)
    near = (ties.view(np.int32) + rng.integers(-3, 4, len(b))).astype(np.int32).view(np.float32)
    assert (np.abs(near / b - np.floor(near / b) - 0.5) == 0).sum() > 10_000
    for a in (ties, near, (b * rng.uniform(-300, 300, len(b))).astype(np.float32), b, -b, 0 * b):
        assert np.array_equal(np.asarray(run(jnp.asarray(a), jnp.asarray(b))), np.round(a / b))
    far = np.asarray(run(jnp.asarray([1e30, -1e30, np.nan], jnp.float32), jnp.asarray([1e-3, 1e-3, 1], jnp.float32)))
    assert far[0] >= 1024
    assert far[1] <= -1024
    assert np.isnan(far[2])
