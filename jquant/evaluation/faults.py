"""The guide's troubleshooting as checks that measure: accuracy loss, gibberish, slow inference.

    weight_faults      each layer against its original: zeroed or wrong scales, rows in another order, other weights
    block_faults       each block on the float model's own inputs: where damage enters, whatever the weights look like
    accuracy_findings  where the loss comes from: few layers, outlier channels
    speed_findings     a step that compiles again, that runs uncompiled, or that spends its time decoding weights

The guide names corrupted calibration data and wrong scale factors as causes of gibberish; a transform that was not
folded, another tokenizer, and rows of q and k in the other order of rotary pairs look the same from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scheme import Scheme
from jquant.evaluation.outliers import LayerOutliers
from jquant.evaluation.sensitivity import FloatPass, LayerSensitivity
from jquant.nn.linear import ExpertLinear, Linear, QuantizedExpertLinear, QuantizedLinear
from jquant.nn.protocol import CausalLM, apply
from jquant.nn.surgery import Path, named_modules

Case = Literal["gibberish", "accuracy loss", "slow inference"]

_TIMES = 6.0  # squared error over that of rounding: a wrong scale's is 10 times and more
# Squared and relative: GPTQ puts errors into inputs that are nearly silent (0.10 of block 11's down_proj of SmolLM2,
# where rounding costs 0.01), so an error without a cause counts only where the matrices have little in common.
_UNRELATED = 0.5
_LEAST = 0.05  # squared and relative: below it no layer is called damaged
_EXPLAINED, _CLOSE = 0.2, 0.02  # a cause is named where undoing it leaves such a share of the error, or of the weight
_BLOCK_TIMES, _BLOCK_LEAST = 10.0, 0.3
_OUTLIER = 100.0  # times the median channel
_CONCENTRATED = 0.15  # of the summed loss, in one layer of many
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault, where it is, and what to do."""

    case: Case
    where: str  # a layer's path, a block, "tokenizer", "step"
    cause: str  # a short name: "zeroed scales", "recompiles"
    said: str  # the measurement
    remedy: str


def tokenizer_faults(
    model_sha256: str, reference_sha256: str, probe: tuple[Sequence[int], Sequence[int]]
) -> list[Finding]:
    """Of two tokenizers' fingerprints, and what each makes of one text."""
    if model_sha256 == reference_sha256:
        return []
    ours, theirs = list(probe[0]), list(probe[1])
    if ours == theirs:
        said = "fingerprints differ, and yet the probe text gives equal ids: special tokens or rare characters differ"
    else:
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
        said = (
            f"the same text gives other ids from token {at} on: {ours[at : at + 3]} here, {theirs[at : at + 3]} there"
        )
    return [
        Finding(
            case="gibberish",
            where="tokenizer",
            cause="another tokenizer",
            said=said,
            remedy="copy the tokenizer files of the original checkpoint beside the weights",
        )
    ]


def layers_of(model: Any) -> dict[Path, Any]:
    """The linear layers of the blocks, float and packed, by path."""
    kinds = (Linear, ExpertLinear, QuantizedLinear, QuantizedExpertLinear)
    return {
        f"blocks.{index}.{path}": layer
        for index, block in enumerate(model.blocks)
        for path, layer in named_modules(block, kinds)
    }


def packed_faults(model: CausalLM) -> list[Finding]:
    """What shows without a reference: scales that are zero or not finite, layers that decode to nothing."""
    found = []
    for path, layer in layers_of(model).items():
        weight = layer.weight.get_value()
        value = np.asarray(dequantize(weight, jnp.float32) if isinstance(weight, QTensor) else weight, np.float32)
        if not np.isfinite(value).all():
            found.append(_damage(path, "not finite", f"{np.sum(~np.isfinite(value)):,} values are NaN or infinite"))
            continue
        rows = np.mean(~value.any(axis=-1))
        if rows > 0.5 * (1 - 1e-9):
            found.append(_damage(path, "zeroed scales", f"{rows:.0%} of its rows decode to zeros"))
    return found


