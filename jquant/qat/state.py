"""What a training step takes and gives: trained parameters by path, and the variables that the forward pass changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from jquant.core.errors import InputError
from jquant.nn.fake_quant import FakeQuantModule, FakeQuantParam
from jquant.nn.qat_layers import QATTable
from jquant.nn.surgery import Path, select

MATRICES, VECTORS, QUANTIZATION = "matrices", "vectors", "quantization"  # groups of the optimizer


class TrainState(NamedTuple):
    """Everything that a step changes."""

    trained: dict[Path, Array]  # float32 masters
    rest: Any  # running ranges, random streams, statistics: state of variables that are no Param
    optimizer: Any


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A model without its arrays; static under jit."""

    graphdef: nnx.GraphDef
    names: tuple[Path, ...]
    treedef: Any  # of the trained parameters' state
    masters: frozenset[Path]  # parameters of layers that cast themselves

    def computing(self, trained: dict[Path, Array], dtype: DTypeLike) -> dict[Path, Array]:
        """The parameters in the dtype of computation; those of layers that quantize, which cast, as they are."""
        return {name: array if name in self.masters else cast(array, dtype) for name, array in trained.items()}

    def merge(self, trained: dict[Path, Array], fixed: Any, rest: Any) -> nnx.Module:
        """The model with these arrays."""
        # Without a copy the variables of `rest` would be those of the surrounding trace, which may not change.
        return nnx.merge(self.graphdef, self.state(trained), fixed, rest, copy=True)

    def state(self, trained: dict[Path, Array]) -> Any:
        """The trained parameters as a state that `nnx.update` takes."""
        return jax.tree.unflatten(self.treedef, [trained[name] for name in self.names])


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model taken apart."""

    structure: Structure
    trained: dict[Path, Array]
    fixed: Any  # parameters that are not trained, in the dtype of computation
    rest: Any
    groups: dict[Path, str] = field(repr=False)  # of the trained parameters


def split(model: nnx.Module, *, frozen: tuple[str, ...] = (), dtype: DTypeLike = jnp.float32) -> Parts:
    """Takes a model apart. Arrays are shared with it: copy what a step will donate.

    Args:
        model: any NNX module, prepared.
        frozen: patterns of parameters that are not trained.
        dtype: of computation.

    Raises:
        InputError: a pattern matches nothing, or nothing is left to train.
    """
    params = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    floats = [name for name, variable in params.items() if jnp.issubdtype(variable.get_value().dtype, jnp.floating)]
    chosen = frozenset(floats) - frozenset(select(list(params), frozen))
    if not chosen:
        raise InputError(f"no parameter is left to train: the model has {len(params)}, frozen are {list(frozen)}")

    def is_trained(path: tuple[Any, ...], variable: Any) -> bool:
        return isinstance(variable, nnx.Param) and ".".join(map(str, path)) in chosen

    graphdef, state, fixed, rest = nnx.split(model, is_trained, nnx.Param, ...)
    names = tuple(".".join(map(str, path)) for path, _ in nnx.to_flat_state(state))
    leaves, treedef = jax.tree.flatten(state)
    masters = _masters(model)
    groups = {name: _group(params[name]) for name in names}
    structure = Structure(
        graphdef=graphdef, names=names, treedef=treedef, masters=frozenset(name for name in names if name in masters)
    )
    fixed_names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(fixed)]
    fixed_leaves, fixed_def = jax.tree.flatten(fixed)
    fixed = jax.tree.unflatten(
        fixed_def,
        [leaf if name in masters else cast(leaf, dtype) for name, leaf in zip(fixed_names, fixed_leaves, strict=True)],
    )
    trained = dict(zip(names, leaves, strict=True))
    return Parts(structure=structure, trained=trained, fixed=fixed, rest=rest, groups=groups)


def cast(array: Any, dtype: DTypeLike) -> Any:
    """The array in `dtype` where it holds floats; others as they are."""
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _group(variable: Any) -> str:
    if isinstance(variable, FakeQuantParam):
        return QUANTIZATION
    return MATRICES if variable.get_value().ndim >= 2 else VECTORS


def _masters(model: nnx.Module) -> set[Path]:
    """Parameters of modules that quantize: they hold float32 and cast to the dtype of what they are called with.

    A table is not called with floats: its own dtype is that of the states it gives.
    """
    found: set[Path] = set()
    for path, module in nnx.iter_graph(model):
        if isinstance(module, FakeQuantModule):
            found |= {".".join(map(str, (*path, *inner))) for inner, _ in nnx.to_flat_state(nnx.state(module))}
    tables = {".".join(map(str, path)) for path, module in nnx.iter_graph(model) if isinstance(module, QATTable)}
    return found - {f"{path}.table" for path in tables}
