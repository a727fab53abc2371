"""Rotary position embeddings, in the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jquant.models.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, *, local: bool = False) -> np.ndarray:
    """Radians a position, float32 [head_dim / 2]: θ^(−2i/d), scaled as the config says (Su et al., 2104.09864).

    `local` gives those of windowed blocks, which may have their own θ and then no scaling (Gemma 3, 2503.19786).
    """
    own = local and config.local_rope_theta is not None
    theta = config.local_rope_theta if own else config.rope_theta
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (1.0 / np.power(np.float32(theta), exponent)).astype(np.float32)
    if own:
        return plain
    if config.rope_divisors is not None:
        plain = plain / np.asarray(config.rope_divisors, np.float32)
    return plain if config.rope_scaling is None else _scaled(plain, config.rope_scaling)


def tables(
    config: ModelConfig, positions: Int[Array, " time"], *, local: bool = False
) -> tuple[Float[Array, "time half"], Float[Array, "time half"]]:
    """Cosines and sines of position × frequency, float32."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies(config, local=local))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch heads time dim"], cos: Float[Array, "time half"], sin: Float[Array, "time half"]
) -> Float[Array, "batch heads time dim"]:
    """Rotates the pairs (x_i, x_{i + d/2}) by their angles, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _scaled(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "linear":
        return (plain / np.float32(scaling.factor)).astype(np.float32)
    wavelength = 2 * np.pi / plain
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    # 0 where a wave is longer than the original context allows (divide), 1 where it is short (keep), smooth between.
    keep = np.clip((scaling.original_length / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * plain / scaling.factor + keep * plain).astype(np.float32)
