"""Fused fake quantization, against that of core/ste.py, bit for bit, and its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant import qat
from jquant.core import ste
from jquant.core.division import exact_divide
from jquant.core.formats import Int
from jquant.core.qtensor import quantize
from jquant.core.scheme import scheme
from jquant.core.tiles import Axis
from jquant.kernels import dispatch
from jquant.kernels.fake_quant import (
    Codes,
    Encoded,
    Keep,
    _divide_by_reach,
    fake_quantize,
    fake_quantize_and_encode,
    fits,
)
from jquant.nn.linear import Linear
from jquant.nn.w8a8 import narrow_codes

INTERPRET = not dispatch.on_cuda()  # on a GPU the kernel itself

KEEPS: tuple[Keep, ...] = ("input", "bound")
SCHEMES = [
    *(f"int{bits}:g32" for bits in range(2, 9)),
    *("int4:channel", "int8:token", "int4:g128", "int3:g64:restricted", "int8:channel:restricted"),
]


@pytest.mark.parametrize(("spec", "dtype"), [*((spec, "bfloat16") for spec in SCHEMES), ("int4:g128", "float32")])
def test_value_and_gradient(spec: str, dtype: str) -> None:
    x, cotangent, chosen = _operands((27, 256), dtype), _operands((27, 256), dtype, seed=1), scheme(spec)
    assert fits(chosen, x.shape, x.dtype)
    expected, pull = jax.vjp(lambda x: ste.fake_quantize(x, chosen), x)
    for keep in KEEPS:
        found, pulled = jax.vjp(partial(fake_quantize, scheme=chosen, keep=keep, interpret=INTERPRET), x)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(pulled(cotangent)[0], pull(cotangent)[0])
    straight = jax.vjp(lambda x: fake_quantize(x, chosen, clipped=False, interpret=INTERPRET), x)[1](cotangent)[0]
    np.testing.assert_array_equal(straight, cotangent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codes", ["signed", "packed"])
@pytest.mark.parametrize("spec", ["int8:token", "int8:channel:restricted"])
def test_codes_come_with_the_values(spec: str, codes: Codes, dtype: str) -> None:
    x, cotangent, chosen = _operands((27, 256), dtype), _operands((27, 256), "bfloat16", seed=1), scheme(spec)
    encode = partial(
        fake_quantize_and_encode, scheme=chosen, codes=codes, clipped=True, dtype="bfloat16", interpret=INTERPRET
    )
    found, pulled = jax.vjp(encode, x)
    value, pull = jax.vjp(partial(fake_quantize, scheme=chosen, dtype="bfloat16", interpret=INTERPRET), x)
    expected = quantize(x, chosen)
    np.testing.assert_array_equal(found.value, value)
    np.testing.assert_array_equal(found.codes, expected.planes[0] if codes == "packed" else narrow_codes(expected))
    np.testing.assert_array_equal(found.scale, expected.scales()[:, 0])
    none: Any = np.zeros(found.codes.shape, jax.dtypes.float0), jnp.ones_like(found.scale)
    np.testing.assert_array_equal(pulled(Encoded(cotangent, *none))[0], pull(cotangent)[0])


def test_layers_with_one_input_have_one_call_in_their_program() -> None:
    """The kernel's call is a function that the program has once, so that XLA may merge calls with equal arguments."""
    x, chosen = jnp.ones((32, 256)), scheme("int8:token")
    fake = partial(fake_quantize_and_encode, scheme=chosen, codes="signed", interpret=INTERPRET)
    text = jax.jit(lambda x: (fake(x), fake(x), fake(x))).lower(x).as_text()
    assert text.count("call @_over_groups") == 3
    assert text.count("func.func private @_over_groups") == 1


