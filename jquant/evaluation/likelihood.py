"""How likely a model finds given continuations of given contexts: what multiple-choice benchmarks ask.

    log p(continuation | context) = Σ_i log softmax(logits_i)[token_i]

Sequences are padded on the right, where no position before looks, to the lengths of `bucket_lengths`; a pass holds as
many rows as fill its tokens. There is one program a bucket, however many requests come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jquant.core.errors import InputError
from jquant.kernels.dispatch import on_cpu
from jquant.nn.placement import fetched
from jquant.nn.protocol import CausalLM, hidden_states

_SHORTEST = 32
_ROWS = 128  # positions whose logits are formed at a time, in one product


class Continuation(NamedTuple):
    """Token ids; the context has at least one."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether each token is the model's most likely one."""

    log_probability: float
    is_greedy: bool


def bucket_lengths(longest: int) -> tuple[int, ...]:
    """32, 48, 64, 96, 128, …: each power of two and half as much again, the last being `longest` itself."""
    lengths, power = [], _SHORTEST
    while power < longest:
        lengths += [power, power + power // 2]
        power *= 2
    return (*(length for length in lengths if length < longest), longest)


def likelihoods(
    model: CausalLM,
    requests: Sequence[Continuation],
    *,
    max_length: int,
    pass_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of every continuation, in the order of the requests.

    Args:
        model: any decoder in three parts; float or packed.
        requests: a context and what follows; one too long loses tokens at its start. Nothing has likelihood 1.
        max_length: the longest sequence that the model takes.
        pass_tokens: of one forward pass, padding included; by default 512 on CPU, 8,192 elsewhere.
        progress: called with the number of requests done so far.

    Raises:
        InputError: a context is empty, or a continuation alone exceeds the longest sequence.
    """
    tokens_of_pass = (512 if on_cpu() else 8192) if pass_tokens is None else pass_tokens
    found: dict[int, Likelihood] = {}
    lengths = bucket_lengths(max_length)
    buckets: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        _check(index, request, max_length)
        if not len(request.tokens):
            found[index] = Likelihood(0.0, True)
            continue
        needed = min(len(request.context) + len(request.tokens) - 1, max_length)
        buckets.setdefault(next(length for length in lengths if length >= needed), []).append(index)
    done = len(found)
    for length in sorted(buckets, reverse=True):  # what needs most memory comes first
        rows = max(1, tokens_of_pass // length)
        for start in range(0, len(buckets[length]), rows):
            chosen = buckets[length][start : start + rows]
            each = _one_pass(model, [requests[index] for index in chosen], rows, length)
            found |= dict(zip(chosen, each, strict=True))
            done += len(chosen)
            if progress is not None:
                progress(done)
    return [found[index] for index in range(len(requests))]


def _one_pass(model: CausalLM, requests: Sequence[Continuation], rows: int, length: int) -> Iterator[Likelihood]:
    tokens = np.zeros((rows, length), np.int32)
    places: list[int] = []  # of the predictions that count, in the flat states
    targets: list[int] = []
    for row, request in enumerate(requests):
        kept = [*request.context, *request.tokens][-(length + 1) :]
        tokens[row, : len(kept) - 1] = kept[:-1]
        first = len(kept) - 1 - len(request.tokens)
        places += range(row * length + first, row * length + len(kept) - 1)
        targets += request.tokens
    hidden = hidden_states(model, jnp.asarray(tokens))
    logs, greedy = _score(model.head, hidden, np.asarray(places), np.asarray(targets))
    start = 0
    for request in requests:
        part = slice(start, start + len(request.tokens))
        yield Likelihood(float(np.sum(logs[part])), bool(np.all(greedy[part])))
        start = part.stop


def _score(head: nnx.Module, hidden: Array, places: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of the target at each place, float64, and whether it is the most likely token."""
    graphdef, state = nnx.split(head)
    short = -len(places) % _ROWS
    padded = np.pad(places, (0, short)).reshape(-1, _ROWS), np.pad(targets, (0, short)).reshape(-1, _ROWS)
    parts = [
        _score_rows(graphdef, state, _rows(hidden, jnp.asarray(place, jnp.int32)), jnp.asarray(target, jnp.int32))
        for place, target in zip(*padded, strict=True)
    ]
    logs, greedy = (np.concatenate(each)[: len(places)] for each in zip(*fetched(parts), strict=True))
    return logs.astype(np.float64), greedy


@jax.jit
def _rows(hidden: Float[Array, "batch time hidden"], places: Int[Array, " rows"]) -> Float[Array, "rows hidden"]:
    return hidden.reshape(-1, hidden.shape[-1])[places]


@partial(jax.jit, static_argnums=0)
def _score_rows(
    graphdef: nnx.GraphDef, state: nnx.State, states: Float[Array, "rows hidden"], targets: Int[Array, " rows"]
) -> tuple[Array, Array]:
    logits = nnx.merge(graphdef, state)(states)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


def _check(index: int, request: Continuation, max_length: int) -> None:
    if not len(request.context):
        raise InputError(f"request {index}: its context is empty; begin with BOS or EOS, from which the first follows")
    if len(request.tokens) > max_length:
        raise InputError(
            f"request {index}: a continuation of {len(request.tokens)} tokens exceeds the model's context of "
            f"{max_length}: score it in parts"
        )
