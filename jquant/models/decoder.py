"""The one decoder: pre-norm blocks of grouped-query attention and an MLP or experts, driven by `ModelConfig`.

Paths of its layers, which rules and checkpoints name: embed, blocks.N.attn_norm, blocks.N.attn.{q,k,v,o}_proj,
blocks.N.mlp_norm, blocks.N.mlp.{gate,up,down}_proj, head.norm, head.lm_head (absent where embeddings are tied). Where a
family has them: embed.positions, blocks.N.attn.{q,k}_norm, blocks.N.{attn,mlp}_post_norm, blocks.N.mlp.router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jquant.core.errors import InputError
from jquant.kernels.dispatch import on_cpu
from jquant.models import rope
from jquant.models.config import ModelConfig
from jquant.models.equivalences import equivalences
from jquant.models.feed_forward import feed_forward
from jquant.models.norms import RMSNorm, make_norm
from jquant.nn.embedding import dense, embedding_rows
from jquant.nn.linear import Linear, matmul_transposed
from jquant.nn.product import einsum
from jquant.nn.protocol import Equivalence

_LONG_STRETCH = 512  # queries that attend at once where launching a kernel takes as long as a small product


class Context(NamedTuple):
    """What a block needs beside x. All blocks of one pass that look back equally far may share it."""

    cos: Float[Array, "time half"] | None  # None where positions are learned
    sin: Float[Array, "time half"] | None
    mask: Bool[Array, "time keys"]  # True where a query may look


class Cache(NamedTuple):
    """Keys and values of one block for all positions so far, and how many there are."""

    keys: Float[Array, "batch kv_heads capacity dim"]
    values: Float[Array, "batch kv_heads capacity dim"]
    length: Int[Array, ""]


class Decoder(nnx.Module):
    """A causal language model in three parts: `embed`, `blocks`, `head` (see nn/protocol.py)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([DecoderBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.head = Head(config, self.embed, dtype=dtype, rngs=rngs)

    def equivalences(self) -> tuple[Equivalence, ...]:
        """Where channels of a block can be rescaled; the same for all blocks."""
        return equivalences(self.config)

    def contexts(self, length: int) -> list[Context]:
        """Contexts of a whole sequence at positions 0 … length − 1, causal; one a block.

        Raises:
            InputError: the model was not made for sequences that long.
        """
        check_length(self.config, length)
        return contexts_of_blocks(self.config, lambda windowed: causal_context(self.config, length, windowed))

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocab"]:
        """Logits of every position, float32."""
        x = self.embed(tokens)
        for block, context in zip(self.blocks, self.contexts(tokens.shape[1]), strict=True):
            x = block(x, context)
        return self.head(x)


class Embedding(nnx.Module):
    """Rows of W[vocab, hidden], scaled; where positions are learned, plus rows of P[positions, hidden]."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        scale = config.hidden_size**-0.5
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), shape, dtype))
        rows = (config.max_length + config.position_offset, config.hidden_size)
        learned = config.positions == "learned"
        self.positions = nnx.Param(scale * jax.random.normal(rngs.params(), rows, dtype)) if learned else None
        self.offset = config.position_offset
        self.scale = config.embed_scale

    def __call__(
        self, tokens: Int[Array, "*batch time"], start: Int[Array, ""] | int = 0
    ) -> Float[Array, "*batch time hidden"]:
        """Of the tokens at positions start, start + 1, …"""
        x = embedding_rows(self.weight.get_value(), tokens)
        if self.scale != 1:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.positions is None:
            return x
        rows = self.offset + start + jnp.arange(tokens.shape[-1])
        # Rows past the table belong to padding, whose keys and values must stay finite.
        return x + jnp.take(self.positions.get_value(), rows, axis=0, mode="clip")


class DecoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Holds nothing that tells it from its siblings but its weights."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attn_norm = make_norm(config, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.attn_post_norm = make_norm(config, dtype=dtype) if config.post_norms else None
        self.mlp_norm = make_norm(config, dtype=dtype)
        self.mlp = feed_forward(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = make_norm(config, dtype=dtype) if config.post_norms else None

    def __call__(self, x: Float[Array, "batch time hidden"], context: Context) -> Float[Array, "batch time hidden"]:
        return self._finish(x, self.attn(self.attn_norm(x), context))

    def step(
        self, x: Float[Array, "batch time hidden"], context: Context, cache: Cache
    ) -> tuple[Float[Array, "batch time hidden"], Cache]:
        """The same for the positions that follow those in the cache; the mask of `context` covers its capacity."""
        attended, cache = self.attn.step(self.attn_norm(x), context, cache)
        return self._finish(x, attended), cache

    def _finish(self, x: Array, attended: Array) -> Array:
        x = x + (attended if self.attn_post_norm is None else self.attn_post_norm(attended))
        fed = self.mlp(self.mlp_norm(x))
        return x + (fed if self.mlp_post_norm is None else self.mlp_post_norm(fed))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions where the context has them (Ainslie et al., 2305.13245)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        self.softcap = config.attention_softcap
        self.factors: DTypeLike | None = None  # of the products of heads: nn/capture.py
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = config.qkv_bias
        self.q_proj = Linear(config.hidden_size, queries, use_bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, keys, use_bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, keys, use_bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(queries, config.hidden_size, use_bias=config.output_bias, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps, dtype=dtype) if config.qk_norm else None

    def __call__(self, x: Float[Array, "batch time hidden"], context: Context) -> Float[Array, "batch time hidden"]:
        queries, keys, values = self._project(x, context)
        dtype = values.dtype
        if self.factors is not None:
            queries, keys, values = (each.astype(self.factors) for each in (queries, keys, values))
        attended = attend_causal(queries, keys, values, context.mask, scale=self.scale, softcap=self.softcap)
        return self.o_proj(_merge_heads(attended).astype(dtype))

    def step(
        self, x: Float[Array, "batch time hidden"], context: Context, cache: Cache
    ) -> tuple[Float[Array, "batch time hidden"], Cache]:
        queries, keys, values = self._project(x, context)
        start = (0, 0, cache.length, 0)
        cache = Cache(
            keys=jax.lax.dynamic_update_slice(cache.keys, keys, start),
            values=jax.lax.dynamic_update_slice(cache.values, values, start),
            length=cache.length + x.shape[1],
        )
        attended = attend(queries, cache.keys, cache.values, context.mask, scale=self.scale, softcap=self.softcap)
        return self.o_proj(_merge_heads(attended)), cache

    def _project(self, x: Array, context: Context) -> tuple[Array, Array, Array]:
        queries, keys, values = self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if context.cos is not None and context.sin is not None:
            queries = rope.rotate(queries, context.cos, context.sin)
            keys = rope.rotate(keys, context.cos, context.sin)
        return queries, keys, values

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim).swapaxes(-2, -3)


class Head(nnx.Module):
    """Final norm and projection to float32 logits; with tied embeddings the projection is the embedding itself."""

    def __init__(self, config: ModelConfig, embed: Embedding, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = make_norm(config, dtype=dtype)
        self.softcap = config.logit_softcap
        tied = config.tie_embeddings
        self.embed = embed if tied else None
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        x = self.norm(x)
        if self.embed is not None:
            logits = matmul_transposed(x, dense(self.embed.weight.get_value(), x.dtype), dtype=jnp.float32)
        else:
            assert self.lm_head is not None
            logits = self.lm_head(x, dtype=jnp.float32)
        return logits if self.softcap is None else _softcapped(logits, self.softcap)


def attend(
    queries: Float[Array, "batch heads time dim"],
    keys: Float[Array, "batch kv_heads keys dim"],
    values: Float[Array, "batch kv_heads keys dim"],
    mask: Bool[Array, "time keys"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "batch heads time dim"]:
    """softmax(scale·Q·Kᵀ)·V, the softmax in float32; each key-value head serves heads/kv_heads neighbouring queries.

    With a softcap c, scores s become c·tanh(s/c) before the mask (Gemma 2, 2408.00118).
    """
    batch, heads, time, dim = queries.shape
    kv_heads = keys.shape[1]
    # Queries that share keys become rows of one matrix product: plain batched products, no repeated keys.
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads * time, dim)
    scores = einsum("bgtd,bgsd->bgts", grouped, keys) * scale
    if softcap is not None:
        scores = _softcapped(scores, softcap)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, time, -1)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads * time, -1)
    attended = einsum("bgts,bgsd->bgtd", weights, values)
    return attended.astype(values.dtype).reshape(batch, heads, time, dim)


def attend_causal(
    queries: Float[Array, "batch heads time dim"],
    keys: Float[Array, "batch kv_heads time dim"],
    values: Float[Array, "batch kv_heads time dim"],
    mask: Bool[Array, "time time"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "batch heads time dim"]:
    """`attend` where no query sees a later key: each stretch of queries meets the keys up to its end and no others."""
    time = queries.shape[2]
    # Shorter ones save more of the upper triangle, longer ones make better products.
    stretch = max(64, -(-time // 16)) if on_cpu() else _LONG_STRETCH
    pieces = []
    for start in range(0, time, stretch):
        end = min(start + stretch, time)
        seen = keys[:, :, :end], values[:, :, :end], mask[start:end, :end]
        pieces.append(attend(queries[:, :, start:end], *seen, scale=scale, softcap=softcap))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=2)


def check_length(config: ModelConfig, length: int) -> None:
    """Raises InputError where a sequence is longer than the model's context."""
    if length > config.max_length:
        raise InputError(
            f"a sequence of {length} tokens exceeds the model's context of {config.max_length}: shorten the window"
        )


def contexts_of_blocks(config: ModelConfig, make: Callable[[bool], Context]) -> list[Context]:
    """One context a block; `make` is called once for windowed blocks and once for the others, where there are any."""
    kinds = config.is_windowed()
    made = {windowed: make(windowed) for windowed in sorted(set(kinds))}
    return [made[windowed] for windowed in kinds]


def step_context(config: ModelConfig, start: Int[Array, ""], time: int, capacity: int, windowed: bool) -> Context:
    """Context of `time` positions from `start` on, with a mask over a cache of `capacity` positions."""
    positions = start + jnp.arange(time)
    keys = jnp.arange(capacity)[None, :]
    mask = keys <= positions[:, None]
    if windowed:
        assert config.window is not None
        mask &= keys > positions[:, None] - config.window
    cos, sin = (None, None) if config.positions == "learned" else rope.tables(config, positions, local=windowed)
    return Context(cos, sin, mask)


def causal_context(config: ModelConfig, length: int, windowed: bool) -> Context:
    """Context of a whole sequence."""
    return step_context(config, jnp.int32(0), length, length, windowed)


def _softcapped(scores: Array, cap: float) -> Array:
    return cap * jnp.tanh(scores / cap)


def _merge_heads(x: Array) -> Array:
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)