@pytest.mark.parametrize(
    ("axis", "spec"), [(-1, "int4:g128"), (-1, "int8:token"), (-2, "int4:g128"), (-2, "int8:channel")]
)
def test_infinities_and_nan_are_told_of(axis: Axis, spec: str) -> None:
    """A group with an infinity becomes NaN; whether one with a NaN does as a whole depends on the backend's maximum."""
    x = jax.random.normal(jax.random.key(0), (512, 512)).at[200, 300].set(jnp.inf)
    x = x.at[7, 400].set(-jnp.inf).at[100, 100].set(3e38)
    expected = jax.jit(lambda x: ste.fake_quantize(x, scheme(spec), axis=axis))(x)
    found = jax.jit(lambda x: fake_quantize(x, scheme(spec), axis=axis, interpret=INTERPRET))
    np.testing.assert_array_equal(found(x), expected)
    assert np.isnan(expected).sum() >= 2 * 128
    assert np.isnan(found(x.at[3, 5].set(jnp.nan))[3, 5])


@pytest.mark.parametrize("spec", ["int4:g128", "int2:g16", "int8:channel", "int3:g64:restricted"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_of_masters_either_way_round(spec: str, axis: Literal[-1, -2]) -> None:
    """float32 in, bfloat16 out, a stack of matrices, groups along rows or columns."""
    _check_rounding_of_masters((2, 256, 512), spec, axis)


def test_of_one_group_of_columns() -> None:
    """As in nnx.Linear of no more inputs than a group."""
    _check_rounding_of_masters((64, 128), "int4:channel", -2)


@pytest.mark.parametrize("shape", [(512, 48), (2, 1024, 32), (768, 4096)])
def test_of_columns_that_are_read_twice(shape: tuple[int, ...]) -> None:
    assert fits(scheme("int8:channel"), shape, jnp.float32, -2)
    _check_rounding_of_masters(shape, "int8:channel", -2)


def _check_rounding_of_masters(shape: tuple[int, ...], spec: str, axis: Literal[-1, -2]) -> None:
    x, cotangent, chosen = _operands(shape, "float32"), _operands(shape, "bfloat16", seed=1), scheme(spec)
    if not fits(chosen, x.shape, x.dtype, axis):
        assert (spec, axis) == ("int2:g16", -1)
        return

    def reference(x: jax.Array) -> jax.Array:
        turned = x if axis == -1 else x.swapaxes(-1, -2)
        value = ste.fake_quantize(turned, chosen)
        return (value if axis == -1 else value.swapaxes(-1, -2)).astype("bfloat16")

    expected, pull = jax.vjp(reference, x)
    for keep in KEEPS:
        kernel = partial(fake_quantize, scheme=chosen, axis=axis, dtype="bfloat16", keep=keep, interpret=INTERPRET)
        found, pulled = jax.vjp(kernel, x)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(pulled(cotangent)[0], pull(cotangent)[0])


def _operands(shape: tuple[int, ...], dtype: str, *, seed: int = 0) -> jax.Array:
    sizes = jnp.exp2(jnp.arange(shape[-2])[:, None] % 27 - 13.0)
    return (jax.random.normal(jax.random.key(seed), shape) * sizes).at[..., 3, :].set(0).astype(dtype)


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
    with dispatch.override("jnp"):
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


def test_layers_in_training_use_it() -> None:
    """Flax's kernel[in, out], and W[out, in] of the decoder: the same output and gradients as without."""
    x = jax.random.normal(jax.random.key(0), (5, 128), jnp.bfloat16)

    def trained(layer: nnx.Module) -> tuple[str, list[jax.Array]]:
        model = nnx.Sequential(layer)
        qat.prepare(model, qat.one_rule("int4:g32", layers=("layers",), start="range"), announce=lambda line: None)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params: nnx.State) -> jax.Array:
            return jnp.sum(nnx.merge(graphdef, params, rest)(x).astype(jnp.float32) ** 2)

        found = jax.value_and_grad(loss)
        return str(jax.make_jaxpr(found)(params)), jax.tree.leaves(jax.jit(found)(params))

    for layer in (
        nnx.Linear(128, 128, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        Linear(128, 128, rngs=nnx.Rngs(0)),
    ):
        expected = trained(nnx.clone(layer))
        with dispatch.override("interpret"):
            found = trained(nnx.clone(layer))
        assert "fake_quantize" in found[0]
        for one, other in zip(found[1], expected[1], strict=True):
            # Gradients come out of products in bfloat16; where it may, XLA keeps the bits that this rounds away.
            np.testing.assert_array_equal(one.astype(jnp.bfloat16), other.astype(jnp.bfloat16))
