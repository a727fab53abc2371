"""What follows attention in a block: one MLP, gated or plain, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jquant.models.config import ModelConfig
from jquant.nn.linear import ExpertLinear, Linear, matmul_transposed

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def feed_forward(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> GatedMLP | PlainMLP | Experts:
    """The module that the config asks for."""
    kind = Experts if config.num_experts else GatedMLP if config.gated else PlainMLP
    return kind(config, dtype=dtype, rngs=rngs)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) · up(x)) (Shazeer, 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gate_proj = Linear(hidden, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.up_proj = Linear(hidden, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class Experts(nnx.Module):
    """Σ p_e · MLP_e(x) over the k experts that a router finds most likely (Jiang et al., Mixtral, 2401.04088, 2.1).

    Each projection of all experts is one stacked weight [experts, out, in]. Rows are sorted by expert, so that every
    expert multiplies its own rows and no others.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
        self.activation, self.chosen, self.normalize = (
            config.activation,
            config.experts_per_token,
            config.normalize_experts,
        )
        self.router = Router(hidden, experts, dtype=dtype, rngs=rngs)
        self.gate_proj = ExpertLinear(experts, hidden, inner, dtype=dtype, rngs=rngs)
        self.up_proj = ExpertLinear(experts, hidden, inner, dtype=dtype, rngs=rngs)
        self.down_proj = ExpertLinear(experts, inner, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        rows = x.reshape(-1, x.shape[-1])
        probabilities, experts = jax.lax.top_k(jax.nn.softmax(self.router(rows), axis=-1), self.chosen)
        if self.normalize:
            probabilities = probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)
        flat = experts.reshape(-1)
        order = jnp.argsort(flat)
        counts = jnp.bincount(flat, length=self.router.weight.get_value().shape[0])
        chosen = jnp.take(rows, order // self.chosen, axis=0)
        inner = ACTIVATIONS[self.activation](self.gate_proj(chosen, counts)) * self.up_proj(chosen, counts)
        outputs = jnp.take(self.down_proj(inner, counts), jnp.argsort(order), axis=0)
        outputs = outputs.reshape(len(rows), self.chosen, -1).astype(jnp.float32)
        return jnp.sum(outputs * probabilities[..., None], axis=1).astype(x.dtype).reshape(x.shape)


class Router(nnx.Module):
    """Logits of the experts, float32. No `Linear`: rules that quantize linear layers leave it alone."""

    def __init__(self, hidden: int, experts: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(hidden**-0.5 * jax.random.normal(rngs.params(), (experts, hidden), dtype))

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch experts"]:
        return matmul_transposed(x, self.weight.get_value(), dtype=jnp.float32)
