"""Stages of quantization-aware training: what its quantizers do from one step on.

Each sets static attributes of modules: split the model again afterwards, and one compilation follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.nn.fake_quant import InputQuantizer, WeightQuantizer
from jquant.nn.surgery import Path
from jquant.qat.second_level import share_levels


def set_enabled(model: nnx.Module, enabled: bool) -> None:
    """Whether weights and inputs are quantized, or pass as they are: training that starts in floats."""
    for _, quantizer in _quantizers(model):
        quantizer.enabled = enabled


def set_observing(model: nnx.Module, observing: bool) -> None:
    """Whether static scales of inputs follow what passes, or stay. Trained ones and dynamic ones are not concerned."""
    for _, quantizer in _quantizers(model):
        if isinstance(quantizer, InputQuantizer) and quantizer.seen is not None and quantizer.log_scale is None:
            quantizer.observing = observing


def set_bits(model: nnx.Module, bits: int | None) -> None:
    """Gradual bits: integer weights of at least these bits; None for those of the recipe.

    A weight whose recipe asks for more bits than these keeps its own.

    Raises:
        InputError: no weight is an integer.
    """
    found = False
    for _, quantizer in _quantizers(model):
        if isinstance(quantizer, WeightQuantizer) and isinstance(quantizer.final_scheme.element, Int):
            found = True
            element = quantizer.final_scheme.element
            width = element.bits if bits is None else max(bits, element.bits)
            wider = dataclasses.replace(quantizer.final_scheme, element=Int(width, element.convention))
            if wider != quantizer.scheme:
                quantizer.set_scheme(wider)
    share_levels(model)
    if not found:
        raise InputError(f"gradual bits ({bits}): no weight of the model is an integer; leave the schedule out")


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    run: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
) -> None:
    """Starts trained input scales (lsq, pact) from what passes in some batches; weights are quantized meanwhile.

    Args:
        model: prepared.
        batches: what `run` takes.
        run: the forward pass.

    Raises:
        InputError: a layer saw no input; it is named.
    """
    waiting = [(path, q) for path, q in _quantizers(model) if isinstance(q, InputQuantizer) and not q.calibrated]
    if not waiting:
        return
    for _, quantizer in waiting:
        quantizer.enabled, quantizer.observing = False, True
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def observe(params: Any, rest: Any, batch: Any) -> Any:
        merged = nnx.merge(graphdef, params, rest)
        run(merged, batch)
        return nnx.state(merged, nnx.Not(nnx.Param))

    for batch in batches:
        rest = observe(params, rest, batch)
    nnx.update(model, rest)
    for path, quantizer in waiting:
        quantizer.enabled = True
        try:
            quantizer.start_from_seen()
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def _quantizers(model: nnx.Module) -> Iterator[tuple[Path, WeightQuantizer | InputQuantizer]]:
    """Raises InputError where there are none."""
    found = [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_graph(model)
        if isinstance(module, WeightQuantizer | InputQuantizer)
    ]
    if not found:
        raise InputError("the model has no fake-quantized layers: prepare it first, jquant.qat.prepare")
    yield from found
