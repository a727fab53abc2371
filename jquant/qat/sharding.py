"""Where a training state lies on a mesh: rows of data over all axes, parameters and their moments over "fsdp"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jquant.core.errors import InputError
from jquant.nn.surgery import Path

DATA, FSDP = "data", "fsdp"

# Which axis of a parameter is cut, by its path, counted from the end; the first rule that fits decides. Where that axis
# does not divide, the first other axis that does is cut, and where none does the parameter is copied.
RULES: tuple[tuple[str, int], ...] = (
    (r"(^|\.)embed\.", -1),  # rows are looked up: cut along hidden, no device holds all of a token
    (r"", -2),  # W[out, in] along out; groups of a quantized weight lie along in, and stay whole
)


def make_mesh(spec: str) -> Mesh | None:
    """The mesh that `data=4,fsdp=2` describes; None for the empty text.

    Raises:
        InputError: an unknown axis, or more devices than there are.
    """
    if not spec:
        return None
    axes: dict[str, int] = {}
    for part in spec.split(","):
        found = re.fullmatch(rf"\s*({DATA}|{FSDP})\s*=\s*([1-9][0-9]*)\s*", part)
        if found is None or found[1] in axes:
            raise InputError(f"mesh {spec!r}: write {DATA}=N, {FSDP}=N or both, as {DATA}=4,{FSDP}=2")
        axes[found[1]] = int(found[2])
    wanted, there = int(np.prod(list(axes.values()))), jax.device_count()
    if wanted > there:
        raise InputError(f"mesh {spec!r} asks for {wanted} devices, there are {there}")
    devices = jax.devices()[:wanted]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def parameter_shardings(arrays: Mapping[Path, Any], mesh: Mesh) -> dict[Path, NamedSharding]:
    """Where each parameter lies."""
    return {name: NamedSharding(mesh, _spec(name, array.shape, mesh)) for name, array in arrays.items()}


def state_shardings(state: Any, parameters: Mapping[Path, NamedSharding], mesh: Mesh) -> Any:
    """Of any state that holds arrays by parameter path, as an optimizer's: those as the parameters, others copied."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        found = next((parameters[key] for key in reversed(keys) if key in parameters), None)
        if found is not None and len(found.spec) <= np.ndim(leaf):
            return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def spread_rows(batch: Any, mesh: Mesh | None) -> Any:
    """Leaves [microbatches, rows, …] on the devices, rows over all axes of the mesh.

    Raises:
        InputError: the rows do not divide by the devices.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)

    def put(leaf: Any) -> jax.Array:
        if leaf.shape[1] % mesh.size:
            raise InputError(f"a batch of {leaf.shape[1]} rows on {mesh.size} devices: choose a batch that divides")
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(None, mesh.axis_names)))

    return jax.tree.map(put, batch)


def _spec(name: Path, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    size = dict(mesh.shape).get(FSDP, 1)
    if size == 1 or len(shape) < 2:
        return PartitionSpec()
    wanted = next(axis for pattern, axis in RULES if re.search(pattern, name))
    for axis in (wanted, *range(-len(shape), 0)):
        if shape[axis] % size == 0:
            cut = [None] * len(shape)
            cut[axis] = FSDP  # type: ignore[call-overload]
            return PartitionSpec(*cut)
    return PartitionSpec()
