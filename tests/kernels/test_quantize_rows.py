"""Codes of activations by the kernel, against core's `quantize`, bit for bit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.qtensor import quantize
from jquant.core.scheme import scheme
from jquant.kernels.quantize_rows import fits, quantize_rows
from jquant.nn.w8a8 import narrow_codes


@pytest.mark.parametrize("spec", ["int8:token", "int4:token", "int8:token:restricted", "fp8_e4m3:token"])
@pytest.mark.parametrize(("shape", "dtype"), [((5, 256), "bfloat16"), ((3, 8192), "float32"), ((7, 896), "bfloat16")])
def test_codes_and_scales(spec: str, shape: tuple[int, int], dtype: str) -> None:
    chosen = scheme(spec)
    x = (jax.random.normal(jax.random.key(0), shape) ** 3 * jnp.logspace(-8, 6, shape[0])[:, None]).astype(dtype)
    x = x.at[1].set(0)
    assert fits(chosen, shape[1], x.dtype)
    expected = jax.jit(partial(quantize, scheme=chosen))(x)
    codes, scales = jax.jit(partial(quantize_rows, scheme=chosen, interpret=True))(x)
    np.testing.assert_array_equal(scales, expected.scales()[:, 0])
    assert codes.dtype == narrow_codes(expected).dtype
    np.testing.assert_array_equal(codes.view(jnp.uint8), narrow_codes(expected).view(jnp.uint8))


@pytest.mark.parametrize("spec", ["int8:token:asym", "int8:g128", "mxfp8", "fp8_e5m2:token"])
def test_what_does_not_fit(spec: str) -> None:
    assert not fits(scheme(spec), 1024, jnp.bfloat16)
    assert not fits(scheme("int8:token"), 1000, jnp.bfloat16)
