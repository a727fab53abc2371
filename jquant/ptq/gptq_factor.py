"""GPTQ's factor of a Gram matrix, in the place of the matrix.

    H + λI = R·Rᵀ, R upper triangular, columns in the order in which they are rounded

What rounding needs of R stands below the diagonal, R_ki / R_ii in row i, and H stays above it: one matrix of memory
where the caller lets the Gram matrix go, and what a solution costs can still be told.

Reference: Frantar et al., 2210.17323, 3.3 and SPEC 4; see gptq.py for the form with R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.calib.gram import Gram, OrderedGram
from jquant.core.config_check import check_fields
from jquant.core.errors import InputError
from jquant.core.symmetric import reordered
from jquant.ptq.cholesky import cholesky_below
from jquant.ptq.cost import Cost, Shape

_TRIES = 6  # dampings that are tried, each ten times the last


@dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """How GPTQ runs."""

    damping: float = 0.01  # of the mean diagonal of H, added to it
    # Columns of large H_ii first: with groups of neighbours and their scales from the original weights, or with groups
    # formed in that order, which the packed weight then has to say.
    act_order: Literal["none", "static", "dynamic"] = "static"
    # Of groups: all of it, or what loses least (core/range_search.py): of the weights, Σ|e|^2.4, or of the output, as
    # far as columns make it alone, Σ H_jj·e_j².
    range: Literal["minmax", "mse", "output"] = "output"
    block: int = 128  # columns after which the rest of W is compensated in one product

    def __post_init__(self) -> None:
        check_fields(self, "GPTQ")
        if not self.damping > 0:
            raise InputError(f"GPTQ damping {self.damping}: it must be positive, as 0.01")
        if self.block < 1:
            raise InputError(f"GPTQ block {self.block}: it must be at least 1 column")


class Factor(NamedTuple):
    """Of one Gram matrix and one order of its columns; serves every scheme and every layer that reads the input."""

    # Rows and columns in the order of `order`: R_ki / R_ii in row i and column k < i, 1 on the diagonal, H_ik above it.
    halves: Float[Array, "*batch in in"]
    root: Float[Array, "*batch in"]  # R_ii, likewise
    order: Int[Array, "*batch in"]
    diagonal: Float[Array, "*batch in"]  # of H, by original column; 0 where the input always was
    damping: Float[Array, "*batch"]  # λ that was added, as a multiple of the mean diagonal
    fallback: Bool[Array, "*batch"]  # no damping gave a factor: R is the identity, and rounding is to nearest

    @property
    def gram(self) -> OrderedGram:
        """H as it was factorized, without λ."""
        return OrderedGram(self.halves, self.diagonal, self.order)


def factorize(gram: Gram, *, config: GPTQConfig) -> Factor:
    """R of H + λI; λ is raised tenfold until the factor is finite (SPEC 4)."""
    return _factorize(gram.matrix, config)


def factorize_in_place(gram: Gram, *, config: GPTQConfig) -> Factor:
    """`factorize` in the memory of the Gram matrix, which is gone afterwards; `Factor.gram` has what it knew."""
    return _factorize_in_place(gram.matrix, config)


def cost(shape: Shape) -> Cost:
    """Of the factor for a weight of this shape: it is Cholesky's in³/3, in products that are half as fast as wide ones,
    and what brings H in order."""
    return Cost(operations=math.prod(shape[:-2]) * shape[-1] ** 3)


def traced_factorization(gram: Gram, config: GPTQConfig, *, in_place: bool) -> Any:
    """The program of either, for a Gram matrix that may be abstract."""
    return (_factorize_in_place if in_place else _factorize).trace(gram.matrix, config)


def _factorized(matrix: Array, config: GPTQConfig) -> Factor:
    diagonal = jnp.diagonal(matrix)
    if config.act_order == "none":
        order = jnp.arange(len(diagonal))
    else:
        order = jnp.argsort(-diagonal)
        matrix = reordered(matrix, order)
    known = diagonal[order]
    ones = (known == 0).astype(jnp.float32)  # of dead inputs
    mean = jnp.mean(known + ones)

    def damping_of(tries: Array) -> Array:
        return config.damping * jnp.float32(10) ** (tries - 1)

    def failed(state: tuple[Array, Array, Array]) -> Array:
        # H bounds the rows of R, so what is not finite in R shows on its diagonal.
        return (state[0] < _TRIES) & ~jnp.all(jnp.isfinite(state[1]))

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries = state[0] + 1
        found = cholesky_below(state[2], known + (ones + damping_of(tries) * mean))
        return tries, jnp.diagonal(found), found

    tries, root, halves = jax.lax.while_loop(failed, again, (jnp.int32(0), jnp.full_like(known, jnp.nan), matrix))
    fallback = ~jnp.all(jnp.isfinite(root))
    root = jnp.where(fallback, 1.0, root)
    at = jnp.arange(len(root))
    share = jnp.where(at[:, None] == at, 1.0, jnp.where(fallback, 0.0, halves / root[:, None]))
    halves = jnp.where(at[:, None] < at, halves, share)
    return Factor(halves, root, order, diagonal, damping_of(tries), fallback)


_factorize = jax.jit(_factorized, static_argnames="config")
_factorize_in_place = jax.jit(_factorized, static_argnames="config", donate_argnums=0)
