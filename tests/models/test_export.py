"""Exports read back: the same bytes of every packed tensor, for every format and scheme that it holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant import qat
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme
from jquant.data.blocks import windows
from jquant.data.overlap import calibration_record
from jquant.io.hf_directory import open_hf_directory
from jquant.models.checkpoint import open_checkpoint
from jquant.models.decoder import Decoder
from jquant.models.export import export
from jquant.models.save import save
from jquant.nn.install import tensors_of
from jquant.ptq.rtn import quantize_layers
from tests.jitted import quantize
from tests.tiny_checkpoint import CONFIG, byte_tokenizer, tiny_model

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENS = jnp.arange(24).reshape(2, 12)
HELD = {
    "compressed-tensors": (
        *("int2:g32", "int3:g32:bf16", "int5:g32:fp16", "int8:g32", "int4:channel", "int8:channel"),
        *("int3:g32:asym:bf16", "int4:channel:asym", "int6:g32:asym", "fp8_e4m3:channel", "fp8_e4m3:tensor"),
        *("fp8_e4m3:b32x32", "nvfp4", "mxfp4", "mxfp8_e4m3"),
    ),
    "gptq": ("int2:g32:fp16", "int3:g32:fp16", "int4:g32:fp16", "int8:g32:fp16", "int4:channel:fp16"),
    "gptq_v2": (
        "int2:g32:asym:fp16",
        "int3:g32:asym:fp16",
        "int4:g32:asym:fp16",
        "int8:g32:asym:fp16",
        "int4:g32:fp16",
    ),
    "bitsandbytes": ("nf4:g32", "nf4:g32:dq"),
    "awq": ("int4:g32:asym:fp16", "int4:g32:fp16", "int4:channel:asym:fp16"),
}


def _saved(model: Decoder, folder: Path) -> Path:
    save(
        model,
        folder,
        tokenizer=byte_tokenizer(),
        note="a test's",
        provenance={"source": "tiny", "recipe": {"rules": []}},
    )
    return folder


def _quantized(spec: str) -> Decoder:
    model = tiny_model()
    quantize_layers(model, scheme(spec))
    return model


def _logits(model: Decoder) -> jax.Array:
    return _forward(model, TOKENS)


@nnx.jit  # which keeps the ranges that a model has seen
def _forward(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def _assert_same(mine: QTensor, other: QTensor) -> None:
    assert other.scheme == mine.scheme
    assert other.matrix_shape == mine.matrix_shape
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize(("format", "spec"), [(name, spec) for name, specs in HELD.items() for spec in specs])
def test_there_and_back(format: str, spec: str, tmp_path: Path) -> None:
    model = _quantized(spec)
    export(open_checkpoint(_saved(model, tmp_path / "native")), tmp_path / "out", format=format)
    back = open_checkpoint(tmp_path / "out").model()
    mine, other = tensors_of(model), tensors_of(back)
    assert mine.keys() == other.keys()
    packed = 0
    for name, tensor in mine.items():
        if isinstance(tensor, QTensor):
            packed += 1
            _assert_same(tensor, other[name])
        else:
            assert np.array_equal(tensor, other[name]), name
    assert packed == 14


@pytest.mark.parametrize(
    ("format", "spec"),
    [
        ("compressed-tensors", "int3:g16:asym:bf16"),
        ("compressed-tensors", "int8:channel"),
        ("gptq_v2", "int4:g16:asym:fp16"),
        ("awq", "int4:g16:asym:fp16"),
    ],
)
def test_joined_projections(format: str, spec: str, tmp_path: Path) -> None:
    config = dataclasses.replace(open_checkpoint(GOLDENS / "family_phi3").config, vocab_size=257)
    model = Decoder(config, rngs=nnx.Rngs(0))
    quantize_layers(model, scheme(spec))
    export(open_checkpoint(_saved(model, tmp_path / "native")), tmp_path / "out", format=format)
    mine, other = tensors_of(model), tensors_of(open_checkpoint(tmp_path / "out").model())
    packed = [name for name, tensor in mine.items() if isinstance(tensor, QTensor)]
    assert any("k_proj" in name for name in packed)
    for name in packed:
        _assert_same(mine[name], other[name])


@pytest.mark.parametrize(
    ("format", "spec", "where"),
    [("compressed-tensors", "int4:g32", "ignore"), ("bitsandbytes", "nf4:g32", "llm_int8_skip_modules")],
)
def test_a_tied_head_is_named_as_kept(format: str, spec: str, where: str, tmp_path: Path) -> None:
    """Clients have a layer lm_head even where its weight is the embedding's, and would pack it."""
    model = Decoder(dataclasses.replace(CONFIG, tie_embeddings=True), rngs=nnx.Rngs(0))
    quantize_layers(model, scheme(spec))
    export(open_checkpoint(_saved(model, tmp_path / "native")), tmp_path / "out", format=format)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said[where] == ["lm_head"]
    assert np.array_equal(_logits(open_checkpoint(tmp_path / "out").model()), _logits(model))


