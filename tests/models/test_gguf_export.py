"""GGUFs written and read back: the config, the tokens, the bytes of packed blocks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme
from jquant.io.gguf import open_gguf
from jquant.models.checkpoint import open_checkpoint
from jquant.models.config import ModelConfig, RopeScaling
from jquant.models.decoder import Decoder
from jquant.models.export import export
from jquant.models.gguf_export import export_gguf
from jquant.models.save import save
from jquant.nn.install import tensors_of
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import CONFIG, byte_tokenizer, tiny_model

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENS = jnp.arange(24).reshape(2, 12)
FAMILIES = ("gemma2", "gemma3_text", "gpt2", "mistral", "phi3", "qwen2", "qwen3", "mixtral", "qwen3_moe")


def _exported(model: Decoder, folder: Path) -> Path:
    save(model, folder / "native", tokenizer=byte_tokenizer())
    export_gguf(open_checkpoint(folder / "native"), folder / "model.gguf")
    return folder / "model.gguf"


def _sayable(config: ModelConfig) -> ModelConfig:
    """The goldens' vocabularies are smaller than that of bytes, and some have windows that a GGUF cannot say."""
    config = dataclasses.replace(config, vocab_size=257)
    if config.architecture == "qwen2":
        return dataclasses.replace(config, window=None, windowed_blocks=())
    if config.architecture.startswith("gemma"):
        every = 2 if config.architecture == "gemma2" else 6
        windowed = tuple((block + 1) % every != 0 for block in range(config.num_layers))
        return dataclasses.replace(config, query_scale=config.head_dim**-0.5, windowed_blocks=windowed)
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_floats(family: str, tmp_path: Path) -> None:
    config = _sayable(open_checkpoint(GOLDENS / f"family_{family}").config)
    model = Decoder(config, rngs=nnx.Rngs(0))
    back = open_checkpoint(_exported(model, tmp_path))
    mine = config.as_json() | {"architecture": back.config.architecture, "windowed_blocks": config.is_windowed()}
    other = back.config.as_json() | {"windowed_blocks": back.config.is_windowed()}
    for name, value in mine.items():
        assert other[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    np.testing.assert_allclose(back.model()(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", [RopeScaling(kind="linear", factor=2.0), RopeScaling(kind="llama3", factor=8.0)])
def test_stretched_rotations(scaling: RopeScaling, tmp_path: Path) -> None:
    model = Decoder(dataclasses.replace(CONFIG, rope_scaling=scaling, rope_theta=5e5), rngs=nnx.Rngs(0))
    back = open_checkpoint(_exported(model, tmp_path))
    np.testing.assert_allclose(back.model()(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["q4_0", "q5_1", "q8_0", "iq4_nl", "ggml_mxfp4"])
def test_packed_blocks_go_along_byte_by_byte(spec: str, tmp_path: Path) -> None:
    model = tiny_model()
    quantize_layers(model, scheme(spec))
    path = _exported(model, tmp_path)
    file = open_gguf(path)
    packed = {name: tensor for name, tensor in tensors_of(model).items() if isinstance(tensor, QTensor)}
    assert len(packed) == 14
    name = spec.removeprefix("ggml_").upper()
    assert sum(info.type == name for info in file.tensors.values()) == 14
    raw = np.asarray(packed["blocks.1.mlp.down_proj.weight"].planes[0])
    assert np.array_equal(file.raw("blk.1.ffn_down.weight"), raw.reshape(-1))
    np.testing.assert_array_equal(open_checkpoint(path).model()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_read_back_as_they_were(family: str, tmp_path: Path) -> None:
    config = _sayable(open_checkpoint(GOLDENS / f"family_{family}").config)
    config = dataclasses.replace(config, hidden_size=32, intermediate_size=64)  # whole blocks
    model = Decoder(config, rngs=nnx.Rngs(0))
    quantize_layers(model, scheme("q4_0"), layers=(r"(q|k|v|up|down|gate)_proj",))
    opened = open_checkpoint(_exported(model, tmp_path))
    back = opened.packed().model()
    mine, other = tensors_of(model), tensors_of(back)
    assert mine.keys() == other.keys()
    packed = [name for name, tensor in mine.items() if isinstance(tensor, QTensor)]
    assert len(packed) == (5 if family == "gpt2" else 6) * config.num_layers
    for name in packed:
        assert other[name].scheme == mine[name].scheme
        np.testing.assert_array_equal(np.asarray(other[name].planes[0]), np.asarray(mine[name].planes[0]), name)
    assert not any(isinstance(tensor, QTensor) for tensor in tensors_of(opened.model()).values())
    np.testing.assert_allclose(back(TOKENS), opened.model()(TOKENS), rtol=1e-5, atol=1e-5)


def test_packed_gguf_converts_to_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model()
    quantize_layers(model, scheme("q5_0"))
    path = _exported(model, tmp_path)
    export(path, tmp_path / "again.gguf", format="gguf")
    one, two = open_gguf(path), open_gguf(tmp_path / "again.gguf")
    assert one.tensors.keys() == two.tensors.keys()
    for name, info in one.tensors.items():
        assert two.tensors[name].type == info.type
        assert np.array_equal(one.raw(name), two.raw(name))


def test_tokens_are_the_same(tmp_path: Path) -> None:
    path = _exported(tiny_model(), tmp_path)
    text = "Ünïcode <end> and\n  spaces 123"
    mine, other = byte_tokenizer(), open_checkpoint(path).tokenizer()
    assert np.array_equal(other.encode(text), mine.encode(text))
    assert other.eos_ids == mine.eos_ids
    assert other.add_bos is mine.add_bos


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [
        ("int4:g32", "q4_0"),
        ("int4:g32:asym", "q4_1"),
        ("int3:g16", "q3_k"),
        ("nf4:g32", "iq4_nl"),
        ("mxfp4", "ggml_mxfp4"),
    ],
)
def test_other_schemes_are_refused_with_the_nearest(spec: str, nearest: str, tmp_path: Path) -> None:
    model = tiny_model()
    quantize_layers(model, scheme(spec))
    with pytest.raises(
        InputError, match=f"blocks.0.attn.k_proj.weight: a GGUF cannot hold .*; the nearest is {nearest}$"
    ):
        _exported(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["native"]


@pytest.mark.parametrize(
    ("family", "message"),
    [("qwen2", "no field for window 2 of a qwen2 model"), ("gemma2", "no field for query_scale")],
)
def test_what_a_gguf_cannot_say(family: str, message: str, tmp_path: Path) -> None:
    config = dataclasses.replace(open_checkpoint(GOLDENS / f"family_{family}").config, vocab_size=257)
    with pytest.raises(InputError, match=message.replace("2 of", r"\d+ of")):
        _exported(Decoder(config, rngs=nnx.Rngs(0)), tmp_path)


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = _exported(tiny_model(), tmp_path)
    with pytest.raises(InputError, match="exists; choose another --out"):
        export_gguf(open_checkpoint(tmp_path / "native"), path)
