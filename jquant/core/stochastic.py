"""Stochastic rounding: to one of the two neighbouring levels, by chance, so that the mean is the value itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray

from jquant.core.formats import Element, Int


def round_stochastically(
    y: Float32[Array, "..."], element: Element, key: PRNGKeyArray, *, zero_point: Array | None = None
) -> Float32[Array, "..."]:
    """For y between neighbouring levels a ≤ y ≤ b: b with probability (y − a)/(b − a), else a; E[result] = y.

    Args:
        y: values over their scale.
        element: any; values beyond its first and last level saturate.
        key: drives the choice; the same key gives the same choice.
        zero_point: of an asymmetric integer, broadcast against y: levels are −z … 2^b − 1 − z.

    Reference: Gupta et al., Deep Learning with Limited Numerical Precision, 1502.02551, 3.1.
    """
    chance = jax.random.uniform(key, y.shape, jnp.float32)
    if isinstance(element, Int):
        if zero_point is None:
            lowest, highest = float(element.levels()[0]), float(element.levels()[-1])
            return jnp.clip(jnp.floor(y + chance), lowest, highest)
        return jnp.clip(jnp.floor(y + chance), -zero_point, element.highest_code - zero_point)
    levels = jnp.asarray(element.levels())
    upper = jnp.clip(jnp.searchsorted(levels, y, side="right"), 1, len(levels) - 1)
    below, above = levels[upper - 1], levels[upper]
    return jnp.where(chance < (y - below) / (above - below), above, below)
