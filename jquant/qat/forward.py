"""A language model's pass for training: block by block, one trace for all equal blocks, recomputed if asked.

On a mesh whose "fsdp" cuts parameters, blocks are the turns of a loop: each gathers its own when it runs, and again in
the backward pass, and frees them. Written out one after another, XLA gathers all of them first and sums all gradients
last (CPU), whatever stands between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float, Int

from jquant.nn.mesh import FSDP, TENSOR
from jquant.nn.placement import state_shardings
from jquant.nn.protocol import CausalLM
from jquant.qat.outer import embedded

BLOCKS = "blocks"  # path of the modules whose parameters are gathered here
IN_PARTS = (BLOCKS, "embed", "head")  # of those that a step leaves cut: outer.py computes with parts of the others


def block_states(
    model: CausalLM, tokens: Int[Array, "batch time"], *, remat: bool
) -> list[Float[Array, "batch time hidden"]]:
    """The states behind each block; the last enters the head. Inside a trace; modules keep what they observed.

    Args:
        model: a decoder in three parts.
        tokens: of the whole windows.
        remat: keep only what enters each block, and compute the rest again in the backward pass.
    """
    x = embedded(model.embed, tokens)  # pyright: ignore[reportArgumentType]
    parts, contexts = [nnx.split(block, nnx.Param, ...) for block in model.blocks], model.contexts(tokens.shape[1])
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape.get(FSDP, 1) > 1:
        states, changed = _in_a_loop(parts, contexts, x, mesh, remat=remat)
    else:
        states, changed = _in_a_row(parts, contexts, x, _rematerialized if remat else _applied)
    for block, rest in zip(model.blocks, changed, strict=True):
        nnx.update(block, rest)
    return states


def _in_a_row(parts: Sequence[Any], contexts: Sequence[Any], x: Array, run: Any) -> tuple[list[Array], list[Any]]:
    states, changed = [], []
    for (graphdef, params, rest), context in zip(parts, contexts, strict=True):
        x, rest = run(graphdef, params, rest, x, context)
        states.append(x)
        changed.append(rest)
    return states, changed


def _in_a_loop(
    parts: Sequence[Any], contexts: Sequence[Any], x: Array, mesh: AbstractMesh, *, remat: bool
) -> tuple[list[Array], list[Any]]:
    """One loop for each stretch of blocks that are alike."""
    states, changed = [], []
    kinds = [_kind(*each) for each in zip(parts, contexts, strict=True)]
    begin = 0
    while begin < len(parts):
        end = begin + 1
        while end < len(parts) and kinds[end] == kinds[begin]:
            end += 1
        found, rests = _stretch(parts[begin:end], contexts[begin:end], x, mesh, remat=remat)
        x = found[-1]
        states += [found[index] for index in range(end - begin)]
        changed += [jax.tree.map(lambda leaf, index=index: leaf[index], rests) for index in range(end - begin)]
        begin = end
    return states, changed


def _stretch(
    parts: Sequence[Any], contexts: Sequence[Any], x: Array, mesh: AbstractMesh, *, remat: bool
) -> tuple[Array, Any]:
    """States behind each block, and what the blocks keep; [blocks, …]."""
    graphdef = parts[0][0]
    different = list({id(context): context for context in contexts}.values())
    which = [next(at for at, other in enumerate(different) if other is context) for context in contexts]

    def gathered(tree: Any) -> Any:
        tree = jax.lax.with_sharding_constraint(tree, state_shardings(tree, mesh, prefix=f"{BLOCKS}."))
        return jax.lax.with_sharding_constraint(tree, state_shardings(tree, mesh, (TENSOR,), prefix=f"{BLOCKS}."))

    # What comes of parameters alone is not kept, or all of it would be there at the end of the forward pass.
    @partial(jax.checkpoint, policy=None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def block(x: Array, params: Any, rest: Any, context: Any) -> tuple[Array, Any]:
        return _applied(graphdef, gathered(params), gathered(rest), x, context)

    def turn(x: Array, own: Any) -> tuple[Array, Any]:
        params, rest, at = own
        y, rest = block(x, params, rest, jax.tree.map(lambda leaf: leaf[at], stacked))
        return y, (y, rest)

    stacked = _stacked(different)
    each = (*(_stacked([part[at] for part in parts]) for at in (1, 2)), jnp.asarray(which))
    return jax.lax.scan(turn, x, each)[1]


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _kind(part: Any, context: Any) -> Any:
    """What must be equal for blocks to be turns of one loop."""
    graphdef, *states = part
    leaves, structure = jax.tree.flatten((states, context))
    return graphdef, structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


# Under jit of its own, so that the blocks of a model, whose graphdefs are equal, are traced and differentiated once.
@partial(jax.jit, static_argnums=0)
def _applied(graphdef: nnx.GraphDef, params: Any, rest: Any, x: Array, context: Any) -> tuple[Array, Any]:
    block: Any = nnx.merge(graphdef, params, rest)
    y = block(x, context)
    return y, nnx.state(block, nnx.Not(nnx.Param))


@partial(jax.jit, static_argnums=0)
def _rematerialized(graphdef: nnx.GraphDef, params: Any, rest: Any, x: Array, context: Any) -> tuple[Array, Any]:
    return jax.checkpoint(partial(_applied, graphdef))(params, rest, x, context)
