"""What evaluation, PTQ and QAT know of a language model, and how they run it block by block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jquant.nn.mesh import mesh_of
from jquant.nn.placement import copied


class Equivalence(NamedTuple):
    """A place in a block where channels can be rescaled: the producer's output over s, the readers' columns times s.

    Paths are relative to the block. Where a family has no such place (a nonlinearity that does not scale, heads that
    share values) there is no entry.
    """

    producer: str  # a norm, or a linear layer whose output reaches the readers channel by channel: "attn_norm"
    consumers: tuple[str, ...]  # linear layers that read the output, and are quantized: "attn.q_proj", …
    readers: tuple[str, ...]  # other modules with a weight [out, in] that read it too: a router
    parent: str  # the module around the consumers whose output AWQ compares: "attn", "mlp", "mlp.down_proj"


class CausalLM(Protocol):
    """A decoder as three parts. `blocks` all have the same structure, so one trace serves them all."""

    @property
    def embed(self) -> nnx.Module:
        """Tokens int32 [batch, time] to [batch, time, hidden]."""
        ...

    @property
    def blocks(self) -> nnx.List[Any]:
        """Each takes (x [batch, time, hidden], context) and returns the same shape."""
        ...

    @property
    def head(self) -> nnx.Module:
        """States [..., hidden] to logits [..., vocab], float32."""
        ...

    def equivalences(self) -> Sequence[Equivalence]:
        """Where channels of a block can be rescaled; the same for all blocks."""
        ...

    def contexts(self, length: int) -> Sequence[Any]:
        """What each block needs beside x (rotary tables, mask) for positions 0 … length − 1; one entry a block."""
        ...


def hidden_states(model: CausalLM, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time hidden"]:
    """The states that enter the head, computed block by block with one compiled program for all blocks.

    Tokens may be spread over a mesh (nn/placement.py) that the model lies on.
    """
    x, contexts = apply(model.embed, tokens), copied(model.contexts(tokens.shape[1]), mesh_of(tokens))
    for block, context in zip(model.blocks, contexts, strict=True):
        x = apply(block, x, context)
    return x


def apply(module: Any, *arguments: Any) -> Any:
    """module(*arguments) under jit; modules of equal structure share one compiled program."""
    graphdef, state = nnx.split(module)
    return _apply(graphdef, state, *arguments)


@partial(jax.jit, static_argnums=0)
def _apply(graphdef: nnx.GraphDef, state: nnx.State, *arguments: Any) -> Any:
    return nnx.merge(graphdef, state)(*arguments)
