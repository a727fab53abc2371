"""The small programs of the pipeline on one layer: its Gram matrix, its decoded weight, and what the report says."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.calib import gram
from jquant.calib.gram import Gram
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scheme import Scheme
from jquant.kernels.dispatch import WITHOUT_TRITON_GEMM

update = jax.jit(gram.update, donate_argnums=0)
finalize = jax.jit(gram.finalize)


@jax.jit
def decoded(q: QTensor) -> jax.Array:
    """The weight that the codes stand for."""
    return dequantize(q)


def errors(weight: jax.Array, value: QTensor, scheme: Scheme, statistics: Gram | None) -> tuple[jax.Array, jax.Array]:
    """Squared and relative, of rounding to nearest and of the solution, over a whole stack: see `LayerReport`.

    In small programs, one product in the last: together they took a GPU's compiler ten seconds a shape, and the memory
    of six matrices.
    """
    size = _squares(weight.astype(jnp.float32), statistics)
    size = jnp.where(size > 0, size, 1.0)
    rounding = _squares(_difference(weight, _rounded(weight, scheme)), statistics)
    return rounding / size, _squares(_difference(weight, value), statistics) / size


@partial(jax.jit, static_argnames="scheme")
def _rounded(weight: jax.Array, scheme: Scheme) -> QTensor:
    return quantize(weight.astype(jnp.float32), scheme)


@jax.jit
def _difference(weight: jax.Array, value: QTensor) -> jax.Array:
    return dequantize(value, jnp.float32) - weight.astype(jnp.float32)


@partial(jax.jit, compiler_options=WITHOUT_TRITON_GEMM)
def _squares(error: jax.Array, statistics: Gram | None) -> jax.Array:
    if statistics is None:
        return jnp.sum(error * error)
    weighted = jnp.matmul(error, statistics.matrix, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(weighted * error), 0.0)


def traced_report(weight: jax.Array, value: QTensor, scheme: Scheme, statistics: Gram) -> list[Any]:
    """What `decoded` and `errors` compile; everything but the scheme may be abstract."""
    error = jax.ShapeDtypeStruct(weight.shape, jnp.float32)
    rounded = _rounded.trace(weight, scheme)
    return [
        decoded.trace(value),
        _squares.trace(error, statistics),
        rounded,
        *(_difference.trace(weight, each) for each in (value, rounded.out_info)),
    ]
