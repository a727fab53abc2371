"""AdamW in groups by path: matrices decay, norms and biases do not, quantization parameters have their own rate."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jquant.nn.surgery import Path
from jquant.qat.config import QATConfig
from jquant.qat.state import MATRICES, QUANTIZATION, VECTORS


def make_optimizer(config: QATConfig, groups: Mapping[Path, str]) -> optax.GradientTransformation:
    """Clipping by the norm of all gradients together, then AdamW a group.

    Labels go by path, not by type: optax sees arrays, and a variable's type is lost among them.

    Args:
        config: with steps and warm-up filled in (`QATConfig.with_steps`).
        groups: of each trained parameter (`state.split`).

    Reference: Loshchilov & Hutter, 1711.05101; clipping: Pascanu et al., 1211.5063. LSQ (Esser et al., 1902.08153)
    trains scales at the weights' rate; here theirs can be chosen.
    """
    rate = schedule(config, config.learning_rate)
    scale_rate = schedule(config, scale_peak(config))
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.partition(
            {
                MATRICES: optax.adamw(rate, weight_decay=config.weight_decay, b1=config.adam_b1, b2=config.adam_b2),
                VECTORS: optax.adam(rate, b1=config.adam_b1, b2=config.adam_b2),
                QUANTIZATION: optax.adam(scale_rate, b1=config.adam_b1, b2=config.adam_b2),
            },
            dict(groups),
        ),
    )


def schedule(config: QATConfig, peak: float) -> optax.Schedule:
    """Linear from peak/warmup at the first step to the peak, then half a cosine down to `final_rate`·peak."""
    assert config.steps is not None
    assert config.warmup_steps is not None
    warmup, fall = config.warmup_steps, config.steps - config.warmup_steps

    def rate(count: ArrayLike) -> ArrayLike:
        done = jnp.asarray(count, jnp.float32)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((done - warmup) / fall, 0, 1)))
        falling = config.final_rate + (1 - config.final_rate) * cosine
        return peak * jnp.where(done < warmup, (done + 1) / max(warmup, 1), falling)

    return rate


def scale_peak(config: QATConfig) -> float:
    """The highest rate of quantization parameters."""
    return config.learning_rate if config.scale_learning_rate is None else config.scale_learning_rate
