"""Where a training state lies on a mesh: rows of data over "data" and "fsdp", parameters and their moments by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant.core.errors import InputError
from jquant.nn.mesh import DATA, FSDP, axis_size
from jquant.nn.placement import put
from jquant.nn.surgery import Path


def train_state_shardings(state: Any, parameters: Mapping[Path, NamedSharding], mesh: Mesh) -> Any:
    """Of any state that holds arrays by parameter path, as an optimizer's: those as the parameters, others copied."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        found = next((parameters[key] for key in reversed(keys) if key in parameters), None)
        if found is not None and len(found.spec) <= np.ndim(leaf):
            return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def check_rows(rows: int, mesh: Mesh | None) -> None:
    """Raises InputError where so many rows of a batch do not divide by the devices that they are spread over."""
    size = 1 if mesh is None else axis_size(mesh, DATA, FSDP)
    if rows % size:
        raise InputError(f"a batch of {rows} rows on {size} devices: choose a batch that divides")


def spread_rows(batch: Any, mesh: Mesh | None) -> Any:
    """Leaves [microbatches, rows, …] on the devices, rows over all axes of the mesh but "tensor".

    Raises:
        InputError: the rows do not divide by the devices.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    axes = tuple(axis for axis in (DATA, FSDP) if axis in mesh.shape)

    def spread(leaf: Any) -> jax.Array:
        check_rows(leaf.shape[1], mesh)
        return put(leaf, NamedSharding(mesh, PartitionSpec(None, axes or None)))

    return jax.tree.map(spread, batch)
