"""From float layers to fake-quantized ones and on: what is replaced, said and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant import qat
from jquant.core.errors import InputError
from jquant.models.decoder import Decoder
from jquant.nn.fake_quant import FakeQuantModule
from jquant.nn.linear import Quantized
from jquant.nn.qat_layers import QATLinear, QATTable
from jquant.qat.state import split
from tests.tiny_checkpoint import tiny_model

TOKENS = jnp.arange(24).reshape(2, 12)


def _quiet(_: str) -> None:
    pass


def _logits(model: Decoder) -> jax.Array:
    return _forward(model, TOKENS)


@nnx.jit
def _forward(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)  # type: ignore[operator]


@pytest.fixture
def model() -> Decoder:
    return tiny_model()


def test_prepare_says_what_it_did(model: Decoder) -> None:
    said: list[str] = []
    recipe = qat.Recipe(
        rules=(
            qat.Rule(layers=(r"mlp\.down",), scheme=None),
            qat.Rule(layers=(r"attn",), scheme="int4:g32", gradient="lsq"),
            qat.Rule(layers=(r"mlp",), scheme="int8:channel", activation="int8:tensor", activation_gradient="lsq"),
        )
    )
    report = qat.prepare(model, recipe, announce=said.append)
    assert said == [str(report)]
    lines = said[0].splitlines()
    assert lines[0] == "attn: 8 Linear; weights int4:g32 by lsq; inputs as they are"
    assert lines[1] == "mlp: 4 Linear; weights int8:channel by clipped_ste; inputs int8:tensor by lsq"
    assert lines[2] == "input scales of 4 layers wait for jquant.qat.calibrate"
    assert isinstance(model.blocks[0].attn.q_proj, QATLinear)
    assert not isinstance(model.blocks[0].mlp.down_proj, QATLinear)


def test_training_parameters_are_the_float_model_s(model: Decoder) -> None:
    weight = model.blocks[0].attn.q_proj.weight
    qat.prepare(model, qat.one_rule("int4:g32"), announce=_quiet)
    assert model.blocks[0].attn.q_proj.weight is weight


@pytest.mark.parametrize(
    "name",
    [
        "int4-g128",
        "int3-g64-lsq",
        "w8a8",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8", "nf4", "nvfp4")),
    ],
)
def test_presets_train_and_convert_to_the_same_logits(name: str) -> None:
    model = tiny_model(layers=1)
    plain = _logits(model)
    recipe = qat.Recipe.from_json(
        {"rules": [{**rule, "scheme": _fits(rule["scheme"])} for rule in qat.PRESETS[name].as_json()["rules"]]}, name
    )
    qat.prepare(model, recipe, announce=_quiet)
    gradients = nnx.jit(nnx.grad(lambda model: jnp.mean(model(TOKENS) ** 2)))(model)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.all(np.isfinite(gradient.get_value())), path
        assert np.any(gradient.get_value() != 0), path
    trained = _logits(model)
    assert not np.array_equal(trained, plain)
    assert np.array_equal(_logits(qat.convert(model)), trained)


def _fits(spec: str) -> str:
    """The tiny model's rows are 64 wide."""
    return spec.replace("g128", "g32").replace("g64", "g32")


def test_an_embedding_that_is_also_the_head() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            inner = tiny_model()
            self.embed, self.head = inner.embed, inner.embed

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.embed(tokens) @ self.head.weight.get_value().T

    model: Any = Tied()
    qat.prepare(model, qat.one_rule("int4:g32", layers=("^embed$",), gradient="lsq"), announce=_quiet)
    assert isinstance(model.head.weight, QATTable)
    trained = _logits(model)
    gradient = nnx.grad(lambda model: jnp.sum(model(TOKENS) ** 2))(model)
    assert np.any(gradient["embed"]["weight"]["weight_quantizer"]["log_scale"].get_value() != 0)
    packed = qat.convert(model)
    assert isinstance(packed.embed.weight, Quantized)
    values = packed.embed(jnp.arange(257))
    np.testing.assert_allclose(trained, packed.embed(TOKENS) @ values.T, rtol=1e-5, atol=1e-4)


def test_a_shared_layer_stays_one() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.first = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
            self.second = self.first

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(nnx.relu(self.first(x)))

    model: Any = Twice()
    qat.prepare(model, qat.one_rule("int4:g32", layers=("first",)), announce=_quiet)
    assert model.first is model.second
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)), jnp.float32)
    trained = _forward(model, x)
    packed = qat.convert(model)
    assert packed.first is packed.second
    assert np.array_equal(_forward(packed, x), trained)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (qat.one_rule("int4:g32", layers=("vision",)), "'vision' matches nothing; there are"),
        (qat.one_rule("int4:g128"), r"blocks.0.attn.k_proj: group size 128 is wider than the row of 64"),
        (qat.one_rule("q4_0", gradient="lsq"), r"blocks.0.attn.k_proj: q4_0 finds its codes and scales itself"),
        (qat.one_rule("nf4:g32", gradient="lsq", start="lsq"), "LSQ's initial scale"),
        (qat.one_rule("int4:g32", activation="int8:token", activation_gradient="lsq"), "it trains one scale for all"),
        (qat.one_rule("int4:g32", activation="fp8_e4m3:tensor", activation_gradient="pact"), "it clips integers"),
        (qat.one_rule("int4:g32", rounding="stochastic"), "needs a key"),
        (qat.one_rule("int4:g32", layers=("^embed$",), activation="int8:token"), "input of an embedding is tokens"),
    ],
    ids=lambda value: "" if isinstance(value, qat.Recipe) else value[:20],
)
def test_what_cannot_be_is_refused_and_nothing_replaced(
    recipe: Callable[[], Any], message: str, model: Decoder
) -> None:
    with pytest.raises(InputError, match=message):
        qat.prepare(model, recipe, announce=_quiet)  # type: ignore[arg-type]
    assert not any(isinstance(module, FakeQuantModule) for _, module in nnx.iter_graph(model))


