"""Where arrays lie on a mesh: parameters cut along their rows by rules over paths, batches along "data".

A weight W[out, in] is cut along out: groups of a quantized one lie along in and stay whole, GPTQ solves rows apart, and
a layer's products need its inputs on every device but no part of another device's weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.io.processes import several
from jquant.nn.mesh import DATA, FSDP, TENSOR, axis_size
from jquant.nn.surgery import Path

# Which axis of a parameter is cut, by its path, counted from the end; the first rule that fits decides. Where that axis
# does not divide, the first other axis that does is cut, and where none does the parameter is copied.
RULES: tuple[tuple[str, int], ...] = (
    (r"(^|\.)embed\.", -1),  # rows are looked up: cut along hidden, no device holds all of a token
    (r"", -2),  # W[out, in] along out
)
CUTTING = (TENSOR, FSDP)  # in this order what is gathered over "fsdp" are neighbours


def parameter_sharding(
    path: Path, shape: Sequence[int], mesh: Mesh | AbstractMesh, axes: Sequence[str] = CUTTING
) -> NamedSharding:
    """Where a float parameter lies: cut over all of `axes`, or over as many as divide; vectors are copied."""
    wanted = next(axis for pattern, axis in RULES if re.search(pattern, path))
    return _cut(shape, mesh, [wanted, *range(-len(shape), 0)], axes)


def parameter_shardings(
    arrays: Mapping[Path, Any], mesh: Mesh | AbstractMesh, axes: Sequence[str] = CUTTING
) -> dict[Path, NamedSharding]:
    """Where each of some float parameters lies."""
    return {path: parameter_sharding(path, array.shape, mesh, axes) for path, array in arrays.items()}


def tensor_shardings(path: Path, value: Any, mesh: Mesh | AbstractMesh, axes: Sequence[str] = CUTTING) -> Any:
    """Where a tensor lies, float or packed; of a packed one a sharding in the place of each of its arrays.

    Codes and scales are cut along rows, where these divide; zero points, packed along rows, and the groups of columns
    are copied.
    """
    if not isinstance(value, QTensor):
        return parameter_sharding(path, value.shape, mesh, axes)

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        cut = keys[0].name in ("planes", "stored") and leaf.ndim >= 2
        return _cut(leaf.shape, mesh, [-2] if cut else [], axes)

    return jax.tree_util.tree_map_with_path(place, value)


def placed(path: Path, value: Any, mesh: Mesh | None) -> Any:
    """A tensor on the devices. Of one in host memory each device is given its own part and no other."""
    if mesh is None:
        return jax.device_put(value)
    return jax.tree.map(put, value, tensor_shardings(path, value, mesh))


def place_module(module: nnx.Module, mesh: Mesh, *, prefix: str = "") -> None:
    """Puts every array of a module where the rules have it, in place."""
    state = nnx.state(module)
    nnx.update(module, jax.tree.map(put, state, state_shardings(state, mesh, prefix=prefix)))


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, axes: Sequence[str] = CUTTING, *, prefix: str = "") -> Any:
    """Where the arrays of a module's state lie, in a tree of the same structure."""

    def place(keys: tuple[Any, ...], variable: Any) -> Any:
        path = prefix + ".".join(str(getattr(key, "key", key)) for key in keys)
        if not isinstance(variable, nnx.Variable):
            return tensor_shardings(path, variable, mesh, axes)
        return variable.replace(tensor_shardings(path, variable.get_value(), mesh, axes))

    return jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def copied(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays whole on every device."""
    return tree if mesh is None else jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def spread_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays [batch, …] over the data axis; as they are without a mesh.

    Raises:
        InputError: the batch does not divide by the axis.
    """
    if mesh is None:
        return tree
    size = axis_size(mesh, DATA)

    def spread(array: Any) -> jax.Array:
        if array.shape[0] % size:
            raise InputError(f"a batch of {array.shape[0]} on {size} devices: it must divide; choose another batch")
        return put(array, batch_sharding(mesh))

    return jax.tree.map(spread, tree)


def batch_sharding(mesh: Mesh | None) -> Any:
    """Of an array [batch, …] over the data axis; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(DATA if axis_size(mesh, DATA) > 1 else None))


def fetched(tree: Any) -> Any:
    """Small arrays in host memory, of all processes alike."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            assert isinstance(leaf.sharding, NamedSharding)
            leaf = _replicate(leaf.sharding.mesh)(leaf)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def _replicate(mesh: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))


def put(value: Any, sharding: NamedSharding) -> jax.Array:
    """An array where it shall lie. From host memory each device is given its own part."""
    if isinstance(value, jax.Array) and not (several() and value.is_fully_addressable):
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        words = put(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(value))
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _cut(
    shape: Sequence[int], mesh: Mesh | AbstractMesh, candidates: Sequence[int], axes: Sequence[str]
) -> NamedSharding:
    """Along the first of the candidates that divides, over all of `axes`, else over one."""
    there = tuple(axis for axis in axes if axis_size(mesh, axis) > 1)
    if len(shape) >= 2:
        for over in dict.fromkeys((there, *((axis,) for axis in reversed(there)))):
            for axis in candidates if over else ():
                if shape[axis] % axis_size(mesh, *over) == 0:
                    cut: list[Any] = [None] * len(shape)
                    cut[axis] = over[0] if len(over) == 1 else over
                    return NamedSharding(mesh, PartitionSpec(*cut))
    return NamedSharding(mesh, PartitionSpec())
