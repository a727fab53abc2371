"""A layer with an adapter: what it computes, what of it is trained, and what the backward pass keeps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.nn.linear import QuantizedLinear
from jquant.nn.lora import LoRALinear, LoRAParam
from jquant.nn.protocol import apply
from tests.jitted import dequantize, quantize

OUT, IN, RANK = 48, 64, 4
SCHEMES = ("int4:g32", "int2:g32:asym", "nf4:g64:dq", "nvfp4", "q8_0")


def layer(spec: str = "nf4:g64:dq", *, zero: bool = False, alpha: float = 8.0, dtype: str = "float32") -> LoRALinear:
    keys = jax.random.split(jax.random.key(0), 4)
    weight = jax.random.normal(keys[0], (OUT, IN), dtype)
    b = jnp.zeros((OUT, RANK)) if zero else jax.random.normal(keys[2], (OUT, RANK))
    return LoRALinear(
        quantize(weight, scheme(spec)),
        jax.random.normal(keys[3], (OUT,), dtype),
        a=jax.random.normal(keys[1], (RANK, IN)),
        b=b,
        alpha=alpha,
    )


def inputs(dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(9), (2, 3, IN), dtype)


@pytest.mark.parametrize("spec", SCHEMES)
def test_output_is_that_of_the_equation(spec: str) -> None:
    module, x = layer(spec), inputs()
    wide = [np.asarray(v, np.float64) for v in (x, module.lora_a.get_value(), module.lora_b.get_value())]
    weight = np.asarray(dequantize(module.weight.get_value()), np.float64)
    assert module.bias is not None
    expected = wide[0] @ weight.T + np.asarray(module.bias.get_value()) + 8.0 / RANK * wide[0] @ wide[1].T @ wide[2].T
    assert np.allclose(apply(module, x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("spec", "dtype"), [*((spec, "float32") for spec in SCHEMES), ("nf4:g64:dq", "bfloat16")])
def test_with_b_zero_it_is_the_packed_layer_bit_for_bit(spec: str, dtype: str) -> None:
    module, x = layer(spec, zero=True, dtype=dtype), inputs(dtype)
    packed = module.base()
    assert isinstance(packed, QuantizedLinear)
    for wanted in (None, jnp.float32):
        one, other = (jax.jit(partial(each, dtype=wanted))(x) for each in (module, packed))
        assert np.array_equal(one, other)
        assert one.dtype == (wanted or x.dtype)


@pytest.mark.parametrize("spec", SCHEMES)
def test_merged_layer_computes_the_same(spec: str) -> None:
    module, x = layer(spec), inputs()
    assert np.allclose(apply(module.merged(), x), apply(module, x), rtol=1e-5, atol=1e-4)
    assert module.merged().weight.get_value().dtype == jnp.float32
    assert layer(spec, dtype="bfloat16").merged().weight.get_value().dtype == jnp.bfloat16


def test_gradients_are_those_of_float_layers_and_reach_adapters_only() -> None:
    module, x = layer(), inputs()

    def loss(module: LoRALinear) -> jax.Array:
        return jnp.sum(jnp.sin(module(x)))

    found = nnx.grad(loss, argnums=nnx.DiffState(0, LoRAParam))(module)
    assert {path[-1] for path, _ in nnx.to_flat_state(found)} == {"lora_a", "lora_b"}
    weight, bias = dequantize(module.weight.get_value()), module.bias.get_value()  # pyright: ignore[reportOptionalMemberAccess]

    def plain(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x @ (weight + 2.0 * b @ a).T + bias))

    a, b = jax.grad(plain, argnums=(0, 1))(module.lora_a.get_value(), module.lora_b.get_value())
    assert np.allclose(found["lora_a"].get_value(), a, rtol=1e-3, atol=1e-3)
    assert np.allclose(found["lora_b"].get_value(), b, rtol=1e-3, atol=1e-3)


def test_an_optimizer_leaves_base_and_bias_as_they_were() -> None:
    module, x = layer("int4:g32", zero=True), inputs()
    optimizer = nnx.Optimizer(module, optax.adamw(0.1, weight_decay=0.1), wrt=LoRAParam)
    before = jax.tree.map(np.asarray, nnx.state(module))
    for _ in range(2):
        gradients = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=nnx.DiffState(0, LoRAParam))(module)
        optimizer.update(module, gradients)
    after = nnx.state(module)
    for (path, old), (_, new) in zip(nnx.to_flat_state(before), nnx.to_flat_state(after), strict=True):
        same = jax.tree.map(np.array_equal, old.get_value(), new.get_value())
        assert all(jax.tree.leaves(same)) == (path[-1] not in ("lora_a", "lora_b")), path


def test_bfloat16_computes_with_float32_adapters() -> None:
    module, x = layer(dtype="bfloat16"), inputs("bfloat16")
    gradients = nnx.grad(lambda m: jnp.sum(m(x).astype(jnp.float32) ** 2), argnums=nnx.DiffState(0, LoRAParam))(module)
    assert module(x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_the_backward_pass_keeps_no_float_weight() -> None:
    rows, columns = 256, 512
    q = quantize(jax.random.normal(jax.random.key(0), (rows, columns)), scheme("int4:g64"))
    module = LoRALinear(q, a=jnp.ones((2, columns)), b=jnp.zeros((rows, 2)), alpha=1.0)
    _, backward = jax.vjp(lambda x: module(x), jnp.ones((4, columns)))
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= rows * columns and leaf.dtype != jnp.uint8]
    assert not kept


@pytest.mark.parametrize(
    ("a", "b", "alpha", "message"),
    [
        ((4, 60), (OUT, 4), 1.0, "adapter matrices"),
        ((4, IN), (OUT, 5), 1.0, "adapter matrices"),
        ((49, IN), (OUT, 49), 1.0, "rank 49"),
        ((4, IN), (OUT, 4), 0.0, "alpha"),
        ((4, IN), (OUT, 4), float("nan"), "alpha"),
    ],
)
@pytest.mark.usefixtures("annotations_unchecked")
def test_misfits(a: tuple[int, int], b: tuple[int, int], alpha: float, message: str) -> None:
    q = quantize(jnp.ones((OUT, IN)), scheme("int4:g32"))
    with pytest.raises(InputError, match=message):
        LoRALinear(q, a=jnp.zeros(a), b=jnp.zeros(b), alpha=alpha)
