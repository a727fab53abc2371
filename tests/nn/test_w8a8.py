"""Layers that multiply codes: exactly the integers of numpy, and the layer of decoded values up to one rounding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.nn.linear import ExpertLinear, Linear
from jquant.nn.protocol import apply
from jquant.nn.surgery import named_modules, replace
from jquant.nn.w8a8 import (
    W8A8ExpertLinear,
    W8A8Linear,
    multiply,
    quantize_input,
    static_parameters,
    w8a8_layer,
)
from tests.jitted import dequantize, quantize
from tests.tiny_checkpoint import tiny_model

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((7, 80)) * np.exp(RNG.standard_normal(80))).astype(np.float32)
W = RNG.standard_normal((48, 80)).astype(np.float32)
BIAS = RNG.standard_normal(48).astype(np.float32)

PAIRS = (
    ("int8:channel", "int8:token"),
    ("int8:channel:restricted", "int8:token:restricted"),
    ("int8:tensor", "int8:token"),
    ("int8:channel", "int8:token:asym"),
    ("int8:channel", "int8:tensor"),
    ("int8:channel", "int8:tensor:asym"),
    ("int4:channel", "int8:token"),
    ("int4:channel", "int4:token:asym"),
    ("fp8_e4m3:channel", "fp8_e4m3:token"),
    ("fp8_e4m3:channel", "fp8_e5m2:token"),
    ("fp8_e5m2:tensor", "fp8_e4m3:tensor"),
    ("fp8_e4m3fnuz:channel", "fp8_e4m3fnuz:token"),
)


_quantized = jax.jit(quantize, static_argnames="scheme")


def _layer(weight_spec: str, activation_spec: str, x: np.ndarray = X) -> W8A8Linear:
    weight, activation = _quantized(jnp.asarray(W), scheme(weight_spec)), scheme(activation_spec)
    static = static_parameters(x.min(), x.max(), activation) if ":tensor" in activation_spec else (None, None)
    return W8A8Linear(
        weight, jnp.asarray(BIAS), activation=activation, input_scale=static[0], input_zero_point=static[1]
    )


def _decoded(layer: W8A8Linear, x: np.ndarray) -> np.ndarray:
    """The layer of decoded values, in float64."""
    scale, zero = (None if part is None else part.get_value() for part in (layer.input_scale, layer.input_zero_point))
    codes = jax.jit(quantize_input, static_argnums=1)(jnp.asarray(x), layer.activation, scale, zero)
    values, weights = (np.asarray(jax.jit(dequantize)(q), np.float64) for q in (codes, layer.weight.get_value()))
    return values @ weights.T + BIAS


@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_the_layer_of_decoded_values(pair: tuple[str, str]) -> None:
    layer = _layer(*pair)
    expected = _decoded(layer, X)
    np.testing.assert_allclose(apply(layer, jnp.asarray(X)), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    plain = X @ W.T + BIAS
    assert np.linalg.norm(expected - plain) < (0.4 if "int4" in pair[0] else 0.08) * np.linalg.norm(plain)


@pytest.mark.parametrize(("convention", "reach", "lowest"), [("full", 127.5, -128), ("restricted", 127.0, -127)])
def test_int8_is_numpys_integers(convention: str, reach: float, lowest: int) -> None:
    def codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(reach)
        return np.clip(np.rint(x / scale), lowest, 127).astype(np.int64), scale

    (xq, xs), (wq, ws) = codes(X), codes(W)
    expected = (xq @ wq.T).astype(np.float32) * xs * ws.T
    tail = "" if convention == "full" else ":restricted"
    parsed = (
        quantize(jnp.asarray(X), scheme(f"int8:token{tail}")),
        quantize(jnp.asarray(W), scheme(f"int8:channel{tail}")),
    )
    np.testing.assert_array_equal(jax.jit(multiply)(*parsed), expected)
    np.testing.assert_array_equal(multiply(*parsed), expected)


def test_int8_sums_beyond_float32_are_exact() -> None:
    """Sums near 2²⁷, where float32 holds every sixteenth integer."""
    x, w = (jnp.asarray(RNG.integers(lowest, 128, (3, 9001)), jnp.float32) for lowest in (90, -100))
    w = jnp.abs(w).at[:, 0].set(127)
    one = jnp.ones((3, 1))
    q = [quantize(each, scheme(f"int8:{kind}"), scale=one) for each, kind in ((x, "token"), (w, "channel"))]
    exact = np.asarray(x, np.int64) @ np.asarray(w, np.int64).T
    assert exact.max() > 2**25
    np.testing.assert_array_equal(multiply(*q), exact.astype(np.float32))


def test_fp8_is_ml_dtypes() -> None:
    def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
        return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), scale

    (xq, xs), (wq, ws) = rounded(X), rounded(W)
    layer = _layer("fp8_e4m3:channel", "fp8_e4m3:token")
    np.testing.assert_allclose(layer(jnp.asarray(X)), (xq @ wq.T) * xs * ws.T + BIAS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[5], PAIRS[8]])
def test_jit_split_state_and_batches(pair: tuple[str, str]) -> None:
    layer = _layer(*pair)
    alone = np.asarray(layer(jnp.asarray(X)))
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6 * np.abs(alone).max())
    close(apply(layer, jnp.asarray(X)), alone)
    close(layer(jnp.asarray(X[0])), alone[0])  # a token's result is its own
    close(layer(jnp.asarray(np.stack([X, X[::-1]])))[1], alone[::-1])


def test_dtypes() -> None:
    layer, x = _layer("int8:channel", "int8:token"), jnp.asarray(X, jnp.bfloat16)
    assert layer(x).dtype == jnp.bfloat16
    wide = layer(x, dtype=jnp.float32)
    np.testing.assert_array_equal(wide, layer(x.astype(jnp.float32)))
    np.testing.assert_array_equal(layer(x), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[5], PAIRS[8]])
def test_experts_are_linear_layers_side_by_side(pair: tuple[str, str]) -> None:
    counts = jnp.asarray([3, 0, 4])
    stack = jnp.asarray(np.stack([W, W, W[::-1] * 2]))
    alone = _layer(*pair)
    static = {name: None if (held := getattr(alone, name)) is None else held.get_value() for name in _STATIC}
    layer = W8A8ExpertLinear(_quantized(stack, scheme(pair[0])), activation=scheme(pair[1]), **static)
    found = np.asarray(apply(layer, jnp.asarray(X), counts))
    for rows, expert in ((slice(0, 3), 0), (slice(3, 7), 2)):
        weight = _quantized(stack[expert], scheme(pair[0]))
        single = W8A8Linear(weight, activation=scheme(pair[1]), **static)
        np.testing.assert_allclose(found[rows], apply(single, jnp.asarray(X[rows])), rtol=1e-5, atol=1e-5)


_STATIC = ("input_scale", "input_zero_point")


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[5], PAIRS[8]])
@pytest.mark.parametrize("vmapped", [False, True])
def test_the_gradient_is_that_of_the_product_with_decoded_weights(pair: tuple[str, str], vmapped: bool) -> None:
    layer, cotangent = _layer(*pair), RNG.standard_normal((7, 48)).astype(np.float32)
    graphdef, state = nnx.split(layer)

    def total(x: jax.Array, bias: jax.Array) -> jax.Array:
        held = nnx.merge(graphdef, state)
        held.bias = nnx.Param(bias)
        y = jax.vmap(held)(x[:, None])[:, 0] if vmapped else held(x)
        return jnp.sum(y * cotangent)

    of_x, of_bias = jax.jit(jax.grad(total, (0, 1)))(jnp.asarray(X), jnp.asarray(BIAS))
    expected = cotangent.astype(np.float64) @ np.asarray(dequantize(layer.weight.get_value()), np.float64)
    np.testing.assert_allclose(of_x, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_bias, cotangent.sum(0), rtol=1e-5, atol=1e-5)


def test_and_so_it_is_of_experts() -> None:
    counts, stack = jnp.asarray([3, 0, 4]), jnp.asarray(np.stack([W, W, W[::-1] * 2]))
    weight = _quantized(stack, scheme("int8:channel"))
    layer = W8A8ExpertLinear(weight, activation=scheme("int8:token"))
    cotangent = RNG.standard_normal((7, 48)).astype(np.float32)
    found = jax.jit(jax.grad(lambda x: jnp.sum(layer(x, counts) * cotangent)))(jnp.asarray(X))
    values = np.asarray(dequantize(weight), np.float64)[np.asarray([0, 0, 0, 2, 2, 2, 2])]
    np.testing.assert_allclose(found, np.einsum("ro,roi->ri", cotangent, values), rtol=1e-5, atol=1e-5)


def test_kernels_are_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper, as far as a gradient is traced: what runs there in the forward pass has no rule for one."""
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    monkeypatch.setattr(dispatch, "way", lambda: "kernel")
    weight = _quantized(jnp.ones((512, 512)), scheme("int8:channel"))
    layer = W8A8Linear(weight, jnp.zeros(512), activation=scheme("int8:token"))
    graphdef, state = nnx.split(layer)

    def total(x: jax.Array, state: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, state)(x).astype(jnp.float32))

    x = jnp.ones((256, 512), jnp.bfloat16)
    traced = str(jax.make_jaxpr(jax.grad(total, allow_int=True))(x, state))
    assert "mosaic" in traced or "pallas" in traced or "core_map" in traced
    assert jax.eval_shape(jax.grad(lambda bias: total(x, _with_bias(state, bias))), jnp.zeros(512)).shape == (512,)


