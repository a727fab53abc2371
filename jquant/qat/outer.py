"""Embedding and output projection of a model whose parameters are cut over "fsdp": looked up and multiplied in parts.

A device holds a part of every row of the table. It looks that part up for the tokens of all devices and is sent the
rest of its own tokens' rows. Of the output projection it holds some rows, those of its part of the vocabulary: it is
sent the states of all devices' tokens and makes their logits for that part, over which the loss is then summed. A
vocabulary that does not divide stays whole: then it holds some columns. Tokens, states and logits travel, and no device
ever holds a table.

Reference: Shoeybi et al., Megatron-LM, 1909.08053, section 3 (the vocabulary in parts, and the loss over them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jquant.nn.mesh import DATA, FSDP, axis_size
from jquant.nn.placement import CUTTING


def embedded(
    embed: Callable[[Int[Array, "batch time"]], Float[Array, "batch time hidden"]], tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time hidden"]:
    """embed(tokens), inside a trace."""
    mesh = _cutting_mesh()
    if mesh is None:
        return embed(tokens)
    x = embed(_lie(tokens, mesh, _there(mesh, (DATA,))))
    cut = _there(mesh, CUTTING)
    if x.shape[-1] % axis_size(mesh, *cut) == 0:
        x = _lie(x, mesh, _there(mesh, (DATA,)), None, cut)
    return _lie(x, mesh, _there(mesh, (DATA, FSDP)))


def by_rows(params: Any) -> Any:
    """Parameters of a head, matrices cut along their rows; where these do not divide, along their columns."""
    mesh = _cutting_mesh()
    if mesh is None:
        return params

    vocabulary = _vocabulary(params)

    def place(leaf: Array) -> Array:
        if leaf.ndim != 2:
            return leaf
        rows = _dividing(leaf.shape[0], mesh)
        columns = () if rows or leaf.shape[0] != vocabulary else _dividing(leaf.shape[1], mesh)
        return _lie(leaf, mesh, rows, columns)

    return jax.tree.map(place, params)


def gathered_states(states: Float[Array, "batch time hidden"], params: Any) -> Float[Array, "batch time hidden"]:
    """What enters a head whose `params` `by_rows` has cut: of the tokens of all devices that "fsdp" spreads.

    All of a state; where the head is cut along its columns, those of the device.
    """
    mesh = _cutting_mesh()
    if mesh is None:
        return states
    columns = () if _dividing(_vocabulary(params), mesh) else _dividing(states.shape[-1], mesh)
    return _lie(states, mesh, _there(mesh, (DATA,)), None, columns)


def in_parts(logits: Float[Array, "batch time vocab"]) -> Float[Array, "batch time vocab"]:
    """What comes of it: each device keeps its part of the vocabulary, or, where that does not divide, of the tokens.

    In the latter case it has logits of all of them, to which its columns of the projection add: sums of all devices.
    """
    mesh = _cutting_mesh()
    if mesh is None:
        return logits
    rows = _dividing(logits.shape[-1], mesh)
    logits = _lie(logits, mesh, _there(mesh, (DATA,)), None, rows)
    return logits if rows else _lie(logits, mesh, _there(mesh, (DATA, FSDP)))


def _cutting_mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and mesh.shape.get(FSDP, 1) > 1 else None


def _vocabulary(params: Any) -> int:
    """Rows of the projection; trained scales of it may have fewer."""
    return max((leaf.shape[0] for leaf in jax.tree.leaves(params) if leaf.ndim == 2), default=1)


def _there(mesh: AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis_size(mesh, axis) > 1)


def _dividing(size: int, mesh: AbstractMesh) -> tuple[str, ...]:
    """Over which axes so many rows or columns are cut: over none where they do not divide."""
    cut = _there(mesh, CUTTING)
    return cut if size % math.prod(axis_size(mesh, axis) for axis in cut) == 0 else ()


def _lie(array: Array, mesh: AbstractMesh, *axes: tuple[str, ...] | None) -> Array:
    spec = PartitionSpec(*(each or None for each in axes))
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))
