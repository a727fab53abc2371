"""The norms of a decoder: RMSNorm, and LayerNorm in older families."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jquant.models.config import ModelConfig


def make_norm(config: ModelConfig, *, dtype: DTypeLike) -> RMSNorm | LayerNorm:
    """The norm that the config names, over the hidden axis."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps, dtype=dtype)


class RMSNorm(nnx.Module):
    """w · x / √(mean(x²) + ε), in float32 (Zhang & Sennrich, 1910.07467).

    Gemma's checkpoints on Hugging Face hold w − 1; loading adds it.
    """

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normal * self.weight.get_value().astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """w · (x − mean(x)) / √(var(x) + ε) + b, in float32 (Ba et al., 1607.06450)."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        weight, bias = self.weight.get_value().astype(jnp.float32), self.bias.get_value().astype(jnp.float32)
        return (normal * weight + bias).astype(x.dtype)
