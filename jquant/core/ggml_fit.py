"""Least-squares scales of small groups, found by search: what ggml's K-type encoders rest on.

For codes q fixed, the scale (and minimum) of least weighted squared error has a closed form; for these fixed, codes are
found by rounding. Each search starts from a range of scales, rounds, solves, and keeps the start with the least error.

Arrays are [..., elements, groups]: sums run over the last axis but one, so that compilers vectorize over groups.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

Nearest = Callable[[Array], Array]

POLISH = 2  # steps of `best_scale_and_minimum` from the best that its starts led to
_TINIEST = np.float32(2.0**-100)  # groups below it count as zeros; f16 scales end at 2^-24 anyway


def best_scale(
    x: Float32[Array, "*s elements groups"],
    weights: Float32[Array, "*s elements groups"] | None,
    nearest: Nearest,
    targets: np.ndarray,
) -> Float32[Array, "*s groups"]:
    """The s of least Σ w (x − s·q)² over the starts `targets`; s may be negative.

    Args:
        x: values.
        weights: of the squared errors; None weighs all alike.
        nearest: values in units of s to the nearest code, as float32.
        targets: float32, the values in units of s that the element of largest magnitude starts from.

    With q fixed, s = Σwqx / Σwq² and the error falls by (Σwqx)² / Σwq².
    """
    peak = signed_peak(x)
    inverse = jnp.where(jnp.abs(peak) > _TINIEST, 1 / jnp.where(peak == 0, 1, peak), 0.0)

    def step(index: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        gain, scale = best
        q = nearest(x * (jnp.asarray(targets)[index] * inverse)[..., None, :])
        product, square = _sum(_weighted(q * x, weights)), _sum(_weighted(q * q, weights))
        found = product / jnp.where(square > 0, square, 1.0)
        better = found * product > gain
        return jnp.where(better, found * product, gain), jnp.where(better, found, scale)

    zeros = jnp.zeros_like(peak)
    scale = jax.lax.fori_loop(0, len(targets), step, (zeros, zeros))[1]
    return jnp.where(jnp.isfinite(peak), scale, jnp.inf)


def best_scale_and_minimum(
    x: Float32[Array, "*s elements groups"],
    weights: Float32[Array, "*s elements groups"] | None,
    top: int,
    targets: np.ndarray,
    *,
    polish: int = POLISH,
) -> tuple[Float32[Array, "*s groups"], Float32[Array, "*s groups"]]:
    """The s ≥ 0 and m ≥ 0 of least Σ w (x − s·q + m)², codes q from 0 to `top`.

    Args:
        x: values.
        weights: of the squared errors; None weighs all alike.
        top: the largest code.
        targets: float32, the codes that the largest element starts from.
        polish: steps that round by the best found and solve again.

    With q fixed, s and m solve two linear equations; a minimum below 0 cannot be stored and becomes 0. Sums are of
    y = x − lowest, lest large offsets eat their digits.
    """
    lowest, highest = jnp.minimum(jnp.min(x, axis=-2), 0.0), jnp.max(x, axis=-2)
    y, span = x - lowest[..., None, :], highest - lowest
    inverse = jnp.where(span > _TINIEST, 1 / jnp.where(span > 0, span, 1), 0.0)
    total = jnp.float32(x.shape[-2]) if weights is None else _sum(weights)
    sum_y = _sum(_weighted(y, weights))

    def step(index: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        gain, scale, offset = best
        # After the starts, `polish` steps from the best that they led to.
        starting = index < len(targets)
        per_unit = jnp.where(starting, jnp.asarray(targets)[index] * inverse, 1 / jnp.where(scale > 0, scale, 1.0))
        shift = jnp.where(starting, 0.0, offset)
        q = jnp.clip(jnp.round((y - shift[..., None, :]) * per_unit[..., None, :]), 0, top)
        sum_q, sum_qq, sum_qy = (_sum(_weighted(each, weights)) for each in (q, q * q, q * y))
        determinant = total * sum_qq - sum_q * sum_q
        divisor = jnp.where(determinant > 0, determinant, 1.0)
        s = (total * sum_qy - sum_y * sum_q) / divisor
        b = (sum_qq * sum_y - sum_q * sum_qy) / divisor
        # A positive offset of x cannot be stored: 0 is the best that can. Where all codes are equal, it is the choice.
        above = (b > -lowest) | (determinant <= 0)
        b = jnp.where(above, -lowest, b)
        s = jnp.where(above, (sum_qy - b * sum_q) / jnp.where(sum_qq > 0, sum_qq, 1.0), s)
        fall = 2 * (s * sum_qy + b * sum_y) - (s * (s * sum_qq + 2 * b * sum_q) + b * b * total)
        better = (s > 0) & (fall > gain)
        return jnp.where(better, fall, gain), jnp.where(better, s, scale), jnp.where(better, b, offset)

    zeros = jnp.zeros_like(span)
    # With all codes 0, the best that can be done: the mean, where it is negative.
    mean = jnp.minimum(sum_y / jnp.where(total > 0, total, 1.0), -lowest)
    start = (mean * (2 * sum_y - mean * total), zeros, mean)
    _, scale, offset = jax.lax.fori_loop(0, len(targets) + polish, step, start)
    return jnp.where(jnp.isfinite(span), scale, jnp.inf), -(offset + lowest)


def best_minimum(
    x: Float32[Array, "*s elements groups"],
    weights: Float32[Array, "*s elements groups"] | None,
    top: int,
    scale: Float32[Array, "*s groups"],
    minimum: Float32[Array, "*s groups"],
) -> Float32[Array, "*s groups"]:
    """The m ≥ 0 of least Σ w (x − s·q + m)² for a scale that was rounded since, codes being those of `minimum`.

    m = (s Σwq − Σwx) / Σw
    """
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0)
    q = jnp.clip(jnp.round((x + minimum[..., None, :]) * inverse[..., None, :]), 0, top)
    total = jnp.float32(x.shape[-2]) if weights is None else _sum(weights)
    residual = scale * _sum(_weighted(q, weights)) - _sum(_weighted(x, weights))
    return jnp.maximum(residual / jnp.where(total > 0, total, 1.0), 0.0)


def best_multiple(
    x: Float32[Array, "*s elements groups"],
    weights: Float32[Array, "*s elements groups"] | None,
    nearest: Nearest,
    unit: Float32[Array, " groups"],
    count: Float32[Array, "*s groups"],
    bounds: tuple[int, int],
) -> Float32[Array, "*s groups"]:
    """The whole c of least Σ w (x − (unit·c)·q)² among count − 1, count and count + 1, within bounds.

    A scale that was rounded need not be the best of its neighbours once x is rounded by it.
    """

    def step(index: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        error, whole = best
        candidate = jnp.clip(count + jnp.array([0.0, -1.0, 1.0])[index], *bounds)
        scale = unit * candidate
        q = nearest(x * jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))[..., None, :])
        rest = x - scale[..., None, :] * q
        found = _sum(_weighted(rest * rest, weights))
        better = found < error
        return jnp.where(better, found, error), jnp.where(better, candidate, whole)

    return jax.lax.fori_loop(0, 3, step, (jnp.full_like(count, jnp.inf), count))[1]


def signed_peak(x: Float32[Array, "*s elements groups"]) -> Float32[Array, "*s groups"]:
    """The element of largest magnitude; the positive one where two are equally large."""
    highest, lowest = jnp.max(x, axis=-2), jnp.min(x, axis=-2)
    return jnp.where(highest >= -lowest, highest, lowest)


def _weighted(values: Array, weights: Array | None) -> Array:
    return values if weights is None else values * weights


def _sum(values: Array) -> Array:
    return jnp.sum(values, axis=-2)
