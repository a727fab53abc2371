"""Division inside kernels, against the correctly rounded one: in jnp's operations here, in assembly on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jquant.kernels import dispatch
from jquant.kernels.options import triton_options
from jquant.kernels.rounding import divisor, quotient, whole_quotient

INTERPRET = not dispatch.on_cuda()
COUNT = 1 << 16


def _kernel(whole: bool, x: Any, by: Any, out: Any) -> None:
    function = whole_quotient if whole else quotient
    out[...] = function(x[...], divisor(by[...], assembly=not INTERPRET), assembly=not INTERPRET)


def divided(x: np.ndarray, by: np.ndarray, *, whole: bool = False) -> np.ndarray:
    block = pl.BlockSpec((1024,), lambda i: (i,))
    call = pl.pallas_call(
        partial(_kernel, whole),
        grid=(len(x) // 1024,),
        in_specs=[block, block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        interpret=INTERPRET,
        **triton_options(4, INTERPRET),
    )
    return np.asarray(jax.jit(call)(jnp.asarray(x), jnp.asarray(by)))


def _significands(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(1 << 23, 1 << 24, COUNT).astype(np.float32) * np.float32(2.0**-23)


@pytest.mark.parametrize("exponent", [-123, -60, -40, 0, 50, 100])
def test_quotients(exponent: int) -> None:
    """Of small and large divisors (no numerator is subnormal), some with a significand of all ones."""
    rng = np.random.default_rng(exponent % 97)
    by = _significands(rng)
    by[::7] = np.float32(2 - 2.0**-23)
    ratio = _significands(rng) * np.exp2(rng.integers(-2, 12, COUNT)).astype(np.float32)
    ratio[::5] = np.exp2(rng.integers(-2, 3, len(ratio[::5]))).astype(np.float32)
    x = (by * ratio).astype(np.float32)
    x[1::3] *= -1
    scale = np.float32(2.0**exponent)
    np.testing.assert_array_equal(divided(x * scale, by * scale), x / by)


def test_ties() -> None:
    """Whole numbers and a half: half to even, and right beside them."""
    rng = np.random.default_rng(0)
    by = _significands(rng)
    tie = rng.integers(-128, 128, COUNT).astype(np.float32) + np.float32(0.5)
    x = (by * tie).astype(np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(divided(x, by, whole=True), np.round(x / by))
        x = np.nextafter(x, np.float32(np.inf), dtype=np.float32)


def test_what_is_no_number() -> None:
    x = np.zeros(1024, np.float32)
    by = np.ones(1024, np.float32)
    x[:6], by[:6] = [np.inf, -np.inf, np.nan, 1, np.inf, -0.0], [2, 2, 2, np.inf, np.inf, 3]
    found = divided(x, by)[:6]
    np.testing.assert_array_equal(found, [np.inf, -np.inf, np.nan, 0, np.nan, 0])
    assert np.signbit(found[5])
