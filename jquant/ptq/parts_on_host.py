"""The parts of an array that this process's devices hold, and an array of such parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Begin = tuple[int, ...]  # where a part begins, along each axis


def parts_of(array: Any, *, once: bool = False) -> dict[Begin, np.ndarray]:
    """Every part by where it begins; with `once` those alone that no other process writes too."""
    if not isinstance(array, jax.Array):
        return {(0,) * np.ndim(array): np.asarray(array)}
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0 or not once]
    return {begin_of(shard.index): np.asarray(shard.data) for shard in shards}


def from_parts(shape: Sequence[int], sharding: Any, parts: Mapping[Begin, np.ndarray]) -> jax.Array:
    """The array whose parts these are; without a sharding there is one."""
    if sharding is None:
        return jax.device_put(next(iter(parts.values())))
    return jax.make_array_from_callback(tuple(shape), sharding, lambda index: parts[begin_of(index)])


def begin_of(index: Any) -> Begin:
    """Where the part with this index begins."""
    return tuple(0 if axis.start is None else int(axis.start) for axis in index)
