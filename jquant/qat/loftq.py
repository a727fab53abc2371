"""LoftQ: codes and an adapter that together stand for a weight, so that training starts closer to the float model.

    Q_t = quantize(W − B_{t−1} · A_{t−1}),    B_t · A_t = the best approximation of rank r to W − dequantize(Q_t)

Reference: Li et al., 2310.08659, algorithm 1. Of all steps the one with the smallest ‖W − dequantize(Q) − B·A‖ is kept,
which the paper does not: alternation does not always go down.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scheme import Scheme


class Start(NamedTuple):
    """Where training of an adapter starts: W ≈ dequantize(base) + b · a."""

    base: QTensor  # [out, in]
    a: Float32[Array, "rank in"]
    b: Float32[Array, "out rank"]


def loftq(w: Float[Array, "out in"], scheme: Scheme, rank: int, *, steps: int = 5) -> Start:
    """Codes and adapter of a weight.

    Args:
        w: any float dtype; computed in float32.
        scheme: of the codes.
        rank: of the adapter, 1 to the smaller side of w.
        steps: alternations, at least 1; the paper takes 1 to 5. Each is a singular value decomposition of w's shape.

    Returns:
        The base, A with orthogonal rows and B with orthogonal columns, each scaled by the roots of the singular values.

    Raises:
        InputError: rank or steps are out of range, or the scheme does not fit.
    """
    if w.ndim != 2:
        raise InputError(f"LoftQ of an array {w.shape}: it must be one matrix [out, in]")
    if not 1 <= rank <= min(w.shape):
        raise InputError(f"rank {rank} over a weight {w.shape}: it must be 1 to {min(w.shape)}")
    if steps < 1:
        raise InputError(f"LoftQ in {steps} steps: it takes at least 1")
    return _loftq(w, scheme, rank, steps)


@partial(jax.jit, static_argnames=("scheme", "rank", "steps"))
def _loftq(w: Array, scheme: Scheme, rank: int, steps: int) -> Start:
    wide = w.astype(jnp.float32)

    def alternate(start: Start) -> tuple[Start, Array]:
        base = quantize((wide - _product(start)).astype(w.dtype), scheme)
        rest = wide - dequantize(base, jnp.float32)
        u, s, vt = jnp.linalg.svd(rest, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        found = Start(base, root[:, None] * vt[:rank], u[:, :rank] * root)
        return found, jnp.sum((rest - _product(found)) ** 2)

    def step(_: int, carry: tuple[Start, Start, Array]) -> tuple[Start, Start, Array]:
        last, best, least = carry
        found, error = alternate(last)
        best = jax.tree.map(lambda new, old: jnp.where(error < least, new, old), found, best)
        return found, best, jnp.minimum(error, least)

    zeros = Start(quantize(w, scheme), jnp.zeros((rank, w.shape[1])), jnp.zeros((w.shape[0], rank)))
    first, error = alternate(zeros)
    return jax.lax.fori_loop(1, steps, step, (first, first, error))[1]


def _product(start: Start) -> Array:
    return jnp.matmul(start.b, start.a, precision=jax.lax.Precision.HIGHEST)
