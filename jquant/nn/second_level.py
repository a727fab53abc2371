"""The second level of NVFP4's scales where layers share it.

    g = 448 · reach / max |W| over all of them        (SPEC 2)

Engines keep q, k and v as one matrix, and gate and up as another, with one g each: vLLM takes the largest of those it
finds and warns. So layers of one parent that read the same input get the same g; what each rounds to is then what it
would be as rows of that matrix. In training g follows the weights: qat/second_level.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jquant.core.scales import NestedScale
from jquant.core.scheme import Scheme
from jquant.nn.protocol import Equivalence
from jquant.nn.surgery import Path


def shared_levels(weights: Mapping[Path, Array], schemes: Mapping[Path, Scheme]) -> dict[Path, Float32[Array, "..."]]:
    """g of layers that share it, by path; others are left out.

    Args:
        weights: [..., out, in] of layers that read the same input.
        schemes: of them; only equal ones with a nested scale share.

    Returns:
        [..., 1, 1] each, one a matrix of a stack.
    """
    together: dict[tuple[Path, Scheme], list[Path]] = {}
    for path in weights:
        if isinstance(schemes[path].scale, NestedScale):
            together.setdefault((path.rpartition(".")[0], schemes[path]), []).append(path)
    found: dict[Path, Array] = {}
    for (_, scheme), paths in together.items():
        if len(paths) > 1:
            level: Array = _level(tuple(weights[path] for path in paths), scheme)
            found |= dict.fromkeys(paths, level)
    return found


def shared_levels_of_model(
    model: object, weights: Mapping[Path, Array], scheme: Scheme
) -> dict[Path, Float32[Array, "..."]]:
    """`shared_levels` of layers of a decoder, whose blocks tell what reads the same input; of other modules none."""
    found: dict[Path, Array] = {}
    if isinstance(scheme.scale, NestedScale):
        for paths in reading_together_in_model(model, list(weights)):
            found |= shared_levels({path: weights[path] for path in paths}, dict.fromkeys(paths, scheme))
    return found


def reading_together_in_model(model: object, paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """`reading_together` of those layers that are in blocks of a decoder."""
    equivalences = getattr(model, "equivalences", None)
    if equivalences is None:
        return []
    blocks: dict[Path, list[Path]] = {}
    for path in paths:
        if path.startswith("blocks."):
            prefix = ".".join(path.split(".")[:2]) + "."
            blocks.setdefault(prefix, []).append(path.removeprefix(prefix))
    return [
        tuple(prefix + path for path in group)
        for prefix, inside in blocks.items()
        for group in reading_together(inside, equivalences())
    ]


def reading_together(paths: Sequence[Path], places: Sequence[Equivalence]) -> list[tuple[Path, ...]]:
    """Layers of a block by what they read, as far as a family's places tell; each in one group, in the order given."""
    readers = {path: place.consumers for place in places for path in place.consumers}
    groups: dict[tuple[Path, ...], list[Path]] = {}
    for path in paths:
        groups.setdefault(readers.get(path, (path,)), []).append(path)
    return [tuple(group) for group in groups.values()]


@partial(jax.jit, static_argnames="scheme")
def _level(weights: tuple[Array, ...], scheme: Scheme) -> Array:
    assert isinstance(scheme.scale, NestedScale)
    peaks = [jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=(-2, -1), keepdims=True) for weight in weights]
    return scheme.scale.outer(jnp.max(jnp.stack(peaks), axis=0), scheme.element.reach)
