"""A tiny random model with a byte tokenizer, saved as a native checkpoint: what command and sweep tests run on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from jquant.io.tokenizer import Tokenizer
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.models.save import save

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=257,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    max_length=512,
)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "<end>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return Tokenizer(backend=backend, bos_id=None, eos_ids=(256,), add_bos=False)


def tiny_model(seed: int = 0, *, layers: int = CONFIG.num_layers) -> Decoder:
    """Random weights, large enough that predictions are far from uniform. One layer compiles in half the time."""
    model = Decoder(dataclasses.replace(CONFIG, num_layers=layers), rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda array: 2 * array if array.ndim == 2 else array, state))


def write(path: Path, *, layers: int = CONFIG.num_layers) -> Path:
    save(tiny_model(layers=layers), path, tokenizer=byte_tokenizer(), note="random weights")
    return path
