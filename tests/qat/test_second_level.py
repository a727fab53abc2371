"""NVFP4 in training: q, k and v have one g, gate and up another, and it follows their weights (SPEC 2 and 8)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jquant
from jquant import qat
from jquant.core.qtensor import QTensor, quantize
from jquant.core.scheme import scheme
from jquant.models.decoder import Decoder
from jquant.nn.surgery import module_at
from jquant.qat.config import QATConfig
from jquant.qat.losses import next_token_loss
from tests.tiny_checkpoint import tiny_model

NVFP4 = scheme("nvfp4")
SHARING = (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
ALONE = ("attn.o_proj", "mlp.down_proj")
TOKENS = np.random.default_rng(0).integers(0, 257, (16, 12)).astype(np.int32)


def _layer(model: Decoder, path: str) -> Any:
    return module_at(model, f"blocks.0.{path}")


def _of_packed(model: Decoder, path: str) -> float:
    return _of(_layer(model, path).weight.get_value())


def _of(q: QTensor) -> float:
    assert q.stored.scale2 is not None
    return float(np.squeeze(q.stored.scale2))


def _logits(model: Decoder) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model: model(jnp.asarray(TOKENS[:2])))(model))


def _prepared(gradient: str = "clipped_ste") -> Decoder:
    model = tiny_model(layers=1)
    recipe = qat.one_rule("nvfp4", layers=(r"^blocks\.",), gradient=gradient, start="range")
    qat.prepare(model, recipe, announce=lambda _: None)
    return model


def _train(model: Decoder) -> None:
    rows = qat.RowBatches(TOKENS, batch=4, seed=0)
    qat.train(model, next_token_loss(), rows, QATConfig(steps=3, batch=4, learning_rate=3e-2))


def test_begins_with_the_values_of_quantization_after_training() -> None:
    packed = tiny_model(layers=1)
    jquant.quantize_layers(packed, NVFP4, layers=(r"^blocks\.",))
    assert np.array_equal(_logits(_prepared()), _logits(packed))


@pytest.mark.parametrize("gradient", ["clipped_ste", "lsq"])
def test_follows_the_weights_and_converts_to_the_same_logits(gradient: str) -> None:
    model = _prepared(gradient)
    before = [float(np.squeeze(_layer(model, paths[0]).weight_quantizer.level.get_value())) for paths in SHARING]
    _train(model)
    floats = {path: _layer(model, path).weight.get_value() for path in (*SHARING[0], *SHARING[1], *ALONE)}
    scales = {path: _layer(model, path).weight_quantizer for path in floats}
    if gradient == "lsq":
        scales = {path: quantizer.parameters()[0] for path, quantizer in scales.items()}
    trained = _logits(model)
    qat.convert(model)
    assert np.array_equal(_logits(model), trained)
    for paths in (*SHARING, *((path,) for path in ALONE)):
        joined = jnp.concatenate([floats[path] for path in paths])
        given = jnp.concatenate([scales[path] for path in paths]) if gradient == "lsq" else None
        expected = quantize(joined, NVFP4, scale=given)
        rows = np.split(np.asarray(jquant.dequantize(expected)), np.cumsum([len(floats[path]) for path in paths])[:-1])
        for path, values in zip(paths, rows, strict=True):
            assert _of_packed(model, path) == _of(expected), path
            assert np.array_equal(np.asarray(jquant.dequantize(_layer(model, path).weight.get_value())), values), path
    for paths, old in zip(SHARING, before, strict=True):
        assert _of_packed(model, paths[0]) != old


def test_a_loop_of_one_s_own_sets_it_by_a_call() -> None:
    model = _prepared()
    weight = _layer(model, "attn.k_proj").weight
    weight.set_value(4 * weight.get_value())
    stale = _logits(model)
    nnx.jit(qat.share_levels)(model)
    assert not np.array_equal(_logits(model), stale)
    trained = _logits(model)
    qat.convert(model)
    assert np.array_equal(_logits(model), trained)
    assert len({_of_packed(model, path) for path in SHARING[0]}) == 1


def test_other_schemes_and_modules_have_none() -> None:
    model = tiny_model(layers=1)
    qat.prepare(model, qat.one_rule("int4:g32"), announce=lambda _: None)
    assert _layer(model, "attn.q_proj").weight_quantizer.level is None

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.first, self.second = (nnx.Linear(32, 32, rngs=nnx.Rngs(seed)) for seed in (0, 1))

    net: Any = Net()
    qat.prepare(net, qat.one_rule("nvfp4", layers=("first", "second")), announce=lambda _: None)
    assert net.first.weight_quantizer.level is None


def test_gradual_bits_share_as_they_end() -> None:
    """Layers that end with other bits have a g of their own meanwhile too; bits that come back bring g back."""
    model = tiny_model(layers=1)
    rules = (
        qat.Rule(layers=("q_proj", "gate_proj"), scheme="int4:g16:nested", gradient="lsq", start="range"),
        qat.Rule(layers=("k_proj", "v_proj", "up_proj"), scheme="int8:g16:nested"),
    )
    qat.prepare(model, qat.Recipe(rules=rules), announce=lambda _: None)
    before = _logits(model)
    assert _layer(model, "attn.q_proj").weight_quantizer.level is None
    qat.set_bits(model, 8)
    assert not np.array_equal(_logits(model), before)
    qat.set_bits(model, None)
    np.testing.assert_allclose(_logits(model), before, atol=1e-5 * np.abs(before).max())
    rows = qat.RowBatches(TOKENS, batch=4, seed=0)
    qat.train(model, next_token_loss(), rows, QATConfig(steps=3, batch=4, learning_rate=1e-3, gradual_bits=((2, 8),)))
    trained = _logits(model)
    qat.convert(model)
    assert np.array_equal(_logits(model), trained)


def test_trained_scales_beside_others_share_too() -> None:
    model = tiny_model(layers=1)
    rules = (
        qat.Rule(layers=("q_proj",), scheme="nvfp4", gradient="lsq", start="range"),
        qat.Rule(layers=("k_proj", "v_proj"), scheme="nvfp4"),
    )
    qat.prepare(model, qat.Recipe(rules=rules), announce=lambda _: None)
    trained = _logits(model)
    qat.convert(model)
    assert np.array_equal(_logits(model), trained)
    assert len({_of_packed(model, path) for path in SHARING[0]}) == 1


@pytest.mark.parametrize("adapted", [SHARING[0], SHARING[0][:2]])
@pytest.mark.parametrize("spec", [None, "nvfp4"])
def test_adapters_that_are_requantized_keep_one(adapted: tuple[str, ...], spec: str | None) -> None:
    """Where k or v has no adapter it stays packed, and so does the g of all three."""
    model = tiny_model(layers=1)
    jquant.quantize_layers(model, NVFP4, layers=(r"^blocks\.",))
    before = _of_packed(model, SHARING[0][2])
    qat.add_adapters(model, [path.replace(".", r"\.") for path in adapted], None, rank=4, key=jax.random.key(0))
    for path in adapted:
        layer = _layer(model, path)
        layer.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(1), layer.lora_b.get_value().shape))
    merged = {path: _layer(model, path).merged().weight.get_value() for path in adapted}
    qat.requantize(model, None if spec is None else scheme(spec))
    (level,) = {_of_packed(model, path) for path in SHARING[0]}
    whole = len(adapted) == 3
    assert level == (_of(quantize(jnp.concatenate(list(merged.values())), NVFP4)) if whole else before)
    for path, weight in merged.items():
        values = np.asarray(jquant.dequantize(_layer(model, path).weight.get_value()))
        assert np.linalg.norm(values - np.asarray(weight)) < 0.15 * np.linalg.norm(np.asarray(weight))
