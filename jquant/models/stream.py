"""A checkpoint whose blocks are loaded one at a time: the source of a pipeline that never holds the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jquant.models.checkpoint import Checkpoint
from jquant.models.decoder import Context, Decoder
from jquant.nn.matrices import layer_shapes
from jquant.nn.protocol import Equivalence


class StreamedModel:
    """See `jquant.ptq.source.Source`. What was handed out is the caller's; nothing is kept."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> None:
        """
        Raises:
            InputError: a tensor is missing or left over.
        """
        self.checkpoint, self.dtype, self.mesh = checkpoint, dtype, mesh
        self.abstract = checkpoint.abstract(dtype=dtype)

    @property
    def depth(self) -> int:
        return self.checkpoint.config.num_layers

    def outer(self) -> Decoder:
        """Embedding and head, without blocks."""
        outer = nnx.clone(self.abstract)
        outer.blocks = nnx.List([])
        self.checkpoint.load(outer, dtype=self.dtype, mesh=self.mesh)
        return outer

    def block(self, index: int) -> nnx.Module:
        block = nnx.clone(self.abstract.blocks[index])
        self.checkpoint.load(block, prefix=f"blocks.{index}.", dtype=self.dtype, mesh=self.mesh)
        return block

    def contexts(self, length: int) -> Sequence[Context]:
        return self.abstract.contexts(length)

    def equivalences(self) -> Sequence[Equivalence]:
        return self.abstract.equivalences()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return layer_shapes(self.abstract)
