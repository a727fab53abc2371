"""Planted faults are found where they were planted, and a sound model has none."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.data.blocks import windows
from jquant.evaluation import faults
from jquant.evaluation.faults import (
    accuracy_findings,
    block_faults,
    packed_faults,
    speed_findings,
    time_step,
    tokenizer_faults,
    weight_faults,
)
from jquant.evaluation.outliers import outliers
from jquant.evaluation.sensitivity import LayerSensitivity, float_pass
from jquant.models.decoder import Decoder
from jquant.nn.surgery import module_at
from jquant.ptq.rtn import quantize_layers
from tests.jitted import quantize
from tests.tiny_checkpoint import tiny_model

CUT = windows(np.random.default_rng(0).integers(0, 257, 200).astype(np.int32), window=48)
SPEC = "int4:g32"


def _quantized(spec: str = SPEC) -> Decoder:
    model = tiny_model()
    quantize_layers(model, scheme(spec))
    return model


def _plant(path: str, change: Any) -> Decoder:
    """A quantized model, one of whose layers holds the codes of another matrix."""
    model = _quantized()
    original: Any = module_at(tiny_model(), path)
    layer: Any = module_at(model, path)
    layer.weight.set_value(quantize(change(original.weight.get_value()), scheme(SPEC)))
    return model


def _to_neighbours(weight: jax.Array) -> jax.Array:
    """Halves of each head of 16 rows to pairs of neighbours, as GGUF's llama files have them."""
    return weight.reshape(-1, 2, 8, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _weight(name: str) -> jax.Array:
    layer: Any = getattr(tiny_model().blocks[0].mlp, name)
    return layer.weight.get_value()


@pytest.mark.parametrize("spec", ["int4:g32", "int2:g32", "fp8_e4m3:channel"])
def test_a_sound_model_has_no_fault(spec: str) -> None:
    model, reference = _quantized(spec), tiny_model()
    assert packed_faults(model) == []
    assert weight_faults(model, reference, head_dim=16) == []
    assert spec != SPEC or block_faults(model, float_pass(reference, CUT)) == []


@pytest.mark.parametrize(
    ("path", "change", "cause", "said"),
    [
        ("blocks.1.mlp.up_proj", lambda w: 2.0 * w, "wrong scale", "its scales are 2"),
        ("blocks.0.attn.v_proj", lambda w: 0.5 * w, "wrong scale", "its scales are 0.5"),
        ("blocks.0.mlp.down_proj", lambda w: w.at[::2].mul(3.0), "wrong scale", "32 of its rows"),
        ("blocks.1.attn.q_proj", _to_neighbours, "rotary order", "other order of rotary pairs"),
        ("blocks.0.attn.k_proj", _to_neighbours, "rotary order", "turn to halves"),
        ("blocks.0.mlp.gate_proj", lambda w: _weight("up_proj"), "swapped", "mlp.up_proj"),
        ("blocks.1.mlp.gate_proj", lambda w: _weight("gate_proj"), "swapped", "blocks.0.mlp.gate_proj"),
        ("blocks.1.attn.o_proj", lambda w: jax.random.normal(jax.random.key(0), w.shape), "other weights", "no factor"),
    ],
)  # fmt: skip
def test_a_planted_layer_is_named_with_its_cause(path: str, change: Any, cause: str, said: str) -> None:
    model = _plant(path, change)
    (found,) = weight_faults(model, tiny_model(), head_dim=16)
    assert (found.case, found.where, found.cause) == ("gibberish", path, cause)
    assert said in found.said


def test_errors_in_silent_inputs_are_a_methods_choice() -> None:
    """As GPTQ leaves them, which asks what a column's input is: far more than rounding costs, and no fault."""

    def compensated(weight: jax.Array) -> jax.Array:
        return weight.at[:, 5:11].add(1.2 * jnp.std(weight) * jax.random.normal(jax.random.key(1), (len(weight), 6)))

    model = _plant("blocks.1.mlp.down_proj", compensated)
    layer: Any = model.blocks[1].mlp.down_proj
    original: Any = tiny_model().blocks[1].mlp.down_proj.weight.get_value()
    assert float(faults._error(original, faults._plain(layer.weight.get_value()))) > 0.06
    assert weight_faults(model, tiny_model(), head_dim=16) == []


def test_zeroed_scales_show_without_a_reference() -> None:
    """No NaN anywhere: the layer decodes to zeros, and the model still speaks."""
    model = _quantized()
    layer: Any = model.blocks[1].mlp.down_proj
    packed = layer.weight.get_value()
    stored = jax.tree.map(jnp.zeros_like, packed.stored)
    layer.weight.set_value(dataclasses.replace(packed, stored=stored))
    (found,) = packed_faults(model)
    assert (found.where, found.cause) == ("blocks.1.mlp.down_proj", "zeroed scales")
    (compared,) = weight_faults(model, tiny_model(), head_dim=16)
    assert compared.cause == "zeroed scales"


def test_a_block_is_named_whatever_its_weights_look_like() -> None:
    """A norm that a transform should have changed and did not: no layer's weight shows it."""
    model = _quantized("int8:g32")
    norm = model.blocks[1].attn_norm.weight
    norm.set_value(norm.get_value() * 8.0)
    assert weight_faults(model, tiny_model(), head_dim=16) == []
    (found,) = block_faults(model, float_pass(tiny_model(), CUT))
    assert found.where == "blocks.1"


def test_another_tokenizer() -> None:
    assert tokenizer_faults("a", "a", ([1], [1])) == []
    (found,) = tokenizer_faults("a", "b", ([1, 2, 3], [1, 5, 3]))
    assert "from token 1 on: [2, 3] here, [5, 3] there" in found.said
    assert "special tokens" in tokenizer_faults("a", "b", ([1], [1]))[0].said


def test_models_of_other_shapes_are_refused() -> None:
    model = _quantized()
    del model.blocks[1]
    with pytest.raises(InputError, match="different layers"):
        weight_faults(model, tiny_model(), head_dim=16)


def test_loss_is_traced_to_layers_and_channels() -> None:
    model = tiny_model()
    norm = model.blocks[0].attn_norm.weight
    norm.set_value(norm.get_value().at[9].mul(1000.0))
    losses = [
        LayerSensitivity(path=f"l{i}", scheme=SPEC, kl=kl, nll_increase=0.0, weight_error=0.0, bits=1, weights=1)
        for i, kl in enumerate([0.1, 0.1, 3.0, 0.1, 0.1, 0.1])
    ]
    found = accuracy_findings(losses, outliers(model, float_pass(model, CUT)))
    assert [each.where for each in found if each.cause == "one layer"] == ["l2"]
    channels = [each for each in found if each.cause == "outlier channel"]
    assert {each.where for each in channels} == {f"blocks.0.attn.{name}_proj" for name in "qkv"}
    assert all("channel 9 " in each.said for each in channels)
    assert accuracy_findings(losses[:2], []) == []


def test_a_step_that_recompiles() -> None:
    growing = [(jnp.ones((n, 8)),) for n in range(20, 26)]
    timing = time_step(jax.jit(lambda x: jnp.tanh(x) @ x.T), growing)
    assert timing.compiles_after_first >= 1
    (found,) = speed_findings(timing, packed_seconds=1, float_seconds=1, decode_seconds=0)
    assert found.cause == "recompiles"


def test_a_step_that_is_not_compiled() -> None:
    def step(x: jax.Array) -> jax.Array:
        for _ in range(60):
            x = jnp.tanh(x) + 0.5
        return x

    calls = [(jnp.ones((8, 8)),)] * 8
    (found,) = speed_findings(time_step(step, calls), packed_seconds=1, float_seconds=1, decode_seconds=0)
    assert found.cause == "not compiled"
    assert speed_findings(time_step(jax.jit(step), calls), packed_seconds=1, float_seconds=1, decode_seconds=0) == []
    with pytest.raises(InputError, match="at least 4"):
        time_step(step, calls[:2])


def test_decoding_that_dominates() -> None:
    (found,) = speed_findings(None, packed_seconds=5e-3, float_seconds=2e-3, decode_seconds=3e-3)
    assert found.cause == "decoding dominates"
    assert "5.00 ms a token" in found.said
    assert speed_findings(None, packed_seconds=1e-3, float_seconds=2e-3, decode_seconds=5e-4) == []
    model = _quantized()
    whole, decode = faults.block_seconds(model.blocks[0], jnp.ones((1, 1, 64)), model.contexts(1)[0])
    plain, none = faults.block_seconds(tiny_model().blocks[0], jnp.ones((1, 1, 64)), model.contexts(1)[0])
    assert min(whole, decode, plain) > 0
    assert none == 0
