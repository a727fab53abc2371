"""A decoder taken apart once, so that its parts can be run for every token; NNX's states take Python long to flatten.

parts = split(model)
x = parts.embed.module.merge(parts.embed.leaves)(tokens)        under jit: module static, leaves arrays
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jquant.kernels.dispatch import on_cpu
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.nn.mesh import axis_size, mesh_of
from jquant.nn.placement import CUTTING
from jquant.nn.structure import taken_apart

Leaves = tuple[Array, ...]


class Part(NamedTuple):
    """What is compiled, and what it is given: plain arrays, because states take Python long to flatten."""

    module: Any  # a Structure, or several
    leaves: Any


@dataclass(frozen=True, kw_only=True)
class Split:
    """A decoder taken apart once: its parts are run for every token."""

    config: ModelConfig
    embed: Part
    runs: tuple[Part, ...]  # of neighbouring blocks: tuples of both
    head: Part
    cache_place: NamedSharding | None  # of keys and values, on a mesh


def split(model: Decoder) -> Split:
    """Embedding, runs of blocks, and head."""
    blocks = [part_of(block) for block in model.blocks]
    cuts = np.linspace(0, len(blocks), -(-len(blocks) // run_length()) + 1).astype(int)
    runs = [blocks[start:end] for start, end in itertools.pairwise(cuts)]
    return Split(
        config=model.config,
        embed=part_of(model.embed),
        runs=tuple(Part(tuple(b.module for b in run), tuple(b.leaves for b in run)) for run in runs),
        head=part_of(model.head),
        cache_place=cache_place(model),
    )


def part_of(module: nnx.Module) -> Part:
    """One module."""
    return Part(*taken_apart(module))


def run_length() -> int:
    """Blocks in one program. To start a program takes a host longer than a GPU computes a token in a block.

    On an H100, SmolLM2's token took 10.9 ms in runs of 1, 8.2 in runs of 5, and 8.0 in one program of all 30, which
    takes 9 s to compile where runs of 5 take 2.5; on CPU one block a program is as fast as any.
    """
    return 1 if on_cpu() else 5


def cache_place(model: Decoder) -> NamedSharding | None:
    """Where keys and values [batch, heads, …] lie: heads as the rows of the layers that make them; None off a mesh."""
    mesh, heads = mesh_of(model), model.config.num_kv_heads
    if mesh is None:
        return None
    fitting = [axes for axes in (CUTTING, *((axis,) for axis in CUTTING)) if heads % axis_size(mesh, *axes) == 0]
    largest = max(fitting, key=lambda axes: axis_size(mesh, *axes), default=())
    there = tuple(axis for axis in largest if axis_size(mesh, axis) > 1)
    return NamedSharding(mesh, PartitionSpec(None, there) if there else PartitionSpec())
