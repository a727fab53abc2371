"""Generation with a key-value cache: greedy, or sampled with temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from jquant.core.errors import InputError
from jquant.kernels.dispatch import on_cpu
from jquant.models.config import ModelConfig
from jquant.models.decoder import Cache, Context, Decoder, step_context
from jquant.models.own_programs import AtPlace, own_programs, shared
from jquant.models.split import Leaves, Split, cache_place, split
from jquant.nn.structure import Structure


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
        model: a decoder, its layers in floats or packed; on one device or on a mesh (nn/placement.py).
        prompt: int32 [tokens], not empty.
        max_tokens: how many to yield at most.
        sampling: greedy by default.
        stop_ids: ends before yielding one of these.

    Raises:
        InputError: the prompt is empty, holds ids outside the vocabulary, or is too long for the model.
    """
    sampling = Sampling() if sampling is None else sampling
    check_prompt(model, np.asarray(prompt), max_tokens)
    return _generate(model, np.asarray(prompt, np.int32), max_tokens, sampling, stop_ids)


def _generate(
    model: Decoder, prompt: np.ndarray, max_tokens: int, sampling: Sampling, stop_ids: tuple[int, ...]
) -> Iterator[int]:
    capacity = _round_up(len(prompt) + max_tokens, 256)
    parts, caches = split(model), _empty_caches(model, capacity)
    key, rule = jax.random.key(sampling.seed), dataclasses.replace(sampling, seed=0)  # one program for all seeds
    states, caches = _feed_prompt(parts, prompt, caches, capacity)

    step = own_programs(_step, static=_STATIC)

    def choose_next(states: Array, place: int, count: int) -> Array:
        return _next(parts.head.module, parts.head.leaves, states, np.int32(place), key, np.int32(count), rule)

    def follow(chosen: Array, count: int) -> Array:
        nonlocal caches
        states, caches = _advance(parts, chosen, len(prompt) + count, caches, capacity, step)
        return choose_next(states, 0, count + 1)

    chosen = choose_next(states, (len(prompt) - 1) % prompt_chunk(), 0)
    for count in range(max_tokens):
        more = count + 1 < max_tokens
        # A device goes on while the host waits for this token and its reader has it; a CPU is both.
        following = follow(chosen, count) if more and not on_cpu() else None
        token = int(chosen.item())
        if token in stop_ids:
            return
        yield token
        if more:
            chosen = follow(chosen, count) if following is None else following


def prompt_chunk() -> int:
    """A prompt is read in pieces of this many tokens: one program for every length, and the last piece padded."""
    return 64 if on_cpu() else 512


@partial(jax.jit, static_argnums=(0, 6))
def _next(
    head: Structure, leaves: Leaves, states: Array, place: Array, key: Array, count: Array, rule: Sampling
) -> Int32[Array, "1 1"]:
    """The token that `choose` takes after the state at `place` of [1, tokens, hidden]."""
    hidden = jax.lax.dynamic_index_in_dim(states, place, axis=1, keepdims=False)
    logits = head.merge(leaves)(hidden)[0]
    return choose(logits, jax.random.fold_in(key, count), rule).astype(jnp.int32).reshape(1, 1)


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


def check_prompt(model: Decoder, prompt: np.ndarray, max_tokens: int) -> None:
    """Raises InputError where the prompt, or what is to follow it, is not what the model reads."""
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
    config, dtype, place = model.config, model.embed.weight.get_value().dtype, cache_place(model)
    shape = (1, config.num_kv_heads, capacity, config.head_dim)

    def empty() -> Array:
        return jnp.zeros(shape, dtype, device=place)

    length = None if place is None else NamedSharding(place.mesh, PartitionSpec())
    return [Cache(empty(), empty(), jnp.zeros((), jnp.int32, device=length)) for _ in model.blocks]


def _feed_prompt(parts: Split, prompt: np.ndarray, caches: list[Cache], capacity: int) -> tuple[Array, list[Cache]]:
    """States of the last piece of the prompt. It is padded; what that wrote is overwritten or masked."""
    states, chunk = None, prompt_chunk()
    for start in range(0, len(prompt), chunk):
        piece = prompt[start : start + chunk]
        if len(prompt) > 1:
            piece = np.pad(piece, (0, min(chunk, capacity - start) - len(piece)))
        states, caches = _advance(parts, jnp.asarray(piece)[None], start, caches, capacity)
    assert states is not None
    # Each its own array: a cache is donated whole.
    caches = [cache._replace(length=jnp.full_like(cache.length, len(prompt))) for cache in caches]
    return states, caches


def _advance(
    parts: Split, tokens: Array, start: int, caches: list[Cache], capacity: int, step: AtPlace | None = None
) -> tuple[Array, list[Cache]]:
    """States [1, tokens, hidden] of tokens from position `start` on; by `step`'s programs, of calls like this one."""
    step = shared(_step) if step is None else step
    embed = parts.embed
    x, contexts = _embed(embed.module, parts.config, capacity, embed.leaves, tokens, np.int32(start))
    windowed, updated = parts.config.is_windowed(), []
    for place, run in enumerate(parts.runs(tokens.shape[1])):
        here = slice(len(updated), len(updated) + len(run.leaves))
        static, kept = (run.module, windowed[here]), tuple(caches[here])
        x, after = step(place, *static, run.leaves, x, contexts, kept, parts.cache_place)
        updated += after
    return x, updated


@partial(jax.jit, static_argnums=(0, 1, 2))
def _embed(
    embed: Structure, config: ModelConfig, capacity: int, leaves: Leaves, tokens: Array, start: Array
) -> tuple[Array, dict[bool, Context]]:
    """Embedded tokens, and the contexts of blocks that are windowed and of those that are not."""
    contexts = {
        windowed: step_context(config, start, tokens.shape[1], capacity, windowed)
        for windowed in sorted(set(config.is_windowed()))
    }
    return embed.merge(leaves)(tokens, start), contexts


_STATIC = (0, 1, 6)


@partial(jax.jit, static_argnums=_STATIC, donate_argnums=5)
def _step(
    blocks: tuple[Structure, ...],
    windowed: tuple[bool, ...],
    leaves: tuple[Leaves, ...],
    x: Array,
    contexts: dict[bool, Context],
    caches: tuple[Cache, ...],
    place: NamedSharding | None,
) -> tuple[Array, list[Cache]]:
    """Some blocks, one after the other; caches stay where they lie."""
    after = []
    for block, kind, arrays, cache in zip(blocks, windowed, leaves, caches, strict=True):
        x, cache = block.merge(arrays).step(x, contexts[kind], cache)
        if place is not None:
            keys, values = jax.lax.with_sharding_constraint((cache.keys, cache.values), place)
            cache = cache._replace(keys=keys, values=values)
        after.append(cache)
    return x, after


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
