"""How far a quantized array is from the original: sums that add up over arrays, and the figures made of them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jquant.core.qtensor import QTensor, dequantize


class ErrorSums(NamedTuple):
    """Sums over an array of x and its error e = x̂ − x; those of several arrays pool in `summarize`."""

    elements: Array
    squared_error: Array
    absolute_error: Array
    max_error: Array
    squared: Array  # Σx²
    squared_quantized: Array  # Σx̂²
    product: Array  # Σx·x̂


class Metrics(NamedTuple):
    """Figures of one array, or of many pooled."""

    mse: float
    mae: float
    max_error: float
    sqnr_db: float  # 10·log10(Σx² / Σe²); infinite where there is no error
    cosine: float


def error_sums(x: Float[Array, "..."], quantized: QTensor | Float[Array, "..."]) -> ErrorSums:
    """Sums of x against its quantized self, in float32, rows first so that long sums keep their digits."""
    value = dequantize(quantized, jnp.float32) if isinstance(quantized, QTensor) else quantized
    x, value = x.astype(jnp.float32), value.astype(jnp.float32)
    error = value - x
    return ErrorSums(
        elements=jnp.float32(x.size),
        squared_error=_sum(error * error),
        absolute_error=_sum(jnp.abs(error)),
        max_error=jnp.maximum(jnp.max(error), -jnp.min(error)),
        squared=_sum(x * x),
        squared_quantized=_sum(value * value),
        product=_sum(x * value),
    )


def summarize(*sums: ErrorSums) -> Metrics:
    """The figures of the arrays behind `sums`, taken as one."""
    columns = np.asarray([[float(value) for value in each] for each in sums], np.float64)
    count, squared_error, absolute_error, _, squared, squared_quantized, product = columns.sum(axis=0)
    norm = np.sqrt(squared * squared_quantized)
    with np.errstate(divide="ignore"):
        ratio = squared / squared_error if squared_error > 0 else np.inf
        sqnr = 10 * np.log10(ratio)
    return Metrics(
        mse=float(squared_error / count),
        mae=float(absolute_error / count),
        max_error=float(columns[:, 3].max()),
        sqnr_db=float(sqnr),
        cosine=float(product / norm) if norm > 0 else float(squared == squared_quantized),
    )


def error_metrics(x: Float[Array, "..."], quantized: QTensor | Float[Array, "..."]) -> Metrics:
    """mse, mae, largest error, SQNR in dB and cosine of x against its quantized self."""
    return summarize(error_sums(x, quantized))


def _sum(values: Array) -> Array:
    return jnp.sum(jnp.sum(values, axis=-1))
