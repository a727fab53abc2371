"""Fused fake quantization, against that of core/ste.py, bit for bit, and its gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core import ste
from jquant.core.division import exact_divide
from jquant.core.formats import Int
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.kernels.fake_quant import _divide_by_reach, fake_quantize, fits

SCHEMES = [
    *(f"int{bits}:g32" for bits in range(2, 9)),
    *("int4:channel", "int8:token", "int4:g128", "int3:g64:restricted", "int8:channel:restricted"),
]


@pytest.mark.parametrize(("spec", "dtype"), [*((spec, "bfloat16") for spec in SCHEMES), ("int4:g128", "float32")])
def test_value_and_gradient(spec: str, dtype: str) -> None:
    sizes = jnp.exp2(jnp.arange(27)[:, None] - 13.0)
    x = (jax.random.normal(jax.random.key(0), (27, 256)) * sizes).at[3].set(0).astype(dtype)
    chosen = scheme(spec)
    assert fits(chosen, x.shape, x.dtype)
    cotangent = jax.random.normal(jax.random.key(1), x.shape).astype(dtype)
    expected, pull = jax.vjp(lambda x: ste.fake_quantize(x, chosen), x)
    keeps: tuple[ste.Keep, ...] = ("input", "mask")
    for keep in keeps:
        found, pulled = jax.vjp(partial(fake_quantize, scheme=chosen, keep=keep, interpret=True), x)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(pulled(cotangent)[0], pull(cotangent)[0])
    straight = jax.vjp(lambda x: fake_quantize(x, chosen, clipped=False, interpret=True), x)[1](cotangent)[0]
    np.testing.assert_array_equal(straight, cotangent)


@pytest.mark.parametrize("spec", ["int4:g32:asym", "int4:tensor", "nf4:g64", "int4:g48", "int4:g32:bf16", "int4:b8x32"])
def test_what_does_not_fit(spec: str) -> None:
    assert not fits(scheme(spec), (64, 192), jnp.float32)
    x = jax.random.normal(jax.random.key(0), (64, 192))
    with dispatch.override("interpret"):
        found = dispatch.fake_quantize(x, scheme(spec))
    np.testing.assert_array_equal(found, ste.fake_quantize(x, scheme(spec)))


def test_dispatch_uses_it() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 8, 64))
    with dispatch.override("interpret"):
        assert "pallas_call" in str(jax.make_jaxpr(lambda x: dispatch.fake_quantize(x, scheme("int4:g32")))(x))
        found = dispatch.fake_quantize(x, scheme("int4:g32"))
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: dispatch.fake_quantize(x, scheme("int4:g32")))(x))
    np.testing.assert_array_equal(found, ste.fake_quantize(x, scheme("int4:g32")))


@pytest.mark.parametrize("convention", ["full", "restricted"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_division_by_the_reach(bits: int, convention: str) -> None:
    element = Int(bits, convention)  # type: ignore[arg-type]
    bits_of = np.random.default_rng(bits).integers(60 << 23, 200 << 23, 200_000, dtype=np.int32)
    a = jnp.asarray(bits_of).view(jnp.float32)
    divide = jax.jit(_divide_by_reach, static_argnums=1)
    np.testing.assert_array_equal(divide(a, element), exact_divide(a, element.reach))