def weight_faults(model: CausalLM, reference: CausalLM, *, head_dim: int) -> list[Finding]:
    """Each layer against the reference's.

    Args:
        model: quantized; its layers must not have been rescaled by a transform, which changes weights and no output.
        reference: the float model of the same shape.
        head_dim: of attention, for the order of rows in q_proj and k_proj.

    Raises:
        InputError: the models are of different shapes.
    """
    ours, theirs = layers_of(model), layers_of(reference)
    if list(ours) != list(theirs):
        other = next(iter(set(ours) ^ set(theirs)))
        raise InputError(f"model and reference have different layers, {other} in one alone: give its own original")
    found = []
    for path, layer in ours.items():
        packed, original = layer.weight.get_value(), theirs[path].weight.get_value()
        if tuple(packed.shape) != tuple(original.shape):
            raise InputError(f"{path}: is {tuple(packed.shape)}, of the reference {tuple(original.shape)}")
        value = dequantize(packed, jnp.float32) if isinstance(packed, QTensor) else packed.astype(jnp.float32)
        original = _plain(original)
        scheme = packed.scheme if isinstance(packed, QTensor) else None
        expected = 0.0 if scheme is None else float(_rounding_error(original, scheme))
        error = float(_error(original, value))
        if not np.isfinite(error):
            found.append(_damage(path, "not finite", "it decodes to NaN or infinity"))
        elif error > max(_TIMES * expected, _LEAST):
            cause = _explained(path, np.asarray(value), np.asarray(original), error, expected, theirs, head_dim)
            found += [] if cause is None else [cause]
    return found


def _explained(
    path: Path,
    value: np.ndarray,
    original: np.ndarray,
    error: float,
    expected: float,
    originals: Mapping[Path, Any],
    head_dim: int,
) -> Finding | None:
    """The cause whose undoing takes the error away; None where there is none and the error may be a method's choice."""
    measured = f"squared error {error:.3g} of the weight's size, rounding alone costs {expected:.2g}"
    rows = ~value.any(axis=-1) & original.any(axis=-1)
    dead = float(np.mean((value == 0) & (original != 0)))
    if rows.any() and rows.mean() > 0.01:
        return _damage(path, "zeroed scales", f"{rows.mean():.0%} of its rows decode to zeros; {measured}")
    enough = min(_EXPLAINED * error, max(3 * expected, _CLOSE))
    factor = float(np.vdot(value, original) / max(np.vdot(value, value), 1e-30))
    if abs(factor - 1) > 0.1 and _squared(original, factor * value) <= enough:
        return _damage(path, "wrong scale", f"its scales are {1 / factor:.3g} times what they should be; {measured}")
    if path.endswith(("q_proj", "k_proj")) and value.ndim == 2 and value.shape[0] % head_dim == 0:
        for name, order in (("halves", _to_halves), ("neighbours", _to_neighbours)):
            if _squared(original, order(value, head_dim)) <= enough:
                return _damage(
                    path,
                    "rotary order",
                    f"its rows are in the other order of rotary pairs (turn to {name}); {measured}",
                )
    block = ".".join(path.split(".")[:2]) + "."
    for other, layer in originals.items():
        same_shape = other != path and tuple(layer.weight.get_value().shape) == original.shape
        near = other.startswith(block) or other.split(".")[2:] == path.split(".")[2:]
        if same_shape and near and _squared(np.asarray(_plain(layer.weight.get_value())), value) <= enough:
            return _damage(path, "swapped", f"it holds the weights of {other}; {measured}")
    rowwise = np.sum(value * original, axis=-1, keepdims=True) / np.maximum(
        np.sum(value * value, axis=-1, keepdims=True), 1e-30
    )
    if _squared(original, rowwise * value) <= enough:
        odd = int(np.sum(np.abs(rowwise - 1) > 0.1))
        return _damage(path, "wrong scale", f"the scales of {odd} of its rows are wrong; {measured}")
    if dead > 0.3:
        return _damage(path, "zeroed scales", f"{dead:.0%} of its values decode to zero; {measured}")
    if error < _UNRELATED:
        return None
    return _damage(path, "other weights", f"{measured}; no factor, order or other layer explains it")


