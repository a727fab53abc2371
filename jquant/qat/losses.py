"""What a language model is trained on: the next token, and the predictions and states of the float model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jquant.core.errors import InputError
from jquant.nn.protocol import CausalLM
from jquant.qat.forward import block_states
from jquant.qat.outer import by_rows, gathered_states, in_parts

Metrics = dict[str, Array]
LossFn = Callable[..., tuple[Array, Metrics]]  # (model, batch) or, with a teacher, (model, batch, teacher)

# Logits that exist at a time: 2,048 rows of a vocabulary of 49,152 are 400 MB in float32, and a few such arrays live at
# once.
LOGIT_ROWS = 2048


def next_token_loss(*, remat: bool = False, logit_rows: int = LOGIT_ROWS) -> LossFn:
    """Mean cross entropy of the next token, −log softmax(z)[next], over all tokens but the windows' first.

    Args:
        remat: recompute each block in the backward pass: memory for one block's activations, a third more work.
        logit_rows: rows of logits that exist at a time.

    Returns:
        A loss of (model, tokens int32 [batch, time]) with metrics {"ce"}.
    """

    def loss(model: nnx.Module, tokens: Array) -> tuple[Array, Metrics]:
        decoder = cast(CausalLM, model)
        states = block_states(decoder, tokens, remat=remat)
        sums = _token_sums(decoder.head, states[-1], tokens, None, None, temperature=1.0, rows=logit_rows)
        ce = sums.ce / _targets(tokens)
        return ce, {"ce": ce}

    return loss


def distillation_loss(
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    hidden_weight: float = 0.0,
    remat: bool = False,
    logit_rows: int = LOGIT_ROWS,
) -> LossFn:
    """Distance from a teacher's predictions, mixed with the next token's cross entropy.

        L = w·T²·KL(softmax(t/T) ‖ softmax(z/T)) + (1 − w)·CE(z, next) + h·mean over blocks of Σ(s − s̄)² / Σs̄²

    with student's and teacher's logits z and t, and their states s and s̄ behind each block. All of it in float32,
    averaged over all tokens but the windows' last.

    Args:
        weight: w, from 0 to 1.
        temperature: T; T² keeps the gradient's size.
        hidden_weight: h; 0 leaves states out.
        remat: as `next_token_loss`, of the student.
        logit_rows: as `next_token_loss`.

    Returns:
        A loss of (model, tokens int32 [batch, time], teacher) with metrics {"ce", "kl"} and, where h > 0, {"hidden"}.

    Raises:
        InputError: a number is out of range.

    Reference: Hinton et al., 1503.02531, section 2; Liu et al., LLM-QAT, 2305.17888, section 3.2 (logits); Romero et
    al., FitNets, 1412.6550 (states; there through a regressor, here the shapes are equal).
    """
    if not 0 <= weight <= 1:
        raise InputError(f"distillation weight {weight}: it must be 0 to 1, the rest is the next token's cross entropy")
    if not temperature > 0:
        raise InputError(f"distillation temperature {temperature}: it must be above 0")
    if not hidden_weight >= 0:
        raise InputError(f"distillation weight of hidden states {hidden_weight}: it must be at least 0")

    def loss(model: nnx.Module, tokens: Array, teacher: nnx.Module) -> tuple[Array, Metrics]:
        student, other = cast(CausalLM, model), cast(CausalLM, teacher)
        states = block_states(student, tokens, remat=remat)
        wanted = jax.lax.stop_gradient(block_states(other, tokens, remat=False))
        sums = _token_sums(
            student.head, states[-1], tokens, other.head, wanted[-1], temperature=temperature, rows=logit_rows
        )
        ce, kl = sums.ce / _targets(tokens), sums.kl / _targets(tokens)
        total = weight * temperature**2 * kl + (1 - weight) * ce
        metrics = {"ce": ce, "kl": kl}
        if hidden_weight:
            metrics["hidden"] = jnp.mean(jnp.stack([_relative(*pair) for pair in zip(states, wanted, strict=True)]))
            total = total + hidden_weight * metrics["hidden"]
        return total, metrics

    return loss


class _Sums(NamedTuple):
    """Over all targets: −log p(next), and KL(teacher ‖ student) at the temperature."""

    ce: Float[Array, ""]
    kl: Float[Array, ""]


def _targets(tokens: Int[Array, "batch time"]) -> int:
    return tokens.shape[0] * (tokens.shape[1] - 1)


def _relative(state: Array, wanted: Array) -> Array:
    wide, other = state.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.sum((wide - other) ** 2) / jnp.maximum(jnp.sum(other**2), jnp.finfo(jnp.float32).tiny)


def _token_sums(
    head: nnx.Module,
    hidden: Float[Array, "batch time hidden"],
    tokens: Int[Array, "batch time"],
    teacher: nnx.Module | None,
    wanted: Float[Array, "batch time hidden"] | None,
    *,
    temperature: float,
    rows: int,
) -> _Sums:
    """Stretches of positions one after the other, each with its logits formed anew in the backward pass.

    Stretches run along time: the batch axis, which may be spread over devices, stays whole.
    """
    batch, time = tokens.shape
    stretch = min(max(1, rows // batch), time - 1)
    count = -(-(time - 1) // stretch)
    short = count * stretch - (time - 1)

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, short), *((0, 0),) * (array.ndim - 2)))
        return padded.reshape(batch, count, stretch, *array.shape[2:]).swapaxes(0, 1)

    graphdef, params, rest = nnx.split(head, nnx.Param, ...)
    params = by_rows(params)
    other = None if teacher is None else nnx.split(teacher, nnx.Param, ...)
    teaching_states = None if other is None else (by_rows(other[1]), other[2])
    inside = cut(jnp.ones((batch, time - 1), bool))
    pieces = (cut(hidden[:, :-1]), cut(tokens[:, 1:]), inside, None if wanted is None else cut(wanted[:, :-1]))

    @jax.checkpoint
    def one(params: Any, rest: Any, other_state: Any, piece: Any) -> tuple[_Sums, Any]:
        states, targets, counted, other_states = piece
        module: Any = nnx.merge(graphdef, params, rest)
        logits = in_parts(module(gathered_states(states, params)))
        ce = jnp.sum(_cross_entropy(logits, targets), where=counted)
        kl = jnp.zeros((), jnp.float32)
        if other is not None:
            teaching: Any = nnx.merge(other[0], *other_state)
            theirs = in_parts(teaching(gathered_states(other_states, other_state[0])))
            kl = jnp.sum(_divergence(logits / temperature, theirs / temperature), where=counted)
        return _Sums(ce, kl), nnx.state(module, nnx.Not(nnx.Param))

    def step(carry: tuple[_Sums, Any], piece: Any) -> tuple[tuple[_Sums, Any], None]:
        sums, rest = carry
        more, rest = one(params, rest, teaching_states, piece)
        return (_Sums(sums.ce + more.ce, sums.kl + more.kl), rest), None

    zero = jnp.zeros((), jnp.float32)
    (sums, rest), _ = jax.lax.scan(step, (_Sums(zero, zero), rest), pieces)
    nnx.update(head, rest)  # what observers in the head saw
    return sums


def _cross_entropy(logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _divergence(logits: Float[Array, "*batch vocab"], wanted: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """KL(softmax(wanted) ‖ softmax(logits))."""
    log_p, log_q = jax.nn.log_softmax(wanted, axis=-1), jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
