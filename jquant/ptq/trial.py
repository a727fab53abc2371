"""Trials: how far a module's output moves when some of its layers are replaced, for each of many candidates.

    error(c) = Σ ‖f_c(x) − f(x)‖² / Σ ‖f(x)‖²        over the captured calls of the module

All candidates and calls run in one compiled program, which serves every block of equal structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jquant.core.errors import InputError
from jquant.core.scheme import Scheme
from jquant.nn.protocol import Equivalence
from jquant.nn.surgery import Path, module_at, replace
from jquant.ptq.cost import Cost, Load, Shape, rounding

Arguments = tuple[Any, ...]
Make = Callable[[Any, Array, Any], nnx.Module]  # a float layer, a candidate's scales, options: what takes its place


class Outline(NamedTuple):
    """What a transform will try candidates on, by shapes alone."""

    places: Sequence[Equivalence]
    shapes: Mapping[Path, Shape]  # of all layers of the block
    schemes: Mapping[Path, Scheme]  # of the weights of the layers that ask for the transform
    rounded: Collection[Path]  # those whose solver rounds each weight for itself
    load: Load

    def consumers(self, place: Equivalence) -> list[Shape]:
        return [self.shapes[path] for path in place.consumers]

    def rounding(self, place: Equivalence) -> Cost:
        """Of its consumers' weights, once."""
        return sum((rounding(self.shapes[path], self.schemes[path]) for path in place.consumers), Cost())

    def output(self, place: Equivalence, tokens: int) -> Cost:
        """Of the parent's output on the calls that `some_inputs` takes."""
        inside = [shape for path, shape in self.shapes.items() if f"{path}.".startswith(f"{place.parent}.")]
        rows = self.load.batch * self.load.window
        taken = rows * len(spread_evenly(self.load.windows // self.load.batch, rows, tokens))
        attends = place.parent not in place.consumers and any(path.endswith("q_proj") for path in place.consumers)
        return Cost(operations=taken * self.load.passing(inside, attends=attends))


def output_errors(
    block: nnx.Module,
    place: Equivalence,
    inputs: Sequence[Arguments],
    scales: Float[Array, "candidates *experts channels"],
    make: Make,
    options: Mapping[Path, Any],
    masks: Sequence[Bool[Array, "*batch"]] = (),
) -> Float[Array, " candidates"]:
    """Relative errors of the output of a place's parent.

    Args:
        block: float; left as it is.
        place: whose parent is run, and whose consumers are replaced.
        inputs: what the parent was called with, calls of equal shapes.
        scales: one set a candidate.
        make: a function at module level, since compiled programs are found by it.
        options: of `make`, hashable, by path of a consumer; consumers that are not named stay as they are.
        masks: of each call the rows that count, or none at all; the others are zeros then, and their outputs no errors.

    Raises:
        InputError: there are no inputs, or they differ in shape.
    """
    if not inputs:
        raise InputError(f"{place.parent}: no captured inputs to try candidates on; calibrate with at least one window")
    if len({str(jax.tree.map(jnp.shape, call)) for call in inputs}) > 1:
        raise InputError(f"{place.parent}: captured inputs differ in shape; calibrate with windows of one length")
    graphdef, state = nnx.split(module_at(block, place.parent))
    inner = tuple((path[len(place.parent) + 1 :], option) for path, option in options.items())
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    counts = jnp.stack(masks)[..., None] if masks else None
    if counts is not None:
        x, *others = stacked
        stacked = (jnp.where(counts, x, jnp.zeros((), x.dtype)), *others)
    return _output_errors(graphdef, make, inner, state, scales, stacked, counts)


def some_inputs(
    inputs: Sequence[Arguments], masks: Sequence[Array], tokens: int
) -> tuple[list[Arguments], list[Array]]:
    """As many calls, spread evenly, as hold `tokens` rows of their first argument, at least one, and their masks."""
    if not inputs:
        return [], []
    chosen = spread_evenly(len(inputs), math.prod(inputs[0][0].shape[:-1]), tokens)
    return [inputs[index] for index in chosen], [masks[index] for index in chosen] if masks else []


def spread_evenly(calls: int, rows: int, tokens: int) -> list[int]:
    """Which of so many calls to take, each of so many rows, to have about `tokens` of them; at least one."""
    count = min(calls, max(1, tokens // max(1, rows)))
    return [index * calls // count for index in range(count)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _output_errors(
    graphdef: nnx.GraphDef,
    make: Make,
    options: tuple[tuple[Path, Any], ...],
    state: nnx.State,
    scales: Array,
    inputs: Arguments,
    counts: Array | None,
) -> Array:
    expected = jax.lax.map(lambda call: _wide(nnx.merge(graphdef, state)(*call)), inputs)
    if counts is not None:
        expected = jnp.where(counts, expected, 0.0)

    def error(candidate: Array) -> Array:
        made_graphdef, made_state = nnx.split(_with_layers(nnx.merge(graphdef, state), candidate, make, options))

        def one_call(total: Array, call: tuple[Arguments, Array, Array | None]) -> tuple[Array, None]:
            arguments, wanted, count = call
            difference = _wide(nnx.merge(made_graphdef, made_state)(*arguments)) - wanted
            difference = difference if count is None else jnp.where(count, difference, 0.0)
            return total + jnp.sum(difference * difference), None

        return jax.lax.scan(one_call, jnp.float32(0), (inputs, expected, counts))[0]

    return jax.lax.map(error, scales) / jnp.sum(expected * expected)


def _with_layers(module: Any, candidate: Array, make: Make, options: tuple[tuple[Path, Any], ...]) -> Any:
    if options[0][0] == "":  # the parent is the layer itself
        return make(module, candidate, options[0][1])
    replace(module, {path: make(module_at(module, path), candidate, option) for path, option in options})
    return module


def _wide(output: Array) -> Array:
    return output.astype(jnp.float32)
