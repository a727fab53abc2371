"""config.json there and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jquant.core.errors import InputError
from jquant.models.config import ModelConfig, RopeScaling
from jquant.models.families import config_from_hf
from jquant.models.hf_config import config_to_hf

GOLDENS = Path(__file__).parents[1] / "goldens"
CONFIGS = sorted(GOLDENS.glob("*/config.json"))
LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=257,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_every_family_survives(path: Path) -> None:
    config = config_from_hf(json.loads(path.read_text()), str(path))
    written = json.loads(json.dumps(config_to_hf(config, dtype="float32")))
    back = config_from_hf(written, "written")
    for field in dataclasses.fields(ModelConfig):
        mine, other = getattr(config, field.name), getattr(back, field.name)
        if field.name == "windowed_blocks" and not config.windowed_blocks:
            assert back.is_windowed() == config.is_windowed()
        elif isinstance(mine, float):
            assert other == pytest.approx(mine, rel=1e-12), field.name
        else:
            assert other == mine, field.name


def test_all_families_are_among_the_goldens() -> None:
    kinds = {json.loads(path.read_text())["model_type"] for path in CONFIGS}
    assert {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3"} <= kinds


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=4.0),
        RopeScaling(
            kind="llama3", factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192
        ),
    ],
)
def test_stretched_rotations(scaling: RopeScaling) -> None:
    config = dataclasses.replace(LLAMA, rope_scaling=scaling, rope_theta=5e5)
    assert config_from_hf(config_to_hf(config, dtype="bfloat16"), "written") == config


def test_what_config_json_has_no_field_for() -> None:
    with pytest.raises(InputError, match="start from the Hugging Face checkpoint"):
        config_to_hf(dataclasses.replace(LLAMA, rope_divisors=(1.0,) * 8), dtype="float32")
    with pytest.raises(InputError, match="one flag for the biases"):
        config_to_hf(dataclasses.replace(LLAMA, qkv_bias=True), dtype="float32")
    with pytest.raises(InputError, match="no Hugging Face config here"):
        config_to_hf(dataclasses.replace(LLAMA, architecture="rwkv"), dtype="float32")
