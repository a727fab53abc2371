"""From a model's config to the sizes that the roofline reckons with."""

from __future__ import annotations

from jquant.hardware.model_shape import ModelShape
from jquant.models.config import ModelConfig


def model_shape(config: ModelConfig, *, name: str, source: str) -> ModelShape:
    """The sizes of the decoder of this config, to the last parameter."""
    windowed = sum(config.is_windowed())
    return ModelShape(
        name=name,
        source=source,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_embeddings=config.tie_embeddings,
        gated=config.gated or config.num_experts > 0,  # experts are gated always
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        windows=() if config.window is None else (config.window,) * windowed,
        other_parameters=_other_parameters(config),
        max_length=config.max_length,
    )


def _other_parameters(config: ModelConfig) -> int:
    """Norms, biases, routers and learned positions."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    norm = hidden * (2 if config.norm == "layer" else 1)
    block = norm * (4 if config.post_norms else 2)
    if config.qk_norm:
        block += 2 * config.head_dim
    if config.qkv_bias:
        block += (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if config.output_bias:
        block += hidden
    if config.num_experts:
        block += config.num_experts * hidden
    elif config.mlp_bias:
        block += hidden + inner * (2 if config.gated else 1)
    positions = (config.max_length + config.position_offset) * hidden if config.positions == "learned" else 0
    return layers * block + norm + positions
