"""Rows of an embedding table, float or packed."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jquant.core.qtensor import QTensor, dequantize


def embedding_rows(
    table: Float[Array, "vocab hidden"] | QTensor, tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch hidden"]:
    """table[tokens], in the table's dtype.

    Of a table in ggml's blocks only the rows asked for are decoded; of other packed ones all are, because their scales
    and zero points may be packed across rows.
    """
    if not isinstance(table, QTensor):
        return jnp.take(table, tokens, axis=0)
    if table.scheme.block is None:
        return jnp.take(dequantize(table), tokens, axis=0)
    flat = tokens.reshape(-1)
    blocks = jnp.take(table.planes[0], flat, axis=0)
    rows = dataclasses.replace(table, planes=(blocks,), matrix_shape=(flat.shape[0], table.matrix_shape[1]))
    return dequantize(rows).reshape(*tokens.shape, table.matrix_shape[1])


def dense(table: Float[Array, "vocab hidden"] | QTensor, dtype: DTypeLike) -> Float[Array, "vocab hidden"]:
    """The whole table; packed ones decoded to `dtype`."""
    return dequantize(table, dtype) if isinstance(table, QTensor) else table
