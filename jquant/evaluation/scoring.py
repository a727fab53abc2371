"""One pass over evaluation windows: negative log-likelihood, and divergence from a reference where one is given.

The reference is kept as its final hidden states, a few kB a token, and its head: its logits are formed again beside the
model's, a chunk of rows at a time, so no array of [tokens, vocab] exists at either end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jquant.core.errors import InputError
from jquant.data.blocks import Windows
from jquant.evaluation.result import Divergence, Perplexity, Protocol, Result, mean_and_stderr
from jquant.kernels.dispatch import on_cpu
from jquant.nn.mesh import mesh_of
from jquant.nn.placement import fetched, spread_batch
from jquant.nn.protocol import CausalLM, hidden_states

_ROWS = 128  # rows of logits formed at a time: one product large enough for a GPU, no array of all logits


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """A model's final states on given windows, ready to be compared with."""

    head: nnx.Module
    hidden: list[Array]  # one [batch, window, hidden] a batch
    windows: Windows
    batch: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What one pass found; `divergence` where a reference was given."""

    perplexity: Perplexity
    divergence: Divergence | None


class _Sums(NamedTuple):
    """Sums over the scored tokens of each window, [batch]."""

    nll: Array | np.ndarray
    kl: Array | np.ndarray
    agree: Array | np.ndarray


def evaluate(
    model: CausalLM,
    windows: Windows,
    *,
    reference: Reference | None = None,
    batch: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Scores every window once.

    Args:
        model: any decoder in three parts; float or packed. Where it lies on a mesh, windows are spread over "data".
        windows: of `data.blocks.windows`; all have one length, so there is one compilation.
        reference: from `prepare_reference` on the same windows and batch.
        batch: windows a forward pass; 1 is fastest on CPU. The data axis must divide it.
        progress: called with the number of windows done so far.

    Raises:
        InputError: the batch is not positive, tokens exceed the vocabulary, or the reference is of other windows.
    """
    check_windows(model, windows, batch)
    if reference is not None and not (reference.batch == batch and _same_windows(reference.windows, windows)):
        raise InputError("the reference was prepared on other windows or another batch size: prepare it on these")
    if reference is not None and _vocabulary(reference.head, reference.hidden[0]) != _vocabulary(
        model.head, _state(model)
    ):
        raise InputError("model and reference have vocabularies of different sizes: their predictions do not compare")
    sums, done = [], 0
    mesh = mesh_of(model)
    for index, (tokens, scored) in enumerate(spread_batch(each, mesh) for each in batches_of(windows, batch)):
        hidden = hidden_states(model, tokens)
        against = None if reference is None else (reference.head, reference.hidden[index])
        sums.append(fetched(_score(model.head, hidden, tokens, scored, against)))
        done = min(done + batch, len(windows.tokens))
        if progress is not None:
            progress(done)
    return _summarize(sums, windows, compared=reference is not None)


def prepare_reference(
    model: CausalLM, windows: Windows, *, batch: int = 1, progress: Callable[[int], None] | None = None
) -> tuple[Reference, Perplexity]:
    """The reference to compare other models with, and its own perplexity."""
    check_windows(model, windows, batch)
    mesh = mesh_of(model)
    hidden = [hidden_states(model, spread_batch(tokens, mesh)) for tokens, _ in batches_of(windows, batch)]
    reference = Reference(head=model.head, hidden=hidden, windows=windows, batch=batch)
    sums = []
    for index, (tokens, scored) in enumerate(spread_batch(each, mesh) for each in batches_of(windows, batch)):
        sums.append(fetched(_score(model.head, hidden[index], tokens, scored, None)))
        if progress is not None:
            progress(min((index + 1) * batch, len(windows.tokens)))
    return reference, _summarize(sums, windows, compared=False).perplexity


def batches_of(windows: Windows, batch: int) -> Iterator[tuple[Array, Array]]:
    """Tokens and masks, [batch, …]; the last batch is filled up with windows that score nothing."""
    for start in range(0, len(windows.tokens), batch):
        tokens, scored = windows.tokens[start : start + batch], windows.scored[start : start + batch]
        short = batch - len(tokens)
        yield jnp.asarray(np.pad(tokens, ((0, short), (0, 0)))), jnp.asarray(np.pad(scored, ((0, short), (0, 0))))


def _score(
    head: nnx.Module, hidden: Array, tokens: Array, scored: Array, reference: tuple[nnx.Module, Array] | None
) -> _Sums:
    against = None if reference is None else (*nnx.split(reference[0]), reference[1])
    graphdef, state = nnx.split(head)
    if against is None:
        return _score_rows(graphdef, None, state, None, hidden, None, tokens, scored)
    return _score_rows(graphdef, against[0], state, against[1], hidden, against[2], tokens, scored)


