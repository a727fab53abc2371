"""The Cholesky factor that begins at the last column, and the inverse of a triangle.

    A = [A₁ B; · A₂] = R·Rᵀ, R upper:   A₂ = R₂·R₂ᵀ,   M = B·R₂⁻ᵀ,   A₁ − M·Mᵀ = R₁·R₁ᵀ,   R = [R₁ M; 0 R₂]

In halves nearly all of the work is matrix products. On CPU the factor is made so, and BLAS gets no triangle to solve
and, up to 2048, none wider than 128 to factorize: it starts threads of its own, which on a busy machine wait for each
other up to a hundred times as long as the work takes. An accelerator would spend its time on starting many small
kernels one after another: there its own factorization does it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_WHOLE = 128  # columns that are factorized at once
_PARTS = 16  # of a large matrix at most so many; each is compiled by itself
_SMALL = 32  # columns that are inverted one by one


def upper_cholesky(a: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """R, upper triangular, of A = R·Rᵀ; not finite where A is not positive definite.

    Only what stands on and above the diagonal is read.
    """
    return jax.lax.platform_dependent(a, cpu=_in_halves, default=_at_once)


def _in_halves(a: Array) -> Array:
    return _factor(a, max(_WHOLE, -(-len(a) // _PARTS)))[0]


def _at_once(a: Array) -> Array:
    # LAPACK and its like begin at the first column and read the lower part: in reversed order that is the upper one.
    return jnp.linalg.cholesky(a[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]


def inverse_upper(r: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """X = R⁻¹ of upper triangular matrices, in rows of blocks from the last: X_i = R_ii⁻¹·(I_i − Σ_{k>i} R_ik·X_k)."""
    size = r.shape[-1]
    blocks = -(-size // _SMALL)
    width = -(-size // blocks)
    missing = blocks * width - size
    padded = jnp.pad(r.reshape(-1, size, size), ((0, 0), (0, missing), (0, missing)))
    padded += jnp.diag((jnp.arange(blocks * width) >= size).astype(r.dtype))
    starts = range(0, blocks * width, width)
    on_diagonal = jnp.stack([padded[:, at : at + width, at : at + width] for at in starts])
    inverses = _substitute(on_diagonal.reshape(-1, width, width)).reshape(on_diagonal.shape)
    identity = jnp.broadcast_to(jnp.eye(blocks * width, dtype=r.dtype), padded.shape)

    def one_block(index: Array, found: Array) -> Array:
        block = blocks - 1 - index
        rows, ones = (jax.lax.dynamic_slice_in_dim(each, block * width, width, axis=1) for each in (padded, identity))
        value = _product(inverses[block], ones - _product(rows, found))
        return jax.lax.dynamic_update_slice_in_dim(found, value, block * width, axis=1)

    found = jax.lax.fori_loop(0, blocks, one_block, jnp.zeros_like(padded))
    return found[:, :size, :size].reshape(r.shape)


def _substitute(r: Float[Array, "batch n n"]) -> Float[Array, "batch n n"]:
    """R⁻¹ row by row, from the last."""
    size = r.shape[1]
    identity = jnp.eye(size, dtype=r.dtype)

    def one_row(index: Array, found: Array) -> Array:
        at = size - 1 - index
        row, diagonal = r[:, at], r[:, at, at]
        value = (identity[at] - jnp.sum(row[:, :, None] * found, axis=1)) / diagonal[:, None]
        return jax.lax.dynamic_update_slice_in_dim(found, value[:, None], at, axis=1)

    return jax.lax.fori_loop(0, size, one_row, jnp.zeros_like(r))


def _factor(a: Array, whole: int) -> tuple[Array, list[Array]]:
    """R, and the inverses of its parts on the diagonal, first to last."""
    size = len(a)
    if size <= whole:
        found = _at_once(a)
        return found, [inverse_upper(found)]
    at = size - -(-size // whole) // 2 * whole  # the last half is of whole parts
    last, inverses = _factor(a[at:, at:], whole)
    beside = _divide(a[:at, at:], last, inverses)
    first, others = _factor(a[:at, :at] - _product(beside, beside.T), whole)
    return jnp.block([[first, beside], [jnp.zeros_like(beside.T), last]]), [*others, *inverses]


def _divide(b: Array, upper: Array, inverses: list[Array]) -> Array:
    """b·R⁻ᵀ."""
    if len(inverses) == 1:
        return _product(b, inverses[0].T)
    split = len(inverses) // 2
    at = sum(map(len, inverses[:split]))
    last = _divide(b[:, at:], upper[at:, at:], inverses[split:])
    first = _divide(b[:, :at] - _product(last, upper[:at, at:].T), upper[:at, :at], inverses[:split])
    return jnp.concatenate([first, last], axis=1)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
