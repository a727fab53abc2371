"""The one decoder: pre-norm blocks of grouped-query attention and a gated MLP, driven by `ModelConfig`.

Paths of its layers, which rules and checkpoints name: embed, blocks.N.attn_norm, blocks.N.attn.{q,k,v,o}_proj,
blocks.N.mlp_norm, blocks.N.mlp.{gate,up,down}_proj, head.norm, head.lm_head (absent where embeddings are tied).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jquant.models import rope
from jquant.models.config import ModelConfig
from jquant.nn.linear import Linear, matmul_transposed


class Context(NamedTuple):
    """What a block needs beside x. All blocks of one pass may share it."""

    cos: Float[Array, "time half"]
    sin: Float[Array, "time half"]
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
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([DecoderBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.head = Head(config, self.embed, dtype=dtype, rngs=rngs)

    def contexts(self, length: int) -> list[Context]:
        """Contexts of a whole sequence at positions 0 … length − 1, causal; one a block."""
        context = _causal_context(self.config, length)
        return [context] * len(self.blocks)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocab"]:
        """Logits of every position, float32."""
        x = self.embed(tokens)
        for block, context in zip(self.blocks, self.contexts(tokens.shape[1]), strict=True):
            x = block(x, context)
        return self.head(x)


class Embedding(nnx.Module):
    """Rows of W[vocab, hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        scale = hidden_size**-0.5
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (vocab_size, hidden_size), dtype))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        return jnp.take(self.weight.get_value(), tokens, axis=0)


class DecoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Holds nothing that tells it from its siblings but its weights."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time hidden"], context: Context) -> Float[Array, "batch time hidden"]:
        x = x + self.attn(self.attn_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))

    def step(
        self, x: Float[Array, "batch time hidden"], context: Context, cache: Cache
    ) -> tuple[Float[Array, "batch time hidden"], Cache]:
        """The same for the positions that follow those in the cache; the mask of `context` covers its capacity."""
        attended, cache = self.attn.step(self.attn_norm(x), context, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions (Ainslie et al., 2305.13245)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, queries, use_bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, keys, use_bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, keys, use_bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(queries, config.hidden_size, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time hidden"], context: Context) -> Float[Array, "batch time hidden"]:
        queries, keys, values = self._project(x, context)
        return self.o_proj(_merge_heads(attend_causal(queries, keys, values, context.mask)))

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
        attended = attend(queries, cache.keys, cache.values, context.mask)
        return self.o_proj(_merge_heads(attended)), cache

    def _project(self, x: Array, context: Context) -> tuple[Array, Array, Array]:
        queries = rope.rotate(self._heads(self.q_proj(x)), context.cos, context.sin)
        keys = rope.rotate(self._heads(self.k_proj(x)), context.cos, context.sin)
        return queries, keys, self._heads(self.v_proj(x))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim).swapaxes(-2, -3)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nnx.Module):
    """w · x / √(mean(x²) + ε), in float32 (Zhang & Sennrich, 1910.07467)."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normal * self.weight.get_value().astype(jnp.float32)).astype(x.dtype)


class Head(nnx.Module):
    """Final norm and projection to float32 logits; with tied embeddings the projection is the embedding itself."""

    def __init__(self, config: ModelConfig, embed: Embedding, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        tied = config.tie_embeddings
        self.embed = embed if tied else None
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        x = self.norm(x)
        if self.embed is not None:
            return matmul_transposed(x, self.embed.weight.get_value(), dtype=jnp.float32)
        assert self.lm_head is not None
        return self.lm_head(x, dtype=jnp.float32)


def attend(
    queries: Float[Array, "batch heads time dim"],
    keys: Float[Array, "batch kv_heads keys dim"],
    values: Float[Array, "batch kv_heads keys dim"],
    mask: Bool[Array, "time keys"],
) -> Float[Array, "batch heads time dim"]:
    """softmax(Q·Kᵀ/√d)·V, the softmax in float32; each key-value head serves heads/kv_heads neighbouring queries."""
    batch, heads, time, dim = queries.shape
    kv_heads = keys.shape[1]
    # Queries that share keys become rows of one matrix product: plain batched products, no repeated keys.
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads * time, dim)
    scores = jnp.einsum("bgtd,bgsd->bgts", grouped, keys, preferred_element_type=jnp.float32) * dim**-0.5
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, time, -1)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads * time, -1)
    attended = jnp.einsum("bgts,bgsd->bgtd", weights, values, preferred_element_type=jnp.float32)
    return attended.astype(values.dtype).reshape(batch, heads, time, dim)


def attend_causal(
    queries: Float[Array, "batch heads time dim"],
    keys: Float[Array, "batch kv_heads time dim"],
    values: Float[Array, "batch kv_heads time dim"],
    mask: Bool[Array, "time time"],
) -> Float[Array, "batch heads time dim"]:
    """`attend` where no query sees a later key: each stretch of queries meets the keys up to its end and no others."""
    time = queries.shape[2]
    stretch = max(64, -(-time // 16))  # shorter ones save more of the upper triangle, longer ones make better products
    pieces = []
    for start in range(0, time, stretch):
        end = min(start + stretch, time)
        pieces.append(attend(queries[:, :, start:end], keys[:, :, :end], values[:, :, :end], mask[start:end, :end]))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=2)


def step_context(config: ModelConfig, start: Int[Array, ""], time: int, capacity: int) -> Context:
    """Context of `time` positions from `start` on, with a mask over a cache of `capacity` positions."""
    positions = start + jnp.arange(time)
    cos, sin = rope.tables(config, positions)
    return Context(cos, sin, jnp.arange(capacity)[None, :] <= positions[:, None])


def _causal_context(config: ModelConfig, length: int) -> Context:
    return step_context(config, jnp.int32(0), length, length)


def _merge_heads(x: Array) -> Array:
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)
