"""Generation with a key-value cache: greedy, or sampled with temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jquant.core.errors import InputError
from jquant.models.decoder import Cache, Context, Decoder, contexts_of_blocks, step_context
from jquant.nn.protocol import apply

_CHUNK = 64  # the prompt is fed in pieces of this many tokens: one program for every prompt length


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: the most likely one, the lower id on a tie."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top-k {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p}: it must be in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed}: it must be in 0 … 2^32 − 1")


def generate(
    model: Decoder,
    prompt: np.ndarray,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: tuple[int, ...] = (),
) -> Iterator[int]:
    """Token ids that follow the prompt, one at a time as they are asked for.

    Args:
        model: a decoder, its layers in floats or packed.
        prompt: int32 [tokens], not empty.
        max_tokens: how many to yield at most.
        sampling: greedy by default.
        stop_ids: ends before yielding one of these.

    Raises:
        InputError: the prompt is empty, holds ids outside the vocabulary, or is too long for the model.
    """
    sampling = Sampling() if sampling is None else sampling
    _check_prompt(model, np.asarray(prompt), max_tokens)
    return _generate(model, np.asarray(prompt, np.int32), max_tokens, sampling, stop_ids)


def _generate(
    model: Decoder, prompt: np.ndarray, max_tokens: int, sampling: Sampling, stop_ids: tuple[int, ...]
) -> Iterator[int]:
    capacity = _round_up(len(prompt) + max_tokens, 256)
    caches = _empty_caches(model, capacity)
    key, rule = jax.random.key(sampling.seed), dataclasses.replace(sampling, seed=0)  # one program for all seeds
    logits, caches = _feed_prompt(model, prompt, caches, capacity)
    for count in range(max_tokens):
        token = int(choose(logits, jax.random.fold_in(key, count), rule))
        if token in stop_ids:
            return
        yield token
        if count + 1 < max_tokens:
            hidden, caches = _advance(model, jnp.asarray([[token]], jnp.int32), len(prompt) + count, caches, capacity)
            logits = apply(model.head, hidden[:, -1])[0]


@partial(jax.jit, static_argnames="sampling")
def choose(logits: Float[Array, " vocab"], key: Array, sampling: Sampling) -> Array:
    """The next token's id, int32 scalar (top-p: Holtzman et al., 1904.09751)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits)
    order = jnp.argsort(-logits)
    ranked = logits[order].astype(jnp.float32) / sampling.temperature
    rank = jnp.arange(len(logits))
    keep = rank < (len(logits) if sampling.top_k is None else sampling.top_k)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf))
        # The smallest set that reaches top_p: a token stays while those before it have not.
        keep &= jnp.cumsum(probabilities) - probabilities < sampling.top_p
    return order[jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf))]


def _check_prompt(model: Decoder, prompt: np.ndarray, max_tokens: int) -> None:
    config = model.config
    if max_tokens < 1:
        raise InputError(f"max tokens {max_tokens}: it must be at least 1")
    if prompt.size == 0:
        raise InputError("the prompt is empty: give at least one token")
    if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
        raise InputError(f"the prompt is {prompt.dtype}{list(prompt.shape)}: give one row of token ids")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise InputError(f"the prompt holds token ids outside 0 … {config.vocab_size - 1}")
    if len(prompt) + max_tokens > config.max_length:
        raise InputError(
            f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the model's {config.max_length}: shorten one"
        )


def _empty_caches(model: Decoder, capacity: int) -> list[Cache]:
    config, dtype = model.config, model.embed.weight.get_value().dtype
    shape = (1, config.num_kv_heads, capacity, config.head_dim)
    return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0)) for _ in model.blocks]


def _feed_prompt(model: Decoder, prompt: np.ndarray, caches: list[Cache], capacity: int) -> tuple[Array, list[Cache]]:
    """Logits after the last prompt token. The last piece is padded; what the padding wrote is overwritten or masked."""
    hidden = None
    for start in range(0, len(prompt), _CHUNK):
        piece = prompt[start : start + _CHUNK]
        if len(prompt) > 1:
            piece = np.pad(piece, (0, min(_CHUNK, capacity - start) - len(piece)))
        hidden, caches = _advance(model, jnp.asarray(piece)[None], start, caches, capacity)
    assert hidden is not None
    last = (len(prompt) - 1) % _CHUNK
    caches = [cache._replace(length=jnp.int32(len(prompt))) for cache in caches]
    return apply(model.head, hidden[:, last])[0], caches


def _advance(
    model: Decoder, tokens: Array, start: int, caches: list[Cache], capacity: int
) -> tuple[Array, list[Cache]]:
    x = apply(model.embed, tokens, jnp.int32(start))
    contexts = contexts_of_blocks(
        model.config, lambda windowed: _context(model.config, jnp.int32(start), tokens.shape[1], capacity, windowed)
    )
    updated = []
    for block, context, cache in zip(model.blocks, contexts, caches, strict=True):
        graphdef, state = nnx.split(block)
        x, cache = _step(graphdef, state, x, context, cache)
        updated.append(cache)
    return x, updated


_context = jax.jit(step_context, static_argnums=(0, 2, 3, 4))


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _step(graphdef: nnx.GraphDef, state: nnx.State, x: Array, context: Context, cache: Cache) -> tuple[Array, Cache]:
    return nnx.merge(graphdef, state).step(x, context, cache)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
