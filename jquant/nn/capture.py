"""What layers of a module read when it runs: capture, and replay, which runs on from inputs captured before.

    inputs = capture(block, ("attn.o_proj",), arguments)                      # runs what comes before o_proj
    inputs = capture(block, ("mlp.down_proj",), arguments, replay=inputs)     # runs on from o_proj
    output = replay_output(block, arguments, replay=inputs)

A layer whose input is replayed does not look at what the module computes for it, so the compiler drops that part. Going
through a block layer after layer costs one pass instead of one for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal
from jax.typing import DTypeLike

from jquant.core.errors import InputError
from jquant.nn.linear import Linear
from jquant.nn.structure import Structure, structure_of
from jquant.nn.surgery import Path, module_at, replace

Arguments = tuple[Any, ...]  # arrays and pytrees that a module is called with
Inputs = Mapping[Path, tuple[Arguments, ...]]  # of each captured module what it was called with, call by call


@runtime_checkable
class Multiplies(Protocol):
    """A module that multiplies what its linear layers give, as attention does."""

    factors: DTypeLike | None  # what the factors of its products are rounded to; None: as they are


def capture(
    module: nnx.Module,
    paths: Sequence[Path],
    arguments: Arguments,
    *,
    replay: Inputs | None = None,
    narrow: Sequence[Path] = (),
) -> dict[Path, tuple[Arguments, ...]]:
    """Runs the module as far as needed and returns what the modules at `paths` are called with.

    Args:
        module: a block; modules of equal structure share one compiled program.
        paths: dotted, within the module.
        arguments: of the call.
        replay: inputs that some modules take in place of those that the call would give them.
        narrow: linear layers (`Linear`) that round both factors of their product to bfloat16 where it is of float32;
            its sums, and what it gives, stay float32. What they are called with is returned rounded. So does attention
            (`Multiplies`) all of whose layers are named.

    Raises:
        InputError: a path names no module, or one that is not called.
    """
    return capturing(module, paths, narrow=narrow)(arguments, replay or {})


def capturing(
    module: nnx.Module, paths: Sequence[Path], *, narrow: Sequence[Path] = ()
) -> Callable[[Arguments, Inputs], dict[Path, tuple[Arguments, ...]]]:
    """`capture` of many arguments: the module, as it is now, is taken apart once, which takes longer than a call."""
    structure, leaves = _taken_apart(module, narrow)
    return lambda arguments, replay: _capture(structure, tuple(paths), tuple(narrow), leaves, arguments, dict(replay))


def replay_output(module: nnx.Module, arguments: Arguments, *, replay: Inputs) -> Any:
    """module(*arguments) where the modules that `replay` names take their inputs from there."""
    return replaying(module)(arguments, replay)


def replaying(module: nnx.Module, *, narrow: Sequence[Path] = ()) -> Callable[[Arguments, Inputs], Any]:
    """`replay_output` of many arguments, as `capturing`."""
    structure, leaves = _taken_apart(module, narrow)
    return lambda arguments, replay: _replay_output(structure, tuple(narrow), leaves, arguments, dict(replay))


def traced_capture(
    module: nnx.Module, paths: Sequence[Path], arguments: Arguments, *, replay: Inputs, narrow: Sequence[Path] = ()
) -> Any:
    """The program of `capture`, to be compiled beforehand; what is replayed may be abstract."""
    structure, leaves = _taken_apart(module, narrow)
    return _capture.trace(structure, tuple(paths), tuple(narrow), leaves, arguments, dict(replay))


def traced_output(module: nnx.Module, arguments: Arguments, *, replay: Inputs, narrow: Sequence[Path] = ()) -> Any:
    """That of `replay_output`."""
    structure, leaves = _taken_apart(module, narrow)
    return _replay_output.trace(structure, tuple(narrow), leaves, arguments, dict(replay))


def _taken_apart(module: nnx.Module, narrow: Sequence[Path] = ()) -> tuple[Structure, list[Any]]:
    """Structure and arrays, where narrow layers' weights are rounded already: once, and not at every call.

    A weight that a narrow layer shares with another one is rounded for both.
    """
    graphdef, state = nnx.split(module)
    weights = tuple(f"{path}.weight." for path in narrow if isinstance(module_at(module, path), Linear))

    def is_rounded(keys: Any, leaf: Any) -> bool:
        inside = ".".join([*_names(keys), ""]).startswith(weights)
        return inside and getattr(leaf, "dtype", None) == jnp.float32  # a state may hold plain numbers

    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    found = structure_of(graphdef, tree)
    chosen = [is_rounded(keys, leaf) for keys, leaf in leaves]
    wide = [leaf for (_, leaf), is_chosen in zip(leaves, chosen, strict=True) if is_chosen]
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in wide)
    rounded = iter(jax.eval_shape(_to_bfloat16, wide) if abstract else _to_bfloat16(wide))
    return found, [next(rounded) if is_chosen else leaf for (_, leaf), is_chosen in zip(leaves, chosen, strict=True)]


@jax.jit
def _to_bfloat16(weights: list[jax.Array]) -> list[jax.Array]:
    return [weight.astype(jnp.bfloat16) for weight in weights]


def unread(module: nnx.Module, paths: Sequence[Path], arguments: Arguments, *, replay: Inputs) -> tuple[Path, ...]:
    """The layers of `paths` whose weights `replay_output` does not read: what they lead to is replayed further on.

    Nothing is computed. Modules, arguments and replayed inputs may be abstract.
    """
    structure, leaves = _taken_apart(module)
    shapes, tree = jax.tree.flatten(jax.tree.map(_shape_of, (leaves, arguments, dict(replay))))
    return _unread(structure, tuple(paths), tuple(shapes), tree)


def _shape_of(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x


@lru_cache(maxsize=256)  # asked for after every layer, and the same of blocks of equal structure
def _unread(structure: Structure, paths: tuple[Path, ...], shapes: tuple[Any, ...], tree: Any) -> tuple[Path, ...]:
    leaves, arguments, replay = jax.tree.unflatten(tree, shapes)
    jaxpr = _replay_output.trace(structure, (), leaves, arguments, replay).jaxpr.jaxpr
    read = {variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    for equation in reversed(jaxpr.eqns):
        if not read.isdisjoint(equation.outvars):
            read.update(variable for variable in equation.invars if not isinstance(variable, Literal))
    of_layers: dict[Path, list[Any]] = {path: [] for path in paths}
    named = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(structure.tree, leaves))
    for (keys, _), variable in zip(named, jaxpr.invars, strict=False):  # the module's are the first
        names = _names(keys)
        for at in range(len(names)):
            if (path := ".".join(names[:at])) in of_layers:
                of_layers[path].append(variable)
    return tuple(path for path, variables in of_layers.items() if variables and read.isdisjoint(variables))


def _names(keys: Any) -> list[str]:
    """Of a leaf of a state: those of the modules it lies in, and its own."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in keys]


