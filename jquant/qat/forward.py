"""A language model's pass for training: block by block, one trace for all equal blocks, recomputed if asked."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jquant.nn.protocol import CausalLM


def block_states(
    model: CausalLM, tokens: Int[Array, "batch time"], *, remat: bool
) -> list[Float[Array, "batch time hidden"]]:
    """The states behind each block; the last enters the head. Inside a trace; modules keep what they observed.

    Args:
        model: a decoder in three parts.
        tokens: of the whole windows.
        remat: keep only what enters each block, and compute the rest again in the backward pass.
    """
    x = model.embed(tokens)  # pyright: ignore[reportCallIssue]
    run = _rematerialized if remat else _applied
    states = []
    for block, context in zip(model.blocks, model.contexts(tokens.shape[1]), strict=True):
        graphdef, params, rest = nnx.split(block, nnx.Param, ...)
        x, rest = run(graphdef, params, rest, x, context)
        nnx.update(block, rest)
        states.append(x)
    return states


# Under jit of its own, so that the blocks of a model, whose graphdefs are equal, are traced and differentiated once.
@partial(jax.jit, static_argnums=0)
def _applied(graphdef: nnx.GraphDef, params: Any, rest: Any, x: Array, context: Any) -> tuple[Array, Any]:
    block: Any = nnx.merge(graphdef, params, rest)
    y = block(x, context)
    return y, nnx.state(block, nnx.Not(nnx.Param))


@partial(jax.jit, static_argnums=0)
def _rematerialized(graphdef: nnx.GraphDef, params: Any, rest: Any, x: Array, context: Any) -> tuple[Array, Any]:
    return jax.checkpoint(partial(_applied, graphdef))(params, rest, x, context)
