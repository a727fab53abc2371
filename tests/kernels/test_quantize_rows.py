"""Codes of activations by the kernel, against core's `quantize`, bit for bit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.qtensor import quantize
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.kernels.quantize_rows import fits, quantize_rows
from jquant.nn.w8a8 import narrow_codes

INTERPRET = not dispatch.on_cuda()  # on a GPU the kernel itself


@pytest.mark.parametrize("spec", ["int8:token", "int4:token", "int8:token:restricted", "fp8_e4m3:token"])
@pytest.mark.parametrize(("shape", "dtype"), [((5, 256), "bfloat16"), ((3, 8192), "float32"), ((7, 896), "bfloat16")])
def test_codes_and_scales(spec: str, shape: tuple[int, int], dtype: str) -> None:
    chosen = scheme(spec)
    x = (jax.random.normal(jax.random.key(0), shape) ** 3 * jnp.logspace(-8, 6, shape[0])[:, None]).astype(dtype)
    x = x.at[1].set(0)
    assert fits(chosen, shape[1], x.dtype)
    expected = jax.jit(partial(quantize, scheme=chosen))(x)
    codes, scales = jax.jit(partial(quantize_rows, scheme=chosen, interpret=INTERPRET))(x)
    np.testing.assert_array_equal(scales, expected.scales()[:, 0])
    assert codes.dtype == narrow_codes(expected).dtype
    np.testing.assert_array_equal(codes.view(jnp.uint8), narrow_codes(expected).view(jnp.uint8))


@pytest.mark.parametrize("spec", ["int8:token", "fp8_e4m3:token"])
def test_the_largest_the_smallest_and_what_is_no_number(spec: str) -> None:
    """Scales tell of infinities and of NaN; codes of such rows say nothing."""
    chosen = scheme(spec)
    x = jax.random.normal(jax.random.key(0), (5, 256))
    x = x * jnp.asarray([1.0, 1.0, 1e-34, 0.0, 1.0])[:, None]
    x = x.at[0, 3].set(jnp.inf).at[1, 7].set(jnp.nan).at[3].set(-0.0).at[3, ::2].set(3e38).at[4, 5].set(-jnp.inf)
    expected = jax.jit(partial(quantize, scheme=chosen))(x)
    codes, scales = jax.jit(partial(quantize_rows, scheme=chosen, interpret=INTERPRET))(x)
    np.testing.assert_array_equal(scales, expected.scales()[:, 0])
    assert scales[0] == jnp.inf
    assert jnp.isnan(scales[1])
    np.testing.assert_array_equal(codes.view(jnp.uint8)[2:4], narrow_codes(expected).view(jnp.uint8)[2:4])


@pytest.mark.parametrize("spec", ["int8:token:asym", "int8:g128", "mxfp8", "fp8_e5m2:token"])
def test_what_does_not_fit(spec: str) -> None:
    assert not fits(scheme(spec), 1024, jnp.bfloat16)
    assert not fits(scheme("int8:token"), 1000, jnp.bfloat16)
