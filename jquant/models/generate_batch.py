"""Greedy generation for many prompts at once: what benchmarks ask of a model.

Prompts of a batch may differ in length: every row has its own place in its own cache, so no row sees another's padding.
Programs depend on the batch and on the cache's capacity, a multiple of 256, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jquant.core.errors import InputError
from jquant.kernels.dispatch import on_cpu
from jquant.models.config import ModelConfig
from jquant.models.decoder import Cache, Decoder, step_context
from jquant.models.generate import check_prompt, prompt_chunk
from jquant.models.own_programs import AtPlace, own_programs, shared
from jquant.models.split import Leaves, Split, split
from jquant.nn.placement import fetched
from jquant.nn.structure import Structure

_STEP = 256  # capacities are multiples of it

Stop = Callable[[int, Sequence[int]], bool]  # of a row's index and the tokens so far: has it ended?


def generate_batch(
    model: Decoder, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Stop, rows: int | None = None
) -> list[list[int]]:
    """The most likely next tokens of each prompt, one after the other.

    Args:
        model: a decoder, its layers in floats or packed.
        prompts: token ids; none is empty.
        max_tokens: how many to add at most.
        stop: asked after each token of a row, that token being the last of those it is given.
        rows: prompts that run at once, by default at most 4 on CPU and 32 elsewhere.

    Returns:
        The new tokens of each prompt, with the one that ended it.

    Raises:
        InputError: a prompt is empty, holds ids outside the vocabulary, or is too long; or nothing is asked for.
    """
    if rows is None:
        rows = max(1, min(4, len(prompts))) if on_cpu() else 32  # on a CPU empty rows cost what others do
    if rows < 1:
        raise InputError(f"rows {rows}: it must be at least 1")
    for index, prompt in enumerate(prompts):
        try:
            check_prompt(model, np.asarray(prompt), max_tokens)
        except InputError as error:
            raise InputError(f"prompt {index}: {error}") from error
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # neighbours need like capacities
    found: dict[int, list[int]] = {}
    parts = split(model)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        new = _one_batch(model, parts, [prompts[index] for index in chosen], max_tokens, chosen, stop, rows)
        found |= dict(zip(chosen, new, strict=True))
    return [found[index] for index in range(len(prompts))]


def _one_batch(
    model: Decoder,
    parts: Split,
    prompts: list[Sequence[int]],
    max_tokens: int,
    names: Sequence[int],
    stop: Stop,
    rows: int,
) -> list[list[int]]:
    lengths = np.asarray([*map(len, prompts), *[1] * (rows - len(prompts))], np.int32)
    capacity = -(-(int(lengths.max()) + max_tokens) // _STEP) * _STEP
    chunk = prompt_chunk()
    tokens = np.zeros((rows, -(-int(lengths.max()) // chunk) * chunk), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    caches = _empty_caches(model, rows, capacity)
    last = jnp.zeros((rows, model.config.hidden_size), model.embed.weight.get_value().dtype)
    for start in range(0, tokens.shape[1], chunk):
        piece = jnp.asarray(tokens[:, start : min(start + chunk, capacity)])
        before = jnp.full(rows, start - 1, jnp.int32)
        hidden, caches, _ = _advance(parts, piece, before, caches, capacity)
        last = _last_states(last, hidden, jnp.asarray(lengths - 1 - start))
    # What the padding wrote lies behind each row's length: it is masked until a new token takes its place.
    new: list[list[int]] = [[] for _ in prompts]
    running, places = set(range(len(prompts))), jnp.asarray(lengths - 1)
    step = own_programs(_step, static=_STATIC)

    def follow(chosen: Array) -> Array:
        nonlocal caches, places
        hidden, caches, places = _advance(parts, chosen, places, caches, capacity, step)
        return _most_likely(parts.head.module, parts.head.leaves, hidden)

    chosen = _most_likely(parts.head.module, parts.head.leaves, last[:, None])
    for count in range(max_tokens):
        more = count + 1 < max_tokens
        following = follow(chosen) if more and not on_cpu() else None  # as in generate.py
        tokens = fetched(chosen)
        for row in tuple(running):
            new[row].append(int(tokens[row, 0]))
            if stop(names[row], new[row]):
                running.remove(row)
        if not running or not more:
            break
        chosen = follow(chosen) if following is None else following
    return new


@jax.jit
def _last_states(last: Array, hidden: Array, offset: Array) -> Array:
    """Of each row the state at `offset` in this piece, where it lies there."""
    inside = (offset >= 0) & (offset < hidden.shape[1])
    found = jnp.take_along_axis(hidden, jnp.clip(offset, 0, hidden.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(inside[:, None], found, last)


def _empty_caches(model: Decoder, rows: int, capacity: int) -> list[Cache]:
    config, dtype = model.config, model.embed.weight.get_value().dtype
    shape = (rows, 1, config.num_kv_heads, capacity, config.head_dim)
    return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32)) for _ in model.blocks]


def _advance(
    parts: Split,
    tokens: Array,
    before: Array,
    caches: list[Cache],
    capacity: int,
    step: AtPlace | None = None,
) -> tuple[Array, list[Cache], Array]:
    """States of `tokens`, row r's standing behind before[r]; the caches with them; and where each row's begin.

    By `step`'s programs, of calls like this one. `before` is donated.
    """
    step = shared(_step) if step is None else step
    x, starts = _embed(parts.embed.module, parts.embed.leaves, tokens, before)
    windowed, updated = parts.config.is_windowed(), []
    for place, run in enumerate(parts.runs(tokens.shape[1])):
        here = slice(len(updated), len(updated) + len(run.leaves))
        static, kept = (run.module, parts.config, capacity, windowed[here]), tuple(caches[here])
        x, after = step(place, *static, run.leaves, x, starts, kept)
        updated += after
    return x, updated, starts


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _embed(embed: Structure, leaves: Leaves, tokens: Array, before: Array) -> tuple[Array, Array]:
    """Embedded tokens, and where each row's begin, in the memory of `before`: recorded programs look for it there."""
    starts = before + 1
    return jax.vmap(lambda row, start: embed.merge(leaves)(row, start))(tokens, starts), starts


