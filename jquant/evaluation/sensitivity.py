"""What each layer alone costs: one layer is rounded at a time, and the model's output compared with the float model's.

    s_l(q) = mean KL(float ‖ float with layer l rounded to q)        nats a token

The states that enter every block are kept from one float pass, so a layer of block i reruns block i and those after it.
A rounded weight goes into a float layer as its decoded values, which is what a packed one computes with: one compiled
block serves all layers and schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jquant.core.errors import InputError
from jquant.core.qtensor import dequantize, quantize, stored_bytes
from jquant.core.scheme import Scheme
from jquant.data.blocks import Windows
from jquant.nn.linear import ExpertLinear, Linear
from jquant.nn.protocol import CausalLM, apply
from jquant.nn.surgery import Path, module_at, named_modules

_ROWS = 128  # positions whose predictions are formed at a time
_LARGEST = 8e9  # bytes of predictions that are kept

Round = Callable[[Path, Array, Scheme], Array]  # of a layer's weight, to its decoded values


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One layer rounded to one scheme, all others float."""

    path: Path
    scheme: str
    kl: float  # nats a token
    nll_increase: float  # of the text, nats a token; noisier than KL
    weight_error: float  # ‖W − Ŵ‖² / ‖W‖²
    bits: int  # that the packed layer holds, scales and padding included
    weights: int


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatPass:
    """States of the float model on some windows: what enters each block, and the head."""

    states: list[Array]  # [i]: into block i; the last: into the head. [windows, window, hidden]
    contexts: Sequence[Any]
    windows: Windows
    log_p: Array  # of every next token, [chunks, rows, vocab]: formed once, for all comparisons

    @property
    def targets(self) -> Array:
        """The tokens that follow, [chunks, rows]."""
        return _in_chunks(jnp.asarray(self.windows.tokens)[:, 1:].reshape(-1))


def float_pass(model: CausalLM, windows: Windows) -> FloatPass:
    """Runs the float model once, all windows in one batch, and keeps what enters each block, and what comes out.

    Raises:
        InputError: what comes out exceeds 8 GB.
    """
    tokens = jnp.asarray(windows.tokens)
    contexts = model.contexts(windows.window)
    states = [apply(model.embed, tokens)]
    for block, context in zip(model.blocks, contexts, strict=True):
        states.append(apply(block, states[-1], context))
    head: Any = model.head
    vocabulary = jax.eval_shape(lambda x: head(x), states[-1][:1, :1]).shape[-1]
    size = 4 * tokens.size * vocabulary
    if size > _LARGEST:
        raise InputError(
            f"{tokens.size} tokens × {vocabulary} of vocabulary are {size / 1e9:.1f} GB of predictions: give fewer or "
            "shorter windows"
        )
    log_p = _log_softmax(*nnx.split(model.head), states[-1])
    return FloatPass(states=states, contexts=contexts, windows=windows, log_p=log_p)


def block_layers(model: CausalLM) -> dict[Path, Linear | ExpertLinear]:
    """The float layers of the blocks, in the model's order. Raises InputError where there are none."""
    found: dict[Path, Linear | ExpertLinear] = {}
    for index, block in enumerate(model.blocks):
        for path, layer in named_modules(block, (Linear, ExpertLinear)):
            assert isinstance(layer, Linear | ExpertLinear)
            found[f"blocks.{index}.{path}"] = layer
    if not found:
        raise InputError("the model's blocks have no float layers: it is quantized already; give the float model")
    return found


def sensitivities(
    model: CausalLM,
    passed: FloatPass,
    schemes: Sequence[Scheme],
    *,
    layers: Sequence[Path] | None = None,
    rounded: Round | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LayerSensitivity]:
    """Each layer at each scheme, block by block.

    Args:
        model: float; as it was when this ends.
        passed: of the same model.
        schemes: to round to.
        layers: paths within the model; None for all layers of the blocks.
        rounded: how a weight is rounded; by default to nearest.
        progress: hears how many of how many are done.
    """
    known = block_layers(model)
    paths = list(known) if layers is None else list(layers)
    total, done = len(paths) * len(schemes), 0
    for path in paths:
        layer, index, inner = known[path], int(path.split(".")[1]), path.split(".", 2)[2]
        weight = layer.weight.get_value()
        for scheme in schemes:
            value = _rounded(path, weight, scheme) if rounded is None else rounded(path, weight, scheme)
            block = nnx.merge(*_copied(model.blocks[index]))
            target: Any = module_at(block, inner)
            target.weight.set_value(value)
            kl, increase = rerun(model, passed, index, block)
            yield LayerSensitivity(
                path=path,
                scheme=str(scheme),
                kl=kl,
                nll_increase=increase,
                weight_error=float(_relative(weight, value)),
                bits=8 * stored_bytes(scheme, tuple(weight.shape)),
                weights=int(weight.size),
            )
            done += 1
            if progress is not None:
                progress(done, total)