def test_parts_of_a_joined_projection_must_be_alike(tmp_path: Path) -> None:
    config = dataclasses.replace(open_checkpoint(GOLDENS / "family_phi3").config, vocab_size=257)
    model = Decoder(config, rngs=nnx.Rngs(0))
    quantize_layers(model, scheme("int4:g16"), layers=("q_proj",))
    native = open_checkpoint(_saved(model, tmp_path / "native"))
    with pytest.raises(InputError, match=r"k_proj, .*joined in one layer.*let one rule match them all"):
        export(native, tmp_path / "out", format="compressed-tensors")


@pytest.mark.parametrize(
    ("weight", "activation", "gradient"),
    [
        ("int8:channel", "int8:token", "clipped_ste"),
        ("int8:channel", "int8:tensor", "clipped_ste"),
        ("int8:channel", "int8:tensor:asym", "clipped_ste"),
        ("fp8_e4m3:channel", "fp8_e4m3:token", "clipped_ste"),
        ("fp8_e4m3:tensor", "fp8_e4m3:tensor", "clipped_ste"),
        ("int4:g32", "int8:token", "clipped_ste"),
    ],
)
def test_quantized_inputs(weight: str, activation: str, gradient: str, tmp_path: Path) -> None:
    model = tiny_model()
    qat.prepare(model, qat.one_rule(weight, activation=activation), announce=lambda _: None)
    _logits(model)
    qat.set_observing(model, False)
    qat.convert(model)
    export(open_checkpoint(_saved(model, tmp_path / "native")), tmp_path / "out", format="compressed-tensors")
    back = open_checkpoint(tmp_path / "out").model()
    assert np.array_equal(_logits(back), _logits(model))