def _with_bias(state: nnx.State, bias: jax.Array) -> nnx.State:
    return nnx.State({**state, "bias": nnx.Param(bias)})


def test_static_scales_cover_what_was_seen() -> None:
    scale, zero = static_parameters(-2.0, 6.0, scheme("int8:tensor:asym"))
    assert zero is not None
    assert float(scale) == pytest.approx(8 / 255)
    assert float(zero) == round(2 / (8 / 255))
    scale, zero = static_parameters(-2.0, 6.0, scheme("fp8_e4m3:tensor"))
    assert float(scale) == pytest.approx(6 / 448)
    assert zero is None


def test_it_takes_the_place_of_linear_layers_in_a_model() -> None:
    model = tiny_model()
    tokens = jnp.asarray(RNG.integers(0, 257, (2, 20)), jnp.int32)
    before = np.asarray(apply(model, tokens))
    chosen = {path: layer for path, layer in named_modules(model, Linear) if path.startswith("blocks.")}
    replace(
        model,
        {
            path: w8a8_layer(layer, _channel(layer.weight.get_value()), activation=scheme("int8:token"))
            for path, layer in chosen.items()
            if isinstance(layer, Linear)
        },
    )
    assert len({nnx.split(block)[0] for block in model.blocks}) == 1
    after = np.asarray(apply(model, tokens))
    assert 0 < np.linalg.norm(after - before) < 0.08 * np.linalg.norm(before)