def rerun(model: CausalLM, passed: FloatPass, index: int, block: nnx.Module) -> tuple[float, float]:
    """KL and increase of NLL, nats a token, where `block` takes the place of block `index` and the rest is float."""
    x = apply(block, passed.states[index], passed.contexts[index])
    for later, context in zip(list(model.blocks)[index + 1 :], passed.contexts[index + 1 :], strict=True):
        x = apply(later, x, context)
    return output_change(model.head, passed, x)


def output_change(head: nnx.Module, passed: FloatPass, hidden: Array) -> tuple[float, float]:
    """KL and increase of NLL, nats a token, of other states before a head."""
    scored = passed.windows.scored.reshape(-1)
    found = jax.device_get(_change(*nnx.split(head), hidden, passed.log_p, passed.targets))
    kl, increase = (np.asarray(part, np.float64).reshape(-1)[: len(scored)][scored] for part in found)
    return max(float(kl.mean()), 0.0), float(increase.mean())


def by_scheme(found: Sequence[LayerSensitivity]) -> dict[str, dict[Path, LayerSensitivity]]:
    """The same as a table: scheme, then path."""
    table: dict[str, dict[Path, LayerSensitivity]] = {}
    for each in found:
        table.setdefault(each.scheme, {})[each.path] = each
    return table


def uniform(model: CausalLM, passed: FloatPass, scheme: Scheme, *, rounded: Round | None = None) -> tuple[float, float]:
    """KL and increase of NLL with every layer of the blocks rounded to one scheme."""
    return mixed(model, passed, dict.fromkeys(block_layers(model), scheme), rounded=rounded)


def mixed(
    model: CausalLM, passed: FloatPass, schemes: Mapping[Path, Scheme], *, rounded: Round | None = None
) -> tuple[float, float]:
    """KL and increase of NLL with each layer rounded to its own scheme."""
    x = passed.states[0]
    for index, context in enumerate(passed.contexts):
        block = nnx.merge(*_copied(model.blocks[index]))
        for path, layer in named_modules(block, (Linear, ExpertLinear)):
            whole = f"blocks.{index}.{path}"
            if whole in schemes:
                target: Any = layer
                weight = target.weight.get_value()
                make = _rounded if rounded is None else rounded
                target.weight.set_value(make(whole, weight, schemes[whole]))
        x = apply(block, x, context)
    return output_change(model.head, passed, x)


def _copied(block: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """The block over the same arrays, in Variables of its own."""
    graphdef, state = nnx.split(block)
    return graphdef, jax.tree.map(lambda array: array, state)


def _rounded(path: Path, weight: Array, scheme: Scheme) -> Array:
    try:
        return _round_trip(weight, scheme)
    except InputError as error:
        raise InputError(f"layer {path}: {error}") from error


def _in_chunks(rows: Array) -> Array:
    """[chunks, 128, …], filled up with zeros."""
    short = -len(rows) % _ROWS
    return jnp.pad(rows, ((0, short),) + ((0, 0),) * (rows.ndim - 1)).reshape(-1, _ROWS, *rows.shape[1:])


def _predicting(hidden: Array) -> Array:
    """The states that predict a token of the windows, in chunks."""
    return _in_chunks(hidden[:, :-1].reshape(-1, hidden.shape[-1]))


@partial(jax.jit, static_argnums=0)
def _log_softmax(graphdef: nnx.GraphDef, state: nnx.State, hidden: Array) -> Array:
    return jax.lax.map(lambda states: jax.nn.log_softmax(nnx.merge(graphdef, state)(states)), _predicting(hidden))


@partial(jax.jit, static_argnums=0)
def _change(
    graphdef: nnx.GraphDef, state: nnx.State, hidden: Array, log_p: Array, targets: Array
) -> tuple[Array, Array]:
    """KL and increase of NLL of every position, in chunks."""

    def one_chunk(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        states, before, wanted = chunk
        after = jax.nn.log_softmax(nnx.merge(graphdef, state)(states))
        lost = before - after
        return jnp.sum(jnp.exp(before) * lost, axis=-1), jnp.take_along_axis(lost, wanted[:, None], axis=-1)[:, 0]

    return jax.lax.map(one_chunk, (_predicting(hidden), log_p, targets))


@partial(jax.jit, static_argnames="scheme")
def _round_trip(weight: Array, scheme: Scheme) -> Array:
    return dequantize(quantize(weight, scheme), jnp.float32).astype(weight.dtype)


@jax.jit
def _relative(weight: Array, value: Array) -> Array:
    weight, error = weight.astype(jnp.float32), weight.astype(jnp.float32) - value.astype(jnp.float32)
    return jnp.sum(error * error) / jnp.maximum(jnp.sum(weight * weight), jnp.finfo(jnp.float32).tiny)