@partial(jax.jit, static_argnums=(0, 1))
def _score_rows(
    graphdef: nnx.GraphDef,
    reference_graphdef: nnx.GraphDef | None,
    state: nnx.State,
    reference_state: nnx.State | None,
    hidden: Array,
    reference_hidden: Array | None,
    tokens: Array,
    scored: Array,
) -> _Sums:
    """Rows are the positions that have a target, of all windows, in chunks."""
    batch, targets = tokens.shape[0], tokens[:, 1:].reshape(-1)
    short = -len(targets) % _ROWS

    def rows(states: Array) -> Array:
        flat = states[:, :-1].reshape(len(targets), states.shape[-1])
        return jnp.pad(flat, ((0, short), (0, 0))).reshape(-1, _ROWS, states.shape[-1])

    def one_chunk(chunk: tuple[Array, Array | None, Array]) -> tuple[Array, Array, Array]:
        states, reference_states, wanted = chunk
        logits = nnx.merge(graphdef, state)(states)
        if reference_graphdef is None:
            nll = jax.lax.map(lambda row: _nll(*row), (logits, wanted), batch_size=rows_at_a_time())
            return nll, jnp.zeros_like(nll), jnp.zeros_like(nll)
        other = nnx.merge(reference_graphdef, reference_state)(reference_states)
        return jax.lax.map(lambda row: _compared(*row), (logits, wanted, other), batch_size=rows_at_a_time())

    chunks = (
        rows(hidden),
        None if reference_hidden is None else rows(reference_hidden),
        jnp.pad(targets, (0, short)).reshape(-1, _ROWS),
    )
    per_token = jax.lax.map(one_chunk, chunks)
    mask = scored.astype(jnp.float32)
    return _Sums(*(jnp.sum(part.reshape(-1)[: len(targets)].reshape(batch, -1) * mask, axis=-1) for part in per_token))


def _nll(logits: Array, wanted: Array) -> Array:
    """−log softmax(logits)[wanted] of one position."""
    highest = jnp.max(logits)
    return jnp.log(jnp.sum(jnp.exp(logits - highest))) + highest - logits[wanted]


def _compared(logits: Array, wanted: Array, other: Array) -> tuple[Array, Array, Array]:
    """Of one position: −log softmax(logits)[wanted], KL(softmax(other) ‖ softmax(logits)), whether the top agrees.

    KL = Σ p·(other − logits) − log Z(other) + log Z(logits),    p = exp(other) / Z(other)
    """
    highest, other_highest = jnp.max(logits), jnp.max(other)
    log_z = jnp.log(jnp.sum(jnp.exp(logits - highest))) + highest
    weights = jnp.exp(other - other_highest)
    total = jnp.sum(weights)
    kl = jnp.sum(weights * (other - logits)) / total - (jnp.log(total) + other_highest) + log_z
    # Both have the same top token where one token is highest in both; an `any` vectorizes, an argmax does not.
    agree = jnp.any((logits == highest) & (other == other_highest))
    return log_z - logits[wanted], kl, agree.astype(jnp.float32)


def rows_at_a_time() -> int:
    """Rows of logits that are reduced at a time. Several passes read them: on CPU one row a core stays in its cache."""
    return min(_ROWS, os.cpu_count() or 1) if on_cpu() else _ROWS


def _summarize(batches: Sequence[_Sums], windows: Windows, *, compared: bool) -> Evaluation:
    protocol, counts = Protocol.of(windows), windows.scored.sum(axis=1)
    nlls, kls, agreements = (np.concatenate(part)[: len(counts)] for part in zip(*batches, strict=True))
    nll, stderr = mean_and_stderr(nlls, counts)
    with np.errstate(over="ignore"):  # a broken model's perplexity may be infinite
        perplexity = Perplexity(value=float(np.exp(nll)), nll=nll, stderr=stderr, protocol=protocol)
    if not compared:
        return Evaluation(perplexity=perplexity, divergence=None)
    kl, kl_stderr = mean_and_stderr(kls, counts)
    top1, top1_stderr = mean_and_stderr(agreements, counts)
    return Evaluation(
        perplexity=perplexity,
        divergence=Divergence(
            # Rounding may leave a sum of nothing but zeros a little below 0.
            kl=Result(value=max(kl, 0.0), stderr=kl_stderr, protocol=protocol),
            top1=Result(value=top1, stderr=top1_stderr, protocol=protocol),
        ),
    )


def check_windows(model: CausalLM, windows: Windows, batch: int) -> None:
    if batch < 1:
        raise InputError(f"batch {batch}: it must be at least 1 window")
    model.contexts(windows.window)  # refuses what is longer than the model's context
    vocabulary = _vocabulary(model.head, _state(model))
    highest = int(windows.tokens.max())
    if highest >= vocabulary:
        raise InputError(f"token id {highest} is outside the model's vocabulary of {vocabulary}: use its own tokenizer")


def _state(model: CausalLM) -> Any:
    return jax.eval_shape(_call(model.embed), jax.ShapeDtypeStruct((1, 1), jnp.int32))


def _vocabulary(head: nnx.Module, state: Any) -> int:
    return jax.eval_shape(_call(head), state).shape[-1]


def _call(module: Any) -> Callable[[Array], Array]:
    return lambda x: module(x)


def _same_windows(one: Windows, other: Windows) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.scored, other.scored)