@partial(jax.jit, static_argnums=0)
def _most_likely(head: Structure, leaves: Leaves, hidden: Array) -> Int32[Array, "rows 1"]:
    """After the last state of each row."""
    return jnp.argmax(head.merge(leaves)(hidden[:, -1]), axis=-1, keepdims=True).astype(jnp.int32)


_STATIC = (0, 1, 2, 3)


@partial(jax.jit, static_argnums=_STATIC, donate_argnums=7)
def _step(
    blocks: tuple[Structure, ...],
    config: ModelConfig,
    capacity: int,
    windowed: tuple[bool, ...],
    leaves: tuple[Leaves, ...],
    x: Array,
    starts: Array,
    caches: tuple[Cache, ...],
) -> tuple[Array, list[Cache]]:
    """Some blocks, one after the other, their rows independent but for the weights, which all share."""
    after = []
    for block, kind, arrays, cache in zip(blocks, windowed, leaves, caches, strict=True):

        def one_row(
            x: Array, start: Array, cache: Cache, block: Structure = block, kind: bool = kind, arrays: Leaves = arrays
        ) -> tuple[Array, Cache]:
            context = step_context(config, start, x.shape[0], capacity, kind)
            y, after = block.merge(arrays).step(x[None], context, cache._replace(length=start))
            return y[0], after

        if config.num_experts:  # ragged products have no vmap
            x, cache = jax.lax.map(lambda row, one_row=one_row: one_row(*row), (x, starts, cache))
        else:
            x, cache = jax.vmap(one_row)(x, starts, cache)
        after.append(cache)
    return x, after
