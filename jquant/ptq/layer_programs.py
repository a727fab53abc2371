"""The small programs of the pipeline on one layer: its Gram matrix, its decoded weight, and what the report says."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.calib import gram
from jquant.calib.gram import Gram, GramState, OrderedGram
from jquant.core.qtensor import QTensor, dequantize
from jquant.core.scales import NestedScale
from jquant.core.scheme import Scheme
from jquant.core.symmetric import square
from jquant.kernels.dispatch import WITHOUT_TRITON_GEMM
from jquant.ptq.rtn import rounded


@partial(jax.jit, donate_argnums=0, static_argnames="dtype")
def update(state: GramState, rows: jax.Array, mask: jax.Array | None, dtype: str | None = None) -> GramState:
    """`gram.update`, of rows rounded to `dtype` first where one is given."""
    return gram.update(state, rows if dtype is None else rows.astype(dtype), mask)


_finalize = jax.jit(gram.finalize)
_finalize_in_place = jax.jit(gram.finalize, donate_argnums=0)


def finalizing(state: GramState) -> Any:
    """The program of `gram.finalize`: in the memory of the sums where they are one array."""
    return _finalize_in_place if len(state.strips) == 1 else _finalize


@jax.jit
def decoded(q: QTensor) -> jax.Array:
    """The weight that the codes stand for."""
    return dequantize(q)


def errors(
    weight: jax.Array,
    value: QTensor,
    scheme: Scheme,
    statistics: Gram | OrderedGram | None,
    *,
    alone: bool = False,
    factors: str = "float32",
) -> tuple[jax.Array, jax.Array]:
    """Squared and relative, of rounding to nearest and of the solution, over a whole stack: see `LayerReport`.

    `factors` is what factors of products are rounded to, but for the solution's error.

    In small programs, one product in the last: together they took a GPU's compiler ten seconds a shape, and the memory
    of six matrices. `alone`, each waits for those before it, whose operands would stay as long as it does.
    """
    ready = jax.block_until_ready if alone else lambda x: x
    order = _order(statistics)
    ready(value)
    size = ready(_squares(_difference(weight, None, order), statistics, factors))
    rounding = ready(_squares(_difference(weight, _rounded(weight, scheme, _level(value)), order), statistics, factors))
    return ready(_relative(rounding, _squares(_difference(weight, value, order), statistics, "float32"), size))


@partial(jax.jit, static_argnames="scheme")
def _rounded(weight: jax.Array, scheme: Scheme, outer: jax.Array | None = None) -> QTensor:
    return rounded(weight.astype(jnp.float32), scheme, outer)


def _level(value: QTensor) -> jax.Array | None:
    """The second level of a nested scale, which layers may share: rounding to nearest has the same."""
    return value.stored.scale2 if isinstance(value.scheme.scale, NestedScale) else None


@jax.jit
def _difference(weight: jax.Array, value: QTensor | None, order: jax.Array | None) -> jax.Array:
    """weight − value, or weight itself, its columns in the order of the statistics."""
    found = weight.astype(jnp.float32)
    found = found if value is None else dequantize(value, jnp.float32) - found
    return found if order is None else found.at[..., order].get(mode="promise_in_bounds")


@partial(jax.jit, static_argnames="factors", compiler_options=WITHOUT_TRITON_GEMM)
def _squares(error: jax.Array, statistics: Gram | OrderedGram | None, factors: str) -> jax.Array:
    """tr(E·H·Eᵀ); factors are rounded where half of H is left."""
    if statistics is None:
        return jnp.sum(error * error)
    if isinstance(statistics, OrderedGram):
        found = square(error, statistics.above, statistics.diagonal[statistics.order], factors=factors)
    else:
        weighted = jnp.matmul(error, statistics.matrix, precision=jax.lax.Precision.HIGHEST)
        found = jnp.sum(weighted * error)
    return jnp.maximum(found, 0.0)


def _order(statistics: Gram | OrderedGram | None) -> jax.Array | None:
    return statistics.order if isinstance(statistics, OrderedGram) else None


@jax.jit
def _relative(rounding: jax.Array, error: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = jnp.where(size > 0, size, 1.0)
    return rounding / size, error / size


def traced_report(
    weight: jax.Array, value: QTensor, scheme: Scheme, statistics: Gram | OrderedGram, factors: str
) -> list[Any]:
    """What `decoded` and `errors` compile; everything but the scheme may be abstract."""
    error = jax.ShapeDtypeStruct(weight.shape, jnp.float32)
    nearest = _rounded.trace(weight, scheme, _level(value))
    return [
        decoded.trace(value),
        *(_squares.trace(error, statistics, each) for each in dict.fromkeys((factors, "float32"))),
        nearest,
        *(_difference.trace(weight, each, _order(statistics)) for each in (None, value, nearest.out_info)),
        _relative.trace(*[jax.ShapeDtypeStruct((), jnp.float32)] * 3),
    ]