def _channel(weight: jax.Array) -> QTensor:
    return _quantized(weight, scheme("int8:channel"))


def test_a_layers_bias_and_kind_are_kept() -> None:
    linear = Linear(80, 48, use_bias=True, rngs=nnx.Rngs(0))
    assert linear.bias is not None
    linear.bias.set_value(jnp.asarray(BIAS))
    made = w8a8_layer(linear, _channel(linear.weight.get_value()), activation=scheme("int8:token"))
    np.testing.assert_allclose(made(jnp.zeros((1, 80))), BIAS[None])  # type: ignore[call-arg]
    experts = ExpertLinear(3, 80, 48, rngs=nnx.Rngs(0))
    made = w8a8_layer(experts, _channel(experts.weight.get_value()), activation=scheme("int8:token"))
    assert isinstance(made, W8A8ExpertLinear)


@pytest.mark.parametrize(
    ("weight", "activation", "static", "message"),
    [
        ("int8:channel", "fp8_e4m3:token", {}, "both must be integers"),
        ("nf4:channel", "int8:token", {}, "both must be integers"),
        ("fp6_e2m3:channel", "fp8_e4m3:token", {}, "or both fp8"),
        ("int8:g16", "int8:token", {}, "weights must be symmetric, with scales per channel"),
        ("int8:channel:asym", "int8:token", {}, "weights must be symmetric"),
        ("int8:channel", "int8:g16", {}, "scales of activations are per token"),
        ("int8:channel", "int8:tensor", {}, "needs an input_scale"),
        ("int8:channel", "int8:token", {"input_scale": 1.0}, "drop input_scale"),
        ("int8:channel", "int8:tensor:asym", {"input_scale": 1.0}, "needs an input_zero_point"),
        ("int8:channel", "int8:tensor", {"input_scale": 1.0, "input_zero_point": 3.0}, "takes no input_zero_point"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(weight: str, activation: str, static: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        W8A8Linear(_quantized(jnp.asarray(W), scheme(weight)), activation=scheme(activation), **static)


def test_sums_that_int32_may_not_hold_are_refused() -> None:
    q = quantize(jnp.ones((1, 2**17)), scheme("int8:channel"))
    with pytest.raises(InputError, match="131072 inputs sums may exceed int32"):
        W8A8Linear(q, activation=scheme("int8:token"))
