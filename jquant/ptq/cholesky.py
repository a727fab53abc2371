"""The Cholesky factor that begins at the last column, in the place of its matrix, and the inverse of a triangle.

    A = R·Rᵀ, R upper:   R_JJ·R_JJᵀ = A_JJ − Σ_{K>J} R_JK·R_JKᵀ
                         R_IJᵀ      = R_JJ⁻¹·(A_JI − Σ_{K>J} R_JK·R_IKᵀ)  for I < J,    from the last J to the first

A is read above the diagonal, and Rᵀ written below it and on it: another try with more on the diagonal needs no copy of
A. Its memory holds both.

Nearly all of the work is matrix products. On CPU the factor is made so, and BLAS gets no triangle to solve and, up to
2048, none wider than 128 to factorize: it starts threads of its own, which on a busy machine wait for each other up to
a hundred times as long as the work takes. An accelerator would spend its time on starting many small kernels one after
another: there its own factorization does it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

_WHOLE = 128  # columns that are factorized at once
_PARTS = 16  # of a large matrix at most so many; each is compiled by itself
_TOGETHER = 2  # parts whose rows are written together
_SMALL = 32  # columns that are inverted one by one
_BY_ROWS = Layout(major_to_minor=(0, 1))  # of a tile: else it takes LAPACK's, by columns, and with it all of the matrix


def cholesky_below(a: Float[Array, "n n"], diagonal: Float[Array, " n"]) -> Float[Array, "n n"]:
    """Rᵀ on and below the diagonal, of A = R·Rᵀ with R upper triangular; not finite where A is not positive definite.

    Args:
        a: A above the diagonal, which stays as it is; what stands elsewhere is not read.
        diagonal: of A.
    """
    return jax.lax.platform_dependent(a, diagonal, cpu=_row_by_row, default=_with_one_call)


def _row_by_row(a: Array, diagonal: Array) -> Array:
    size = len(a)
    whole = max(_WHOLE, -(-size // _PARTS))
    width = _TOGETHER * whole
    for begin in reversed(range(0, size, width)):
        end = min(begin + width, size)
        tile, later = with_layout_constraint(a[begin:end, begin:end], _BY_ROWS), a[end:, begin:end].T
        corner, inverses = _factor(_symmetric(tile, diagonal[begin:end]) - _product(later, later.T), whole)
        left = _divide(a[:begin, begin:end].T - _product(later, a[end:, :begin]), corner, inverses)
        rows = jnp.concatenate([left, _below(corner, tile)], axis=1)
        a = jax.lax.dynamic_update_slice(a, rows, (begin, 0))
    return a


def _with_one_call(a: Array, diagonal: Array) -> Array:
    return _below(_at_once(_symmetric(a, diagonal)), a)


def _below(lower: Array, above: Array) -> Array:
    at = jnp.arange(len(above))
    return jnp.where(at[:, None] < at, above, lower)  # not their sum: where A has no factor `lower` is NaN all over


def _symmetric(above: Array, diagonal: Array) -> Array:
    upper = jnp.triu(above, 1)
    return upper + upper.T + jnp.diag(diagonal)


def _at_once(a: Array) -> Array:
    """Rᵀ of A; read is what stands on and above its diagonal."""
    # LAPACK and its like begin at the first column and read the lower part: in reversed order that is the upper one.
    return jnp.linalg.cholesky(a[::-1, ::-1], symmetrize_input=False)[::-1, ::-1].T


@jax.jit  # lowered once, for all parts of a factor
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
    """Rᵀ by halves, and the inverses of the parts of R on the diagonal, first to last."""
    size = len(a)
    if size <= whole:
        found = _at_once(a)
        return found, [inverse_upper(found.T)]
    at = size - -(-size // whole) // 2 * whole  # the last half is of whole parts
    last, inverses = _factor(a[at:, at:], whole)
    beside = _divide(a[:at, at:].T, last, inverses)
    first, others = _factor(a[:at, :at] - _product(beside.T, beside), whole)
    return jnp.block([[first, jnp.zeros_like(beside.T)], [beside, last]]), [*others, *inverses]


def _divide(b: Array, lower: Array, inverses: list[Array]) -> Array:
    """R⁻¹·b, with Rᵀ given."""
    if len(inverses) == 1:
        return _product(inverses[0], b)
    split = len(inverses) // 2
    at = sum(map(len, inverses[:split]))
    last = _divide(b[at:], lower[at:, at:], inverses[split:])
    first = _divide(b[:at] - _product(lower[at:, :at].T, last), lower[:at, :at], inverses[:split])
    return jnp.concatenate([first, last])


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