def test_float_weights_of_packed_layers(tmp_path: Path) -> None:
    model = _quantized("int4:g32")
    export(open_checkpoint(_saved(model, tmp_path / "native")), tmp_path / "out", format="hf")
    back = open_checkpoint(tmp_path / "out").model()
    assert not any(isinstance(tensor, QTensor) for tensor in tensors_of(back).values())
    np.testing.assert_allclose(_logits(back), _logits(model), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2", "llama_a"]
)
def test_float_weights_of_every_family(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(
        Path(__file__).parents[1] / "goldens" / (family if family == "llama_a" else f"family_{family}")
    )
    model = source.model()
    save(model, tmp_path / "native", tokenizer=byte_tokenizer())
    export(open_checkpoint(tmp_path / "native"), tmp_path / "out", format="hf")
    back = open_checkpoint(tmp_path / "out").model()
    tokens = TOKENS % source.config.vocab_size
    np.testing.assert_allclose(back(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_act_order_goes_along_as_g_idx(tmp_path: Path) -> None:
    model = _quantized("int4:g32:fp16")
    layer = model.blocks[0].attn.q_proj
    weight = tiny_model().blocks[0].attn.q_proj.weight.get_value()
    groups = jnp.asarray(np.random.default_rng(0).permutation(np.repeat([0, 1], 32)), jnp.int32)
    layer.weight.set_value(quantize(weight, scheme("int4:g32:fp16"), groups=groups))
    native = open_checkpoint(_saved(model, tmp_path / "native"))
    export(native, tmp_path / "out", format="gptq")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    back = open_checkpoint(tmp_path / "out").model()
    _assert_same(layer.weight.get_value(), back.blocks[0].attn.q_proj.weight.get_value())
    for format in ("compressed-tensors", "awq"):
        with pytest.raises(InputError, match="its groups are not of neighbours"):
            export(native, tmp_path / format, format=format)
        assert not (tmp_path / format).exists()


def test_mixed_schemes(tmp_path: Path) -> None:
    model = tiny_model()
    quantize_layers(model, scheme("int4:g32"), layers=("attn",))
    quantize_layers(model, scheme("int8:channel"), layers=("mlp",))
    native = open_checkpoint(_saved(model, tmp_path / "native"))
    export(native, tmp_path / "out", format="compressed-tensors")
    assert np.array_equal(_logits(open_checkpoint(tmp_path / "out").model()), _logits(model))
    with pytest.raises(InputError, match="int4:g32:fp16"):
        export(native, tmp_path / "gptq", format="gptq")


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    model = _quantized("int4:g32:fp16")
    export(open_checkpoint(_saved(model, tmp_path / "native")), tmp_path / "out", format="gptq", max_shard_bytes=40_000)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "quantize_config.json", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert "model.safetensors.index.json" in names
    folder = open_hf_directory(tmp_path / "out")
    assert len(folder.files) > 3
    assert folder.config["quantization_config"]["bits"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "int4:g32:fp16" in card
    assert "14 packed tensors" in card
    assert open_checkpoint(tmp_path / "out").tokenizer().sha256 == byte_tokenizer().sha256
    assert open_checkpoint(tmp_path / "out").provenance["source"] == "tiny"


def test_the_card_says_what_text_was_learned_from_and_the_record_keeps_its_hashes(tmp_path: Path) -> None:
    cut = dataclasses.replace(windows(np.arange(64), window=32), text_name="notes")
    record = calibration_record(cut)
    save(tiny_model(), tmp_path / "native", tokenizer=byte_tokenizer(), provenance={"calibration": record})
    export(tmp_path / "native", tmp_path / "out", format="hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| calibration text | `notes` |" in card
    assert record["runs"] not in card
    assert open_checkpoint(tmp_path / "out").provenance["calibration"] == record


def test_what_was_measured_is_in_the_card_and_the_record(tmp_path: Path) -> None:
    _saved(_quantized("int4:g32"), tmp_path / "native")
    said = {"perplexity": "12.3456 ± 0.1", "measured on": "`pydoc`"}
    export(tmp_path / "native", tmp_path / "out", format="compressed-tensors", evaluation=lambda: said)
    assert "| perplexity | 12.3456 ± 0.1 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert open_checkpoint(tmp_path / "out").provenance["evaluation"] == said


@pytest.mark.parametrize(
    ("format", "spec", "message"),
    [
        ("gptq", "int4:g32", r"blocks.0.attn.k_proj.weight: .*not int4:g32: int4:g32:fp16"),
        ("gptq", "nf4:g32", "int4:g32:fp16"),
        ("gptq", "int4:g40:fp16", "groups of 40 do not divide 64 inputs: groups of 32 would"),
        ("awq", "int3:g32:asym:fp16", "the nearest is int4:g32:asym:fp16"),
        ("compressed-tensors", "nf4:g32", "the nearest is nvfp4"),
        ("compressed-tensors", "int4:b8x32", "the nearest is int4:g128"),
        ("ggml", "int4:g32", "format 'ggml': there are hf, compressed-tensors"),
    ],
)
def test_what_a_format_cannot_hold(format: str, spec: str, message: str, tmp_path: Path) -> None:
    native = open_checkpoint(_saved(_quantized(spec), tmp_path / "native"))
    with pytest.raises(InputError, match=message):
        export(native, tmp_path / "out", format=format, evaluation=lambda: pytest.fail("measured, and for nothing"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["native"]


def test_version_1_of_gptq_has_no_zero_point_of_0(tmp_path: Path) -> None:
    model = tiny_model()
    for block in model.blocks:
        block.mlp.up_proj.weight.set_value(jnp.abs(block.mlp.up_proj.weight.get_value()))
    quantize_layers(model, scheme("int4:g32:asym:fp16"))
    native = open_checkpoint(_saved(model, tmp_path / "native"))
    with pytest.raises(InputError, match=r"up_proj.weight: has a zero point of 0, .* use gptq_v2"):
        export(native, tmp_path / "one", format="gptq")
    export(native, tmp_path / "two", format="gptq_v2")
    assert np.array_equal(_logits(open_checkpoint(tmp_path / "two").model()), _logits(model))


def test_floats_are_nothing_to_pack(tmp_path: Path) -> None:
    native = open_checkpoint(_saved(tiny_model(), tmp_path / "native"))
    with pytest.raises(InputError, match="no layer is packed"):
        export(native, tmp_path / "out", format="gptq")