def test_twice_is_refused(model: Decoder) -> None:
    qat.prepare(model, qat.one_rule("int4:g32"), announce=_quiet)
    with pytest.raises(InputError, match="fake-quantized already: prepare a model once"):
        qat.prepare(model, qat.one_rule("int4:g32"), announce=_quiet)


def test_packed_layers_are_no_start(model: Decoder) -> None:
    qat.prepare(model, qat.one_rule("int4:g32", layers=("blocks", "lm_head")), announce=_quiet)
    qat.convert(model)
    del model.embed
    with pytest.raises(InputError, match="no float layers: start from the float model"):
        qat.prepare(model, qat.one_rule("int4:g32"), announce=_quiet)
    for leave in (qat.convert, qat.unwrap):
        with pytest.raises(InputError, match="no fake-quantized layers: prepare it first"):
            leave(model)


def test_input_scales_that_were_not_set(model: Decoder) -> None:
    recipe = qat.one_rule("int8:channel", activation="int8:tensor", activation_gradient="pact")
    qat.prepare(model, recipe, announce=_quiet)
    with pytest.raises(InputError, match=r"call jquant.qat.calibrate\(model, batches\) after prepare"):
        model(TOKENS)
    with pytest.raises(InputError, match=r"blocks.0.attn.k_proj.input_quantizer.* no input was seen"):
        qat.calibrate(model, [])
    qat.calibrate(model, [TOKENS, TOKENS + 1])
    trained = _logits(model)
    assert np.array_equal(_logits(qat.convert(model)), trained)


def test_static_ranges_that_saw_nothing(model: Decoder) -> None:
    qat.prepare(model, qat.one_rule("int8:channel", activation="int8:tensor"), announce=_quiet)
    with pytest.raises(InputError, match=r"blocks.0.attn.k_proj: .* no input was seen; run some batches first"):
        qat.convert(model)


def test_a_start_in_floats(model: Decoder) -> None:
    plain = _logits(model)
    qat.prepare(model, qat.one_rule("int2:g32", activation="int8:token"), announce=_quiet)
    qat.set_enabled(model, False)
    assert np.array_equal(_logits(model), plain)
    for leave in (qat.convert, qat.unwrap):
        with pytest.raises(InputError, match="quantization has not started"):
            leave(model)
    qat.set_enabled(model, True)
    assert not np.array_equal(_logits(model), plain)


def test_frozen_ranges_stay(model: Decoder) -> None:
    qat.prepare(model, qat.one_rule("int8:channel", activation="int8:tensor"), announce=_quiet)
    seen = model.blocks[1].mlp.up_proj.input_quantizer.seen  # type: ignore[union-attr]
    _logits(model)
    first = np.asarray(seen.get_value())
    assert first[3] > 0
    qat.set_observing(model, False)
    _logits(model)
    assert np.array_equal(seen.get_value(), first)
    qat.set_observing(model, True)
    _logits(model)
    assert not np.array_equal(seen.get_value(), first)


@pytest.mark.parametrize("gradient", ["lsq", "clipped_ste"])
def test_gradual_bits(gradient: Any) -> None:
    model = tiny_model(layers=1)
    plain = _logits(model)
    qat.prepare(model, qat.one_rule("int3:g32", gradient=gradient), announce=_quiet)
    distances = []
    for bits in (8, 5, None):
        qat.set_bits(model, bits)
        distances.append(float(jnp.linalg.norm(_logits(model) - plain)))
    assert distances == sorted(distances)
    assert distances[0] < distances[2] / 2
    trained = _logits(model)
    assert np.array_equal(_logits(qat.convert(model)), trained)


def test_gradual_bits_are_of_integers(model: Decoder) -> None:
    qat.prepare(model, qat.one_rule("nf4:g32"), announce=_quiet)
    with pytest.raises(InputError, match="no weight of the model is an integer"):
        qat.set_bits(model, 8)


def test_rounding_by_chance_in_training_and_to_nearest_after(model: Decoder) -> None:
    recipe = qat.one_rule("int4:g32", rounding="stochastic")
    qat.prepare(model, recipe, key=jax.random.key(0), announce=_quiet)
    assert not np.array_equal(_logits(model), _logits(model))
    nearest = tiny_model()
    qat.prepare(nearest, qat.one_rule("int4:g32"), announce=_quiet)
    assert np.array_equal(_logits(qat.convert(model)), _logits(qat.convert(nearest)))


def test_what_a_pattern_freezes_is_not_trained(model: Decoder) -> None:
    qat.prepare(model, qat.one_rule("int4:g32", gradient="lsq"), announce=_quiet)
    parts = split(model, frozen=(r"\.weight$",))
    assert parts.trained
    assert all(name.endswith("log_scale") for name in parts.trained)
