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
    prompt_runs: tuple[Part, ...]  # of neighbouring blocks: tuples of both
    token_runs: tuple[Part, ...]  # likewise, longer ones
    head: Part
    cache_place: NamedSharding | None  # of keys and values, on a mesh

    def runs(self, tokens: int) -> tuple[Part, ...]:
        """Those that so many tokens at once go through."""
        return self.token_runs if tokens == 1 else self.prompt_runs


def split(model: Decoder) -> Split:
    """Embedding, runs of blocks, and head."""
    blocks = [part_of(block) for block in model.blocks]
    for_prompts, for_tokens = longest_runs()
    return Split(
        config=model.config,
        embed=part_of(model.embed),
        prompt_runs=_in_runs(blocks, for_prompts),
        token_runs=_in_runs(blocks, for_tokens),
        head=part_of(model.head),
        cache_place=cache_place(model),
    )


def part_of(module: nnx.Module) -> Part:
    """One module."""
    return Part(*taken_apart(module))


def longest_runs() -> tuple[int, int]:
    """Blocks in one program at most, where it reads a piece of a prompt, and where it goes on by a token.

    To start a program takes a host longer than a GPU computes a token in a block, and to compile a long one takes long:
    a piece of a prompt hides more of the start. scripts/bench_gpu.py has figures. On CPU one block a program is as fast
    as any.
    """
    return (1, 1) if on_cpu() else (4, 8)


def _in_runs(blocks: list[Part], longest: int) -> tuple[Part, ...]:
    """Of one length, of which one program is compiled, unless that is half of the longest or less."""
    equal = (length for length in range(longest, longest // 2, -1) if len(blocks) % length == 0)
    count = -(-len(blocks) // next(equal, longest))
    runs = [blocks[start:end] for start, end in itertools.pairwise(np.linspace(0, len(blocks), count + 1).astype(int))]
    return tuple(Part(tuple(b.module for b in run), tuple(b.leaves for b in run)) for run in runs)


def cache_place(model: Decoder) -> NamedSharding | None:
    """Where keys and values [batch, heads, …] lie: heads as the rows of the layers that make them; None off a mesh."""
    mesh, heads = mesh_of(model), model.config.num_kv_heads
    if mesh is None:
        return None
    fitting = [axes for axes in (CUTTING, *((axis,) for axis in CUTTING)) if heads % axis_size(mesh, *axes) == 0]
    largest = max(fitting, key=lambda axes: axis_size(mesh, *axes), default=())
    there = tuple(axis for axis in largest if axis_size(mesh, axis) > 1)
    return NamedSharding(mesh, PartitionSpec(None, there) if there else PartitionSpec())
