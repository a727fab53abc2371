"""Where a pipeline's arrays lie on a mesh: rows of weights over "tensor", batches over "data"."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant.core.errors import InputError

DATA, TENSOR = "data", "tensor"


def spread_batch(value: Any, mesh: Mesh | None) -> Any:
    """Arrays [batch, …] spread over the mesh's data axis; as they are without a mesh.

    Raises:
        InputError: the batch does not divide by the axis.
    """
    if mesh is None:
        return value
    size = dict(mesh.shape).get(DATA, 1)

    def put(array: jax.Array) -> jax.Array:
        if array.shape[0] % size:
            raise InputError(f"a batch of {array.shape[0]} on {size} devices: it must divide; choose another batch")
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(DATA if size > 1 else None)))

    return jax.tree.map(put, value)


def spread_rows(module: nnx.Module, mesh: Mesh) -> None:
    """Spreads the rows of all matrices over the mesh's tensor axis, in place; those that do not divide are copied."""
    size = dict(mesh.shape).get(TENSOR, 1)

    def put(array: jax.Array) -> jax.Array:
        rows = array.ndim >= 2 and size > 1 and array.shape[-2] % size == 0
        spec = PartitionSpec(*(None,) * (array.ndim - 2), TENSOR) if rows else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh, spec))

    nnx.update(module, jax.tree.map(put, nnx.state(module)))
