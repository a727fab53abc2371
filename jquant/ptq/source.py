"""Where a pipeline takes blocks from: a model in memory, or a checkpoint that loads them one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import nnx

from jquant.nn.matrices import layer_shapes
from jquant.nn.protocol import CausalLM, Equivalence
from jquant.nn.surgery import Path


class Source(Protocol):
    """A decoder in parts. Blocks come as modules of their own that the pipeline may change."""

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        ...

    def shapes(self) -> Mapping[Path, tuple[int, ...]]:
        """Of the weight matrices of all layers, in the order of the model, `embed` among them."""
        ...

    def outer(self) -> Any:
        """What has `embed` and `head`; its other parts may be missing."""
        ...

    def block(self, index: int) -> nnx.Module: ...

    def contexts(self, length: int) -> Sequence[Any]: ...

    def equivalences(self) -> Sequence[Equivalence]: ...


class ModelSource:
    """The blocks of a model in memory, as copies that share its arrays: changing them leaves the model as it is."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    def shapes(self) -> Mapping[Path, tuple[int, ...]]:
        return layer_shapes(self.model)

    def outer(self) -> CausalLM:
        return self.model

    def block(self, index: int) -> nnx.Module:
        return share(self.model.blocks[index])

    def contexts(self, length: int) -> Sequence[Any]:
        return self.model.contexts(length)

    def equivalences(self) -> Sequence[Equivalence]:
        return self.model.equivalences()


def share(module: nnx.Module) -> nnx.Module:
    """A second module over the same arrays, whose weights can be replaced without touching the first."""
    graphdef, state = nnx.split(module)
    # `merge` would put the first module's own Variables into the second; the map makes new ones around the same arrays.
    return nnx.merge(graphdef, jax.tree.map(lambda array: array, state))
