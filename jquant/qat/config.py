"""How a model is trained. No jax here: the command line reads it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from jquant.core.errors import InputError

# Fields that change what is watched and kept, not one bit of what is computed; and the mesh, on which the order of sums
# depends and nothing else: a run may go on where other devices are free.
_NOT_DECISIVE = ("mesh", "eval_every", "checkpoint_every", "keep", "best", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """Training of a model with fake quantization: length, rates, stages, data order, devices."""

    learning_rate: float = 1e-5
    """Of weights, at its highest: it rises over `warmup_steps`, then falls along a half cosine."""
    scale_learning_rate: float | None = None
    """Of quantization parameters (scales, bounds, zero points); by default `learning_rate`."""
    final_rate: float = 0.0
    """The rates at the last step, as a share of their highest."""
    weight_decay: float = 0.0
    """AdamW's, on matrices; norms, biases and quantization parameters have none."""
    adam_b1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_b2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    max_grad_norm: float = 1.0
    """Gradients together are scaled down to this norm."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are, as `embed`."""

    num_epochs: int = 1
    """Passes over the data; `steps` goes before it."""
    steps: int | None = None
    """Optimizer steps; by default what `num_epochs` come to."""
    warmup_steps: int | None = None
    """Steps over which the rates rise; by default a tenth of the steps, at most 100."""
    batch: int = 8
    """Rows a forward pass, over all devices."""
    gradient_accumulation: int = 1
    """Forward and backward passes a step, each over `batch` rows."""
    seed: int = 0
    """Of the order of the data."""

    start_quantizing_at: int = 0
    """Delayed start: before this step the model trains in floats."""
    gradual_bits: tuple[tuple[int, int], ...] = ()
    """Pairs (step, bits): before that step, weights have so many bits; after the last, the recipe's."""
    freeze_observers_at: int | None = None
    """From this step on the ranges of activations stay; by default from half of the steps on."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of computation; masters and the optimizer's state are float32."""
    mesh: str = ""
    """Devices by axis, as `data=4,fsdp=2`: rows are spread over both, parameters over fsdp, and over tensor where it is
    named; empty for one device."""

    eval_every: int | None = None
    """Steps between evaluations; the last step always has one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; by default a tenth of the steps, at least 10. The last step always has one."""
    keep: int = 2
    """The latest checkpoints that are kept, beside the best."""
    best: str | None = None
    """The figure of an evaluation, lower being better, whose best checkpoint is kept and is the result."""
    tensorboard: bool = False
    """Also log to TensorBoard."""

    def __post_init__(self) -> None:
        for name in ("batch", "gradient_accumulation", "num_epochs", "keep"):
            _at_least(self, name, 1)
        for name in ("steps", "eval_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        for name in ("warmup_steps", "freeze_observers_at", "start_quantizing_at", "seed"):
            if getattr(self, name) is not None:
                _at_least(self, name, 0)
        for name in ("learning_rate", "max_grad_norm"):
            _number(self, name, "above 0", lambda value: value > 0)
        if self.scale_learning_rate is not None:
            _number(self, "scale_learning_rate", "at least 0", lambda value: value >= 0)
        _number(self, "weight_decay", "at least 0", lambda value: value >= 0)
        _number(self, "final_rate", "0 to 1", lambda value: 0 <= value <= 1)
        for name in ("adam_b1", "adam_b2"):
            _number(self, name, "0 to 1, 1 excluded", lambda value: 0 <= value < 1)
        steps = [step for step, _ in self.gradual_bits]
        if steps != sorted(set(steps)) or any(step < 1 for step in steps):
            raise InputError(f"gradual_bits {self.gradual_bits}: steps must rise, the first at least 1")
        if any(not 2 <= bits <= 8 for _, bits in self.gradual_bits):
            raise InputError(f"gradual_bits {self.gradual_bits}: bits must be 2 to 8")

    @property
    def rows_per_step(self) -> int:
        """Rows of data that one optimizer step sees."""
        return self.batch * self.gradient_accumulation

    def with_steps(self, rows: int | None) -> QATConfig:
        """The config with what follows from the number of steps filled in, for so many rows of data.

        Raises:
            InputError: there are fewer rows than a step takes, the number of steps follows from nothing, or a stage
                lies behind the last step.
        """
        steps = self.steps
        if rows is not None and rows < self.rows_per_step:
            raise InputError(
                f"{rows} rows of data, and a step takes {self.rows_per_step} (batch {self.batch} × "
                f"gradient_accumulation {self.gradient_accumulation}): give more data, or a smaller batch"
            )
        if steps is None:
            if rows is None:
                raise InputError("steps is None and the data does not say how long an epoch is: give steps")
            steps = max(1, self.num_epochs * rows // self.rows_per_step)
        warmup = min(100, steps // 10) if self.warmup_steps is None else self.warmup_steps
        frozen_at = steps // 2 if self.freeze_observers_at is None else self.freeze_observers_at
        last_bits = max((step for step, _ in self.gradual_bits), default=0)
        for name, step in (
            ("warmup_steps", warmup),
            ("start_quantizing_at", self.start_quantizing_at),
            ("gradual_bits", last_bits),
        ):
            if step >= steps:
                raise InputError(f"{name} reaches to step {step} of {steps}: nothing is trained behind it; lower it")
        checkpoint_every = max(10, -(-steps // 10)) if self.checkpoint_every is None else self.checkpoint_every
        return dataclasses.replace(
            self, steps=steps, warmup_steps=warmup, freeze_observers_at=frozen_at, checkpoint_every=checkpoint_every
        )

    def as_json(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        return dataclasses.asdict(self)

    def decisive(self) -> dict[str, Any]:
        """The fields that decide what is computed: a run is resumed only where these agree."""
        return {name: value for name, value in self.as_json().items() if name not in _NOT_DECISIVE}


def _at_least(config: QATConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def _number(config: QATConfig, name: str, allowed: str, holds: Any) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not holds(value):
        raise InputError(f"{name} is {value!r}; it must be {allowed}")
