"""Products of codes on Hopper's tensor cores: lowered anywhere, and run where there is such a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant import qat
from jquant.core.qtensor import quantize
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.kernels.w8a8_wgmma import fits, matmul
from jquant.nn.linear import Linear
from jquant.nn.w8a8 import W8A8Linear, multiply, narrow_codes


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(256, 256, 128), (300, 384, 512), (1000, 512, 1152)])
@pytest.mark.parametrize("element", ["int8", "fp8_e4m3"])
def test_product(element: str, shape: tuple[int, int, int], *, with_bias: bool) -> None:
    rows, out, inputs = shape
    assert fits(*shape)
    x = quantize(jax.random.normal(jax.random.key(0), (rows, inputs)), scheme(f"{element}:token"))
    w = quantize(jax.random.normal(jax.random.key(1), (out, inputs)), scheme(f"{element}:channel"))
    bias = jax.random.normal(jax.random.key(2), (out,)) if with_bias else None
    weight = w.planes[0] if element == "int8" else narrow_codes(w)
    operands = (narrow_codes(x), weight, x.scales()[:, 0], w.scales()[:, 0], bias)
    if not dispatch.on_hopper():
        assert "mosaic_gpu" in jax.jit(matmul).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        return
    expected = multiply(x, w) + (0 if bias is None else bias)
    found = jax.jit(matmul)(*operands)
    # Tensor cores keep fewer bits of sums of fp8, by XLA's product as by this one.
    error = 2**-8 if element == "int8" else 2**-7
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=error, atol=error * float(jnp.std(expected)))


@pytest.mark.parametrize("element", ["int8", "fp8_e4m3"])
def test_layer_by_kernels_is_the_layer(element: str) -> None:
    """The same values as without kernels, also under vmap; on other devices both are jnp's."""
    weight = quantize(jax.random.normal(jax.random.key(0), (256, 512)), scheme(f"{element}:channel"))
    layer = W8A8Linear(weight, jnp.arange(256.0), activation=scheme(f"{element}:token"))
    x = jax.random.normal(jax.random.key(1), (2, 300, 512)).astype(jnp.bfloat16)
    expected = jax.jit(layer)(x)
    with dispatch.override("jnp"):
        plain = jax.jit(layer)(x)
    vmapped = jax.jit(jax.vmap(layer))(x)
    for found in (plain, vmapped):
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7, atol=2**-7 * 512**0.5
        )


def test_what_does_not_fit() -> None:
    assert not fits(16, 256, 128)
    assert not fits(512, 200, 128)
    assert not fits(512, 256, 100)
    weight = quantize(jnp.ones((256, 512)), scheme("int4:channel"))
    assert dispatch.multiply_as_codes(jnp.ones((512, 512), jnp.bfloat16), weight, scheme("int8:token")) is None


def test_gradient_is_no_error() -> None:
    """By kernels it is zero; elsewhere what comes by way of the scales."""
    weight = quantize(jax.random.normal(jax.random.key(0), (256, 512)), scheme("int8:channel"))
    layer = W8A8Linear(weight, activation=scheme("int8:token"))
    x = jax.random.normal(jax.random.key(1), (300, 512)).astype(jnp.bfloat16)
    gradient = jax.grad(lambda x: jnp.sum(layer(x).astype(jnp.float32)))(x)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    assert bool(jnp.all(gradient == 0)) == dispatch.on_hopper()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_by_kernels_is_training(dtype: str) -> None:
    """A layer that multiplies codes in its forward pass: output and gradients as without kernels, also under vmap."""
    layer = Linear(512, 256, rngs=nnx.Rngs(0))
    layer.weight.set_value(layer.weight.get_value().astype(dtype))
    model = nnx.Sequential(layer)
    recipe = qat.one_rule("int8:channel", layers=("layers",), start="range", activation="int8:token")
    qat.prepare(model, recipe, announce=lambda line: None)
    x = jax.random.normal(jax.random.key(1), (2, 300, 512)).astype(jnp.bfloat16)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graphdef, params, rest)(x)
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    assert ("mosaic_gpu" in jax.jit(both).lower(params, x).as_text()) == dispatch.on_hopper()
    (_, value), gradients = jax.jit(both)(params, x)
    with dispatch.override("jnp"):
        (_, plain), expected = jax.jit(both)(params, x)
    vmapped = jax.jit(jax.vmap(lambda x: loss(params, x)[1]))(x)
    for found in (value, vmapped):
        np.testing.assert_allclose(*(each.astype(jnp.float32) for each in (found, plain)), rtol=2**-7, atol=2**-7)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.std(wanted.astype(jnp.float32)))
        np.testing.assert_allclose(
            *(each.astype(jnp.float32) for each in (found, wanted)), rtol=2**-6, atol=2**-6 * scale
        )
