"""Which stage of training a step belongs to: float or quantized, at how many bits, with ranges observed or fixed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from flax import nnx

from jquant.nn.fake_quant import FakeQuantModule, WeightQuantizer
from jquant.qat.config import QATConfig
from jquant.qat.stage import set_bits, set_enabled, set_observing


class Stage(NamedTuple):
    """What is static in a model's fake quantization; each change compiles the step once more."""

    enabled: bool
    observing: bool
    bits: int | None  # None: the recipe's

    @property
    def is_final(self) -> bool:
        """Whether weights and inputs are quantized as the recipe says."""
        return self.enabled and self.bits is None


FINAL = Stage(enabled=True, observing=False, bits=None)  # how a trained model is evaluated and converted


def stage_at(config: QATConfig, step: int) -> Stage:
    """The stage of a step, counted from 0; `config` has its steps filled in."""
    assert config.freeze_observers_at is not None
    return Stage(
        enabled=step >= config.start_quantizing_at,
        observing=step < config.freeze_observers_at,
        bits=next((bits for before, bits in config.gradual_bits if step < before), None),
    )


def enter(model: nnx.Module, stage: Stage, config: QATConfig) -> None:
    """Puts the model's layers into the stage, in place; a model without such layers stays as it is.

    Raises:
        InputError: the config asks for stages, and the model has no layers, or no weights, that they concern.
    """
    staged = bool(config.start_quantizing_at or config.gradual_bits)
    if not staged and not any(isinstance(module, FakeQuantModule) for _, module in nnx.iter_graph(model)):
        return
    set_enabled(model, stage.enabled)
    set_observing(model, stage.observing)
    if config.gradual_bits:
        set_bits(model, stage.bits)


@contextlib.contextmanager
def rounded_to_nearest(model: nnx.Module) -> Iterator[None]:
    """Weights that training rounds stochastically, as the converted model has them: what is evaluated."""
    found = [module for _, module in nnx.iter_graph(model) if isinstance(module, WeightQuantizer)]
    streams = [quantizer.rngs for quantizer in found]
    for quantizer in found:
        quantizer.rngs = None
    try:
        yield
    finally:
        for quantizer, stream in zip(found, streams, strict=True):
            quantizer.rngs = stream
