"""What a solver is: one weight matrix and what is known of its input, to a packed weight.

    solve(w[out, in], gram | None, scheme, *, config=None) -> Solution

A pure function, jitted at its entry; `jax.vmap` over w and gram serves stacked layers such as experts [E, out, in].
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jquant.calib.gram import Gram
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import Scheme


class Solution(NamedTuple):
    """A packed weight and what its solver has to report."""

    qtensor: QTensor
    loss: Float[Array, "*batch"]  # see `output_loss`
    damping: Float[Array, "*batch"]  # λ that was added to H, as a multiple of its mean diagonal; 0 where none was
    fallback: Bool[Array, "*batch"]  # the method could not work on this layer and rounded to nearest instead


class Solve(Protocol):
    """Every solver's signature; `config` is of the solver's own type, or None for its defaults. One that does nested
    scales takes their second level too, `outer` [1, 1], where layers share it."""

    def __call__(self, w: Array, gram: Gram | None, scheme: Scheme, *, config: Any = None) -> Solution: ...


def output_loss(
    w: Float[Array, "*batch out in"], value: Float[Array, "*batch out in"], gram: Gram | None
) -> Float[Array, "*batch"]:
    """½ tr(E H Eᵀ) of E = w − value: half the squared error of the layer's output, twice the mean over rows of data.

    Without data H is the identity. GPTQ reports the same with its damped H.
    """
    error = w.astype(jnp.float32) - value.astype(jnp.float32)
    weighted = error if gram is None else jnp.matmul(error, gram.matrix, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.sum(weighted * error, axis=-1), axis=-1) / 2


def check_finite(weight: jax.Array, path: str) -> None:
    """Raises InputError naming the layer where its weight holds a NaN or an infinity."""
    if not bool(is_finite(weight)):
        raise InputError(f"layer {path}: its weight holds a NaN or an infinity; weights must be finite")


@jax.jit
def is_finite(weight: jax.Array) -> jax.Array:
    """The program of `check_finite`."""
    return jnp.all(jnp.isfinite(weight))
