"""Where a pipeline takes blocks from: a model in memory, or a checkpoint that loads them one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import nnx

from jquant.core.errors import InputError
from jquant.nn.matrices import LAYERS, weight_shape
from jquant.nn.protocol import CausalLM, Equivalence
from jquant.nn.surgery import Path, named_modules


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


def layer_shapes(model: Any) -> dict[Path, tuple[int, ...]]:
    """Weight shapes of all float layers by path, `embed` last where the model has an embedding matrix."""
    shapes = {path: weight_shape(layer) for path, layer in float_layers(model)}
    embedding = getattr(getattr(model, "embed", None), "weight", None)
    if isinstance(embedding, nnx.Param):
        shapes["embed"] = tuple(embedding.get_value().shape)
    if not shapes:
        raise InputError("the model has no float linear layers: it is quantized already; start from the float model")
    return shapes


def float_layers(module: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """The layers that can be quantized, by path, in the order of the model."""
    return named_modules(module, LAYERS)


def share(module: nnx.Module) -> nnx.Module:
    """A second module over the same arrays, whose weights can be replaced without touching the first."""
    graphdef, state = nnx.split(module)
    # `merge` would put the first module's own Variables into the second; the map makes new ones around the same arrays.
    return nnx.merge(graphdef, jax.tree.map(lambda array: array, state))
