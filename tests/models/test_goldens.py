"""Every family's logits are those of transformers, in one pass and token by token from the cache."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.core.scheme import scheme
from jquant.models import generate as generation
from jquant.models import split as splitting
from jquant.models.checkpoint import load_model
from jquant.models.decoder import Decoder
from jquant.models.save import save
from jquant.nn.linear import QuantizedExpertLinear
from jquant.nn.protocol import apply
from jquant.nn.surgery import module_at
from jquant.ptq.rtn import quantize_layers

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = sorted(folder.parent.name for folder in GOLDENS.glob("family_*/golden.npz"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    recorded = np.load(GOLDENS / family / "golden.npz")
    meta, expected = json.loads(str(recorded["meta"])), recorded["logits"]
    logits = load_model(GOLDENS / family)(jnp.asarray(recorded["tokens"]))
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=limit)
    assert min(meta["moves"].values()) > 1000 * limit, "a feature that moves no logit is not tested"


@pytest.mark.parametrize("family", sorted(file.stem for file in GOLDENS.glob("family_*.gguf")))
def test_a_gguf_gives_the_logits_of_transformers(family: str) -> None:
    """With windows where llama.cpp fixes them."""
    recorded = np.load(GOLDENS / family / "golden.npz")
    expected = recorded["gguf_logits"]
    logits = load_model(GOLDENS / f"{family}.gguf")(jnp.asarray(recorded["tokens"]))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_gives_the_same_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 70 tokens in padded pieces of 64, then one token at a time, far beyond the window of 24.

    Blocks in runs of two and three a program, as on a GPU in runs of more; alone they are in every other test.
    """
    monkeypatch.setattr(splitting, "longest_runs", lambda: (3, 2))
    recorded = np.load(GOLDENS / family / "golden.npz")
    tokens, expected = recorded["tokens"][0], recorded["logits"][0]
    model = load_model(GOLDENS / family)
    capacity = 128
    split, caches = splitting.split(model), generation._empty_caches(model, capacity)
    hidden, caches = generation._feed_prompt(split, tokens[:70], caches, capacity)
    found = [apply(model.head, hidden[:, 69 % generation.prompt_chunk()])[0]]
    for position in range(70, len(tokens)):
        hidden, caches = generation._advance(
            split, jnp.asarray(tokens[None, position : position + 1]), position, caches, capacity
        )
        found.append(apply(model.head, hidden[:, -1])[0])
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(np.stack(found), expected[69:], rtol=0, atol=limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_saved_it_computes_the_same(family: str, tmp_path: Path) -> None:
    model = load_model(GOLDENS / family)
    replaced = quantize_layers(model, scheme("int4:g8:asym"))
    assert len(replaced) == len(model.blocks) * (6 if family in ("family_opt", "family_gpt2") else 7)
    save(model, tmp_path / "saved")
    tokens = jnp.asarray(np.load(GOLDENS / family / "golden.npz")["tokens"][:, :40])
    np.testing.assert_array_equal(apply(load_model(tmp_path / "saved"), tokens), apply(model, tokens))


def test_experts_are_quantized_one_by_one() -> None:
    model = load_model(GOLDENS / "family_mixtral")
    quantize_layers(model, scheme("nvfp4"), layers=["gate_proj"])
    packed = module_at(model, "blocks.0.mlp.gate_proj")
    assert isinstance(packed, QuantizedExpertLinear)
    q = packed.weight.get_value()
    assert q.stored.scale2 is not None
    assert q.stored.scale2.shape == (5, 1, 1)
    assert len(np.unique(np.asarray(q.stored.scale2))) == 5  # a second-level scale each
    assert q.shape == (5, 24, 32)


def test_blocks_share_one_program() -> None:
    """Blocks that look back differently far have one structure: what differs is in the context."""
    model = load_model(GOLDENS / "family_gemma3_text")
    assert isinstance(model, Decoder)
    assert len({nnx.split(block)[0] for block in model.blocks}) == 1