def block_faults(model: CausalLM, passed: FloatPass) -> list[Finding]:
    """Each block of a quantized model, run on what enters it in the float model.

    Error relative to what the block adds: ‖y − y_float‖² / ‖y_float − x‖². A block stands out where it is ten times
    the median of the others.
    """
    errors = []
    for index, block in enumerate(model.blocks):
        x, y = passed.states[index], passed.states[index + 1]
        errors.append(float(_added_error(apply(block, x, passed.contexts[index]), y, x)))
    found = []
    for index, error in enumerate(errors):
        median = float(np.median([*errors[:index], *errors[index + 1 :]])) if len(errors) > 1 else 0.0
        if not error <= max(_BLOCK_TIMES * median, _BLOCK_LEAST):
            said = f"on the float model's own input its output is off by {error:.3g} of what it adds"
            found.append(
                _damage(f"blocks.{index}", "block output", f"{said}; the median of the others is {median:.2g}")
            )
    return found


def accuracy_findings(sensitivities: Sequence[LayerSensitivity], seen: Sequence[LayerOutliers]) -> list[Finding]:
    """Where the loss of one scheme comes from."""
    found = []
    total = sum(each.kl for each in sensitivities)
    ranked = sorted(sensitivities, key=lambda each: -each.kl)
    for each in ranked:
        if len(ranked) > 4 and each.kl > _CONCENTRATED * total > 0:
            found.append(
                Finding(
                    case="accuracy loss",
                    where=each.path,
                    cause="one layer",
                    said=f"alone at {each.scheme} it costs {each.kl:.3g} nats a token, {each.kl / total:.0%} of the "
                    f"sum over {len(ranked)} layers",
                    remedy="give it more bits: --bits B writes a recipe that spends a budget by these measurements",
                )
            )
    for each in sorted(seen, key=lambda each: -each.input_ratio)[:5]:
        if each.input_ratio > _OUTLIER:
            found.append(
                Finding(
                    case="accuracy loss",
                    where=each.path,
                    cause="outlier channel",
                    said=f"channel {each.channel} of its input reaches {each.largest:.4g}, {each.input_ratio:.0f} "
                    "times the median channel",
                    remedy="keep its input unquantized, or put smoothquant first; for weights awq or gptq, which weigh "
                    "errors by the input",
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of a step that is called again and again with inputs of one kind."""

    compiles_after_first: float  # compilations a call
    seconds: float  # a call, the median
    compiled_seconds: float  # under one jit


def time_step(step: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Timing:
    """Runs a step on several inputs, counting what is compiled after the second call.

    Args:
        step: as it is used.
        calls: arguments of at least four calls, as they come in use: growing shapes compile anew, and that is counted.
    """
    if len(calls) < 4:
        raise InputError(f"{len(calls)} calls: give at least 4, of which the first two warm up")
    for arguments in calls[:2]:
        jax.block_until_ready(step(*arguments))
    counted: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        seconds = [_timed(step, arguments) for arguments in calls[2:]]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    compiled = jax.jit(step)
    jax.block_until_ready(compiled(*calls[-1]))
    again = [_timed(compiled, calls[-1]) for _ in range(max(3, len(calls) - 2))]
    return Timing(
        compiles_after_first=len(counted) / len(seconds),
        seconds=float(np.median(seconds)),
        compiled_seconds=float(np.median(again)),
    )


def speed_findings(
    timing: Timing | None, *, packed_seconds: float, float_seconds: float, decode_seconds: float
) -> list[Finding]:
    """What makes a step slow.

    Args:
        timing: of the step as the caller runs it; None where that is our own.
        packed_seconds: one block, one token, weights packed.
        float_seconds: the same with decoded weights.
        decode_seconds: decoding the block's weights alone.
    """
    found = []
    if timing is not None and timing.compiles_after_first >= 0.5:
        found.append(
            Finding(
                case="slow inference",
                where="step",
                cause="recompiles",
                said=f"{timing.compiles_after_first:.1f} compilations a call after the first two",
                remedy="keep shapes equal (pad to buckets, a cache of fixed capacity) and static arguments hashable",
            )
        )
    elif timing is not None and timing.seconds > 2 * timing.compiled_seconds:
        found.append(
            Finding(
                case="slow inference",
                where="step",
                cause="not compiled",
                said=f"{1e3 * timing.seconds:.2f} ms a call, {1e3 * timing.compiled_seconds:.2f} ms under one jax.jit",
                remedy="put jax.jit (or nnx.jit) around the whole step",
            )
        )
    if packed_seconds > 1.1 * float_seconds and decode_seconds > 0.4 * packed_seconds:
        found.append(
            Finding(
                case="slow inference",
                where="blocks",
                cause="decoding dominates",
                said=f"a packed block takes {1e3 * packed_seconds:.2f} ms a token, a float one "
                f"{1e3 * float_seconds:.2f}; decoding its weights takes {1e3 * decode_seconds:.2f}",
                remedy="the format saves memory here and no time: use a format that this device multiplies natively "
                "(`jquant formats`, `jquant hardware`), larger batches, or decoded weights",
            )
        )
    return found


def block_seconds(block: Any, x: Array, context: Any, *, repeats: int = 7) -> tuple[float, float]:
    """Seconds of one compiled call of a block, and of decoding its packed weights alone (0 where none is packed)."""
    apply(block, x, context)
    whole = float(np.median([_timed(apply, (block, x, context)) for _ in range(repeats)]))
    kinds = (QuantizedLinear, QuantizedExpertLinear)
    packed: list[Any] = [module for _, module in named_modules(block, kinds)]
    weights = [module.weight.get_value() for module in packed]
    if not weights:
        return whole, 0.0
    _decode_all(weights)
    return whole, float(np.median([_timed(_decode_all, (weights,)) for _ in range(repeats)]))


def _timed(step: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - began


@jax.jit
def _decode_all(weights: list[QTensor]) -> list[Array]:
    return [dequantize(weight) for weight in weights]


def _damage(where: str, cause: str, said: str) -> Finding:
    remedies = {
        "zeroed scales": "quantize the layer again from the original; the file or its writer is damaged",
        "wrong scale": "quantize the layer again; a scale was inverted, doubled or stored in another format",
        "rotary order": "permute the rows of q and k: GGUF's llama files and Hugging Face's differ in it",
        "swapped": "the loader's table of names is wrong for this family",
        "not finite": "quantize again from finite weights; calibration that overflowed gives this",
        "block output": "its layers, norms or folded scales are wrong: see the layers of this block",
    }
    remedy = remedies.get(cause, "load the original weights again and quantize anew")
    return Finding(case="gibberish", where=where, cause=cause, said=said, remedy=remedy)


def _plain(weight: Any) -> Array:
    return dequantize(weight, jnp.float32) if isinstance(weight, QTensor) else weight.astype(jnp.float32)


def _squared(original: np.ndarray, value: np.ndarray) -> float:
    return float(np.sum((original - value) ** 2) / max(np.sum(original**2), 1e-30))


def _to_halves(value: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows (0 1) (2 3) … of each head to (0 d/2) (1 d/2+1) …: first of each pair, then second."""
    return value.reshape(-1, head_dim // 2, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


def _to_neighbours(value: np.ndarray, head_dim: int) -> np.ndarray:
    return value.reshape(-1, 2, head_dim // 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


@jax.jit
def _error(original: Array, value: Array) -> Array:
    error = original - value
    return jnp.sum(error * error) / jnp.maximum(jnp.sum(original * original), 1e-30)


@partial(jax.jit, static_argnames="scheme")
def _rounding_error(original: Array, scheme: Scheme) -> Array:
    return _error(original, dequantize(quantize(original, scheme), jnp.float32))


@jax.jit
def _added_error(y: Array, wanted: Array, x: Array) -> Array:
    y, wanted, x = (each.astype(jnp.float32) for each in (y, wanted, x))
    return jnp.sum((y - wanted) ** 2) / jnp.maximum(jnp.sum((wanted - x) ** 2), 1e-30)
