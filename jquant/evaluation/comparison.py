"""Two models on one text, token by token: perplexity ratio, and how the divergence is spread over positions.

A mean hides whether all positions moved a little or a few moved far; quantiles show it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jquant.core.errors import InputError
from jquant.data.blocks import Windows
from jquant.evaluation.paired import Interval, bootstrap
from jquant.evaluation.result import Protocol
from jquant.evaluation.scoring import Reference, batches_of, check_windows
from jquant.nn.protocol import CausalLM, hidden_states

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class TextComparison:
    """Of a model against its reference, over the scored tokens of the same windows."""

    protocol: Protocol | None  # None where the record does not say it
    reference_perplexity: float
    perplexity: float
    ratio: float  # perplexity / reference's
    ratio_interval: Interval  # windows drawn anew in pairs
    kl: float  # nats a token, mean
    kl_quantiles: Mapping[str, float]  # "0.99": 99 of 100 tokens diverge less
    top1: float  # share of positions whose likeliest token stayed
    flips_lost: float  # share of positions where the reference's likeliest token was the text's, and the model's is not
    flips_gained: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def compare_text(
    model: CausalLM, windows: Windows, reference: Reference, *, progress: Callable[[int], None] | None = None
) -> TextComparison:
    """Scores every window once.

    Args:
        model: any decoder in three parts; float or packed.
        windows: those that the reference was prepared on.
        reference: from `scoring.prepare_reference`.
        progress: called with the number of windows done so far.

    Raises:
        InputError: as `scoring.evaluate`.
    """
    batch = reference.batch
    check_windows(model, windows, batch)
    if not np.array_equal(reference.windows.tokens, windows.tokens):
        raise InputError("the reference was prepared on other windows: prepare it on these")
    parts = []
    for index, (tokens, _) in enumerate(batches_of(windows, batch)):
        hidden = hidden_states(model, tokens)
        heads = nnx.split(model.head), nnx.split(reference.head)
        both = heads[0][0], heads[1][0], heads[0][1], heads[1][1]
        found = _compare(*both, hidden, reference.hidden[index], tokens)
        parts.append(jax.device_get(found))
        if progress is not None:
            progress(min((index + 1) * batch, len(windows.tokens)))
    columns = (np.concatenate(part).astype(np.float64)[: len(windows.tokens)] for part in zip(*parts, strict=True))
    return _summarize(windows, *columns)


def _summarize(
    windows: Windows,
    before: np.ndarray,
    after: np.ndarray,
    kl: np.ndarray,
    same: np.ndarray,
    right_before: np.ndarray,
    right_after: np.ndarray,
) -> TextComparison:
    scored = windows.scored
    kl = np.maximum(kl[scored], 0.0)
    counts = scored.sum(axis=1).astype(np.float64)
    rows = np.stack([(before * scored).sum(axis=1), (after * scored).sum(axis=1), counts], axis=1)
    sums = rows.sum(axis=0)

    def log_ratio(means: np.ndarray) -> np.ndarray:
        return (means[:, 1] - means[:, 0]) / means[:, 2]

    low, high = bootstrap(rows, log_ratio)
    with np.errstate(over="ignore"):
        exp = lambda value: float(np.exp(value))  # noqa: E731
        return TextComparison(
            protocol=Protocol.of(windows),
            reference_perplexity=exp(sums[0] / sums[2]),
            perplexity=exp(sums[1] / sums[2]),
            ratio=exp((sums[1] - sums[0]) / sums[2]),
            ratio_interval=Interval(exp(low), exp(high)),
            kl=float(kl.mean()),
            kl_quantiles={f"{q:g}": float(np.quantile(kl, q)) for q in QUANTILES},
            top1=float(same[scored].mean()),
            flips_lost=float((right_before * (1 - right_after))[scored].mean()),
            flips_gained=float(((1 - right_before) * right_after)[scored].mean()),
        )


def compare_records(reference: Mapping[str, Any], quantized: Mapping[str, Any], what: str) -> TextComparison:
    """The same from two result files of `jquant eval`; the second may have been measured against the first's model.

    Without pairs the interval is of the difference of two independent perplexities, which is too wide.

    Raises:
        InputError: a file has no perplexity, or they are of other texts or windows; the message says which.
    """
    values = {}
    for name, record in (("the reference", reference), ("the model", quantized)):
        nll, stderr = record.get("nll"), record.get("stderr")
        if not isinstance(nll, int | float) or not math.isfinite(nll) or nll < 0:
            raise InputError(
                f"{what}: {name}'s nll is {nll!r}; it must be a finite number of at least 0: measure it again"
            )
        values[name] = (float(nll), math.nan if stderr is None else float(stderr))
    for field in ("text_sha256", "tokens_sha256", "window", "stride", "windows"):
        if reference.get(field) != quantized.get(field):
            raise InputError(
                f"{what}: results are of different {field}: {_short(reference.get(field))} of the reference, "
                f"{_short(quantized.get(field))} of the model; measure both on one text with one window"
            )
    (before, before_error), (after, after_error) = values.values()
    spread = 1.96 * math.hypot(before_error, after_error)
    known = {field.name for field in dataclasses.fields(Protocol)}
    protocol = {name: value for name, value in quantized.items() if name in known}
    return TextComparison(
        protocol=Protocol(**protocol, tokens_total=quantized.get("tokens", 0)) if "text_name" in protocol else None,
        reference_perplexity=math.exp(before),
        perplexity=math.exp(after),
        ratio=math.exp(after - before),
        ratio_interval=Interval(math.exp(after - before - spread), math.exp(after - before + spread)),
        kl=float("nan" if quantized.get("kl") is None else quantized["kl"]),
        kl_quantiles={},
        top1=float("nan" if quantized.get("top1") is None else quantized["top1"]),
        flips_lost=math.nan,
        flips_gained=math.nan,
    )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 16 else str(value)


@partial(jax.jit, static_argnums=(0, 1))
def _compare(
    graphdef: nnx.GraphDef,
    other_graphdef: nnx.GraphDef,
    state: nnx.State,
    other_state: nnx.State,
    hidden: Array,
    other_hidden: Array,
    tokens: Array,
) -> tuple[Array, ...]:
    """Of each position that has a target, [batch, time − 1]: see `_positions`. A chunk of rows at a time."""
    batch, targets = tokens.shape[0], tokens[:, 1:].reshape(-1)
    short = -len(targets) % _ROWS

    def rows(states: Array) -> Array:
        flat = states[:, :-1].reshape(len(targets), states.shape[-1])
        return jnp.pad(flat, ((0, short), (0, 0))).reshape(-1, _ROWS, states.shape[-1])

    def one_chunk(chunk: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        states, other_states, wanted = chunk
        logits, other = nnx.merge(graphdef, state)(states), nnx.merge(other_graphdef, other_state)(other_states)
        return _positions(logits, other, wanted)

    found = jax.lax.map(one_chunk, (rows(hidden), rows(other_hidden), jnp.pad(targets, (0, short)).reshape(-1, _ROWS)))
    return tuple(part.reshape(-1)[: len(targets)].reshape(batch, -1) for part in found)


def _positions(logits: Array, other: Array, wanted: Array) -> tuple[Array, ...]:
    """−log p of the target by reference and model, KL(reference ‖ model), same top token, and who had it right."""
    log_p, log_q = jax.nn.log_softmax(other), jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    top, other_top = jnp.argmax(logits, axis=-1), jnp.argmax(other, axis=-1)

    def of_target(logs: Array) -> Array:
        return -jnp.take_along_axis(logs, wanted[:, None], axis=-1)[:, 0]

    same, before, after = top == other_top, other_top == wanted, top == wanted
    return of_target(log_p), of_target(log_q), kl, *(flag.astype(jnp.float32) for flag in (same, before, after))
