"""A module apart from its arrays, as the static argument of a jitted function.

NNX's own description of a module is hashed and compared node by node, at every call of a function that has it for an
argument: for every token in every block. Here equal ones are one object, told by its identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
from flax import nnx


class Structure:
    """What a module is without its arrays. Only `structure_of` and `taken_apart` make them: equal ones are one."""

    def __init__(self, graphdef: nnx.GraphDef, tree: Any) -> None:
        self.graphdef, self.tree = graphdef, tree

    def merge(self, leaves: Sequence[Any]) -> Any:
        """The module with these arrays."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.tree, leaves))


@cache
def structure_of(graphdef: nnx.GraphDef, tree: Any) -> Structure:
    """Of what `nnx.split` gives, and `jax.tree.flatten` of its state."""
    return Structure(graphdef, tree)


def taken_apart(module: nnx.Module) -> tuple[Structure, tuple[Any, ...]]:
    """Structure and arrays."""
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    return structure_of(graphdef, tree), tuple(leaves)