def input_groups(module: nnx.Module, paths: Sequence[Path], arguments: Arguments) -> tuple[tuple[Path, ...], ...]:
    """The paths in the order of their first call; those that read the very same arrays stand together.

    Nothing is computed. Arguments may be `jax.ShapeDtypeStruct`s.

    Raises:
        InputError: a path names no module, or one that is not called.
    """
    structure, leaves = _taken_apart(module)
    groups = _input_groups.eval_shape(structure, tuple(paths), leaves, arguments)
    return tuple(tuple(path for one in group for path in one) for group in groups)


@partial(jax.jit, static_argnums=(0, 1))  # never run: modules of equal structure are traced once
def _input_groups(
    structure: Structure, paths: tuple[Path, ...], leaves: list[Any], arguments: Arguments
) -> list[list[dict[Path, tuple[()]]]]:
    """The groups in the structure of the result, which holds no array."""
    groups: dict[tuple[int, ...], list[dict[Path, tuple[()]]]] = {}
    for path, calls in _record(structure, leaves, paths, arguments, {})[1].items():
        groups.setdefault(tuple(id(call[0]) for call in calls), []).append({path: ()})
    return list(groups.values())


@partial(jax.jit, static_argnums=(0, 1, 2))
def _capture(
    structure: Structure,
    paths: tuple[Path, ...],
    narrow: tuple[Path, ...],
    leaves: list[Any],
    arguments: Arguments,
    replay: dict[Path, tuple[Arguments, ...]],
) -> dict[Path, tuple[Arguments, ...]]:
    tape = _record(structure, leaves, paths, arguments, replay, narrow)[1]
    return {path: tuple(tape[path]) for path in paths}


