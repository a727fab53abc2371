"""Sizes from a config count what the decoder really holds, and those of published models what their publishers say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.models.published import PUBLISHED, find_published, nearest_published
from jquant.models.shape import model_shape
from jquant.nn.install import tensors_of
from jquant.nn.matrices import layer_shapes
from tests.tiny_checkpoint import CONFIG

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma": {"post_norms": True, "tie_embeddings": True, "window": 8, "windowed_blocks": (True, False)},
    "opt": {
        "positions": "learned", "position_offset": 2, "norm": "layer", "gated": False, "activation": "relu",
        "qkv_bias": True, "output_bias": True, "mlp_bias": True,
    },
    "mixtral": {"num_experts": 4, "experts_per_token": 2},
    "biased": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_is_counted(options: dict[str, Any]) -> None:
    config = ModelConfig(**{**CONFIG.as_json(), "rope_scaling": None, **options})
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    shape = model_shape(config, name="tiny", source="a test")
    assert shape.parameters == sum(math.prod(tensor.shape) for tensor in tensors_of(model).values())
    blocks = sum(math.prod(size) for path, size in layer_shapes(model).items() if path.startswith("blocks."))
    routers = config.num_layers * config.num_experts * config.hidden_size
    assert shape.block_weights == blocks - routers * any("router" in path for path in layer_shapes(model))


@pytest.mark.parametrize("known", PUBLISHED.values(), ids=PUBLISHED)
def test_published_sizes_come_to_the_published_count(known: Any) -> None:
    shape = model_shape(known.config, name=known.name, source=known.source)
    assert shape.parameters / 1e9 == pytest.approx(known.parameters, rel=5e-3)
    assert len(known.source) > 10


@pytest.mark.parametrize(
    ("words", "family", "name"),
    [
        ("llama-3-70b", "llama-3", "llama-3-70b"),
        ("Llama 3 70B", "llama-3", "llama-3-70b"),
        ("70B", "llama-3", "llama-3-70b"),
        ("8b", "qwen3", "qwen3-8b"),
        ("600m", "qwen3", "qwen3-0.6b"),
    ],
)
def test_names_and_sizes(words: str, family: str, name: str) -> None:
    found = find_published(words, family=family)
    assert found is not None
    assert found.name == name


def test_a_size_between_is_made_of_blocks_and_says_so() -> None:
    found = find_published("34B")
    assert found is not None
    shape = model_shape(found.config, name=found.name, source=found.source)
    assert shape.parameters / 1e9 == pytest.approx(34, rel=0.02)
    assert "blocks in place of" in found.source
    assert "like llama-3-70b" in found.name


def test_a_size_between_keeps_which_blocks_look_back_over_a_window_only() -> None:
    found = find_published("12B", family="gemma-2")
    assert found is not None
    assert found.config.num_layers > 42
    assert found.config.is_windowed()[:4] == (True, False, True, False)
    shape = model_shape(found.config, name=found.name, source=found.source)
    assert len(shape.windows) == (shape.num_layers + 1) // 2


def test_what_is_neither_name_nor_size() -> None:
    assert find_published("llama-4-70b") is None
    assert "llama-3-70b" in nearest_published("llama-3-71b")
    with pytest.raises(InputError, match="family 'lama' is unknown; known are llama-3"):
        find_published("70B", family="lama")
    with pytest.raises(InputError, match="must be positive"):
        find_published("0B")