def _in_dtype_of(x: Any, like: Any) -> Any:
    return x.astype(like.dtype) if isinstance(x, jax.Array) and isinstance(like, jax.Array) else x


def _rounded(call: Arguments) -> Arguments:
    """Half the memory, and the same factors of products."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, call)


@partial(jax.jit, static_argnums=(0, 1))
def _replay_output(
    structure: Structure,
    narrow: tuple[Path, ...],
    leaves: list[Any],
    arguments: Arguments,
    replay: dict[Path, tuple[Arguments, ...]],
) -> Any:
    return _record(structure, leaves, (), arguments, replay, narrow)[0]


def _record(
    structure: Structure,
    leaves: Sequence[Any],
    paths: Sequence[Path],
    arguments: Arguments,
    replay: Mapping[Path, tuple[Arguments, ...]],
    narrow: Sequence[Path] = (),
) -> tuple[Any, dict[Path, list[Arguments]]]:
    """Output and calls, under a trace: the module is a fresh one, so taps may stand in it."""
    module, tape = structure.merge(leaves), _Tape(replay)
    linear = {path: layer for path in narrow if isinstance(layer := module_at(module, path), Linear)}
    _narrow_between(module, linear)
    replace(module, {path: _Narrow(layer) for path, layer in linear.items()})
    taps = {path: _Tap(module_at(module, path), path, tape) for path in dict.fromkeys((*paths, *replay))}
    # Inner modules first: a path through a replaced parent would lead into the tap.
    for path in sorted(taps, key=lambda path: -path.count(".")):
        replace(module, {path: taps[path]})
    output = module(*arguments)  # pyright: ignore[reportCallIssue]
    for path in paths:
        if path not in tape.calls:
            raise InputError(
                f"layer {path} was not called when the model ran: leave it out, or name it by another rule"
            )
    calls = {path: tape.calls[path] for path in tape.calls if path in paths}
    return output, {path: [_rounded(call) for call in each] if path in linear else each for path, each in calls.items()}


def _narrow_between(module: nnx.Module, linear: Mapping[Path, Linear]) -> None:
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in linear):
        around = module_at(module, parent) if parent else module
        layers = [layer for layer in vars(around).values() if isinstance(layer, Linear)]
        if isinstance(around, Multiplies) and all(any(layer is one for one in linear.values()) for layer in layers):
            around.factors = jnp.bfloat16


class _Tape:
    """Calls of one run, in order."""

    def __init__(self, replay: Mapping[Path, tuple[Arguments, ...]]) -> None:
        self.calls: dict[Path, list[Arguments]] = {}
        self.replay = replay

    def passed(self, path: Path, arguments: Arguments) -> Arguments:
        calls = self.calls.setdefault(path, [])
        calls.append(arguments)
        if path not in self.replay:
            return arguments
        # What was captured may be rounded: the module computes in the dtype that it would be given.
        return jax.tree.map(_in_dtype_of, self.replay[path][len(calls) - 1], arguments)


class _Narrow(nnx.Module):
    """A linear layer in float32 whose product has factors of bfloat16."""

    def __init__(self, layer: Linear) -> None:
        self.layer = layer

    def __call__(self, x: jax.Array, *, dtype: DTypeLike | None = None) -> jax.Array:
        if x.dtype != jnp.float32:
            return self.layer(x, dtype=dtype)
        return self.layer(x.astype(jnp.bfloat16), dtype=jnp.float32 if dtype is None else dtype)


class _Tap(nnx.Module):
    """Stands in the place of a module and notes what it is called with."""

    def __init__(self, module: nnx.Module, path: Path, tape: _Tape) -> None:
        self.module, self.path, self.tape = module, path, tape

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*self.tape.passed(self.path, arguments), **options)  # pyright: ignore[reportCallIssue]
