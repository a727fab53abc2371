"""PTQ or QAT: the advice that follows from a measured loss, a requirement, and what training would cost.

    operations  6·N·D for training, and 2·N·D for the forward pass of a teacher where QAT distils
    time        operations / (rate · utilization · devices)
    memory      20 bytes a parameter: float32 masters, gradients and Adam's two moments (16), the bfloat16 weights that
                the forward pass multiplies (2), and a bfloat16 teacher (2); activations come on top

Reference: 6·N·D: Kaplan et al., 2001.08361, 2.1; Hoffmann et al., 2203.15556, appendix F. Bytes: ZeRO, Rajbhandari et
al., 1910.02054, 3.1, with float32 gradients. The thresholds are those of the guide this project follows (6.1.3).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jquant.core.errors import InputError
from jquant.core.scheme import Scheme
from jquant.hardware.devices import find_device
from jquant.hardware.free_memory import size_text

Requirement = Literal["strict", "moderate", "relaxed"]
Recommendation = Literal["ptq", "qat", "qat_if_ptq_fails", "measure_ptq_first"]

# Losses in percent that each requirement tolerates. The guide (QATDecisionMaker) has two numbers: 5 where accuracy is
# strict, 10 otherwise. Another tolerance may be given.
TOLERANCE: dict[str, float] = {"strict": 5.0, "moderate": 10.0, "relaxed": 10.0}
# Parameters beyond which the guide advises against QAT before all else was tried; a stated budget of hours replaces it.
LARGE_MODEL = 70e9
# Share of the peak rate that training reaches: 38 to 43 % for Llama 3 405B on H100 (2407.21783, table 4). The measure
# is PaLM's (Chowdhery et al., 2204.02311, appendix B): operations that the model needs, those of
# rematerialization not counted.
UTILIZATION = 0.4

_STUDENT_BYTES, _TEACHER_BYTES = 18, 2  # a parameter


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast one device trains."""

    device: str
    flops: float  # operations a second: the peak
    utilization: float  # share of the peak that is reached
    memory_bytes: float | None  # None: not known
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.flops < math.inf:
            raise InputError(f"rate of {self.flops:g} operations a second: it must be positive and finite")
        if not 0 < self.utilization <= 1:
            raise InputError(
                f"utilization {self.utilization:g}: it is the share of the peak rate that training reaches, above 0 "
                f"and at most 1, as {UTILIZATION}"
            )
        if self.memory_bytes is not None and not self.memory_bytes > 0:
            raise InputError(f"memory of {self.memory_bytes:g} bytes: it must be positive")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the advice depends on."""

    scheme: Scheme  # of the weights
    requirement: Requirement
    parameters: int  # of the model; where it has experts, time counts as if all of them worked on each token
    tokens: int  # that QAT would train on
    rate: Rate
    devices: int = 1
    ptq_loss_percent: float | None = None  # of the best PTQ method tried, see `decide`; None: not measured
    tolerance_percent: float | None = None  # by default the requirement's, see TOLERANCE
    distilled: bool = True  # QAT learns from the float model's logits
    budget_hours: float | None = None  # of wall time; by default what is too much follows from LARGE_MODEL

    def __post_init__(self) -> None:
        if self.requirement not in get_args(Requirement):
            raise InputError(f"requirement {self.requirement!r}: it must be {', '.join(get_args(Requirement))}")
        for name in ("parameters", "tokens", "devices"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: it must be at least 1")
        if self.ptq_loss_percent is not None and math.isnan(self.ptq_loss_percent):
            raise InputError("the PTQ loss is NaN: the quantized model is broken, or was not measured; leave it out")
        for name in ("tolerance_percent", "budget_hours"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} {value:g}: it must be positive")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What QAT of all parameters would take. Rematerialized activations add up to a third to the time."""

    training_flops: float
    teacher_flops: float  # 0 where it does not distil
    hours: float  # of wall time, on all devices together
    device_hours: float
    memory_bytes: float  # of all devices together, activations not counted
    available_bytes: float | None
    frozen_base_bytes: float  # of the weights alone where they stay quantized under trained adapters (qat/lora.py)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The advice, and in full sentences why."""

    recommendation: Recommendation
    reasons: tuple[str, ...]
    cost: Cost

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "reasons": list(self.reasons)}


def device_rate(name: str, *, utilization: float = UTILIZATION) -> Rate:
    """The rate of a device in the table of `hardware.devices`.

    Raises:
        InputError: it is unknown, or no bf16 rate of it has a source.
    """
    device = find_device(name)
    figure = device.rates.get("bf16")
    if figure is None:
        raise InputError(
            f"device {device.name}: no bf16 rate with a source is known; give the rate of your own training step, in "
            "TFLOP/s (--tflops)"
        )
    return Rate(
        device=device.name,
        flops=figure.value * 1e12,
        utilization=utilization,
        memory_bytes=None if device.memory_gb is None else device.memory_gb.value * 1e9,
        source=f"dense bf16; {figure.source}",
    )


def measured_rate(tflops: float, *, memory_gb: float | None = None) -> Rate:
    """A rate that a training step of one's own reached on one device: 6 · parameters · tokens / seconds."""
    memory = None if memory_gb is None else memory_gb * 1e9
    return Rate(device="device", flops=tflops * 1e12, utilization=1.0, memory_bytes=memory, source="as measured")


def decide(question: Question) -> Decision:
    """Whether to stay with PTQ.

        no loss measured                        measure_ptq_first
        loss ≤ tolerance                        ptq
        loss > tolerance, QAT is affordable     qat
        loss > tolerance otherwise              qat_if_ptq_fails: better PTQ, more bits, adapters on a frozen base first

    QAT is not affordable where its memory exceeds the devices', or its time the budget; without a budget, where the
    model has more than 70 billion parameters (the guide's rule). From 8 bits on it is never the first advice.

    Args:
        question: its loss is the increase of perplexity over the float model's, or the decrease of a score, in percent
            of the float model's; negative where the quantized model is the better one, infinite where it is broken.

    Returns:
        The advice, its reasons with the numbers that decided, and the cost of QAT.

    Departs from the guide in that a loss that was measured within the tolerance means PTQ at any bits (the guide takes
    QAT at 4 bits and strict accuracy unseen), that nothing measured means measure, and that the cost is worked out (the
    guide has an hour a billion parameters, without a source).
    """
    cost = estimate_cost(question)
    loss, tolerance = question.ptq_loss_percent, _tolerance(question)
    if loss is None:
        return Decision(
            recommendation="measure_ptq_first",
            reasons=(_measure_first(question, tolerance), *_about_bits(question), _about_cost(question, cost)),
            cost=cost,
        )
    if loss <= tolerance:
        within = f"PTQ to {question.scheme} loses {loss:.3g} %, within the {tolerance:g} % that {_whose(question)}."
        return Decision(recommendation="ptq", reasons=(within, _about_cost(question, cost)), cost=cost)
    beyond = f"PTQ to {question.scheme} loses {loss:.3g} %, more than the {tolerance:g} % that {_whose(question)}."
    obstacles = _obstacles(question, cost)
    reasons = (beyond, *_about_bits(question), *obstacles, _about_cost(question, cost))
    return Decision(recommendation="qat_if_ptq_fails" if obstacles else "qat", reasons=reasons, cost=cost)


def estimate_cost(question: Question) -> Cost:
    """Operations, time and memory of QAT, by the formulas above."""
    n, d, rate = question.parameters, question.tokens, question.rate
    training, teacher = 6.0 * n * d, 2.0 * n * d if question.distilled else 0.0
    device_hours = (training + teacher) / (rate.flops * rate.utilization) / 3600
    return Cost(
        training_flops=training,
        teacher_flops=teacher,
        hours=device_hours / question.devices,
        device_hours=device_hours,
        memory_bytes=float(n * (_STUDENT_BYTES + (_TEACHER_BYTES if question.distilled else 0))),
        available_bytes=None if rate.memory_bytes is None else rate.memory_bytes * question.devices,
        frozen_base_bytes=n * question.scheme.bits_per_weight / 8,
    )


def render(decision: Decision) -> str:
    """The advice as text for a terminal, a reason a paragraph."""
    titles: dict[Recommendation, str] = {
        "ptq": "Stay with PTQ.",
        "qat": "Train with quantization (QAT).",
        "qat_if_ptq_fails": "Try better PTQ first; train with quantization (QAT) if that fails.",
        "measure_ptq_first": "Measure PTQ first.",
    }
    return "\n".join([titles[decision.recommendation], *(f"- {reason}" for reason in decision.reasons)])


def _tolerance(question: Question) -> float:
    given = question.tolerance_percent
    return TOLERANCE[question.requirement] if given is None else given


def _whose(question: Question) -> str:
    if question.tolerance_percent is not None:
        return "was given as tolerance"
    return f"a {question.requirement} requirement tolerates (the guide's threshold)"


def _measure_first(question: Question, tolerance: float) -> str:
    return (
        f"No PTQ loss was given, and what {question.scheme} loses differs from model to model: measure it with the "
        f"best PTQ method, jquant quantize MODEL --method gptq --scheme {question.scheme} --out OUT, then jquant eval "
        f"OUT and jquant eval MODEL, and come back with the increase of perplexity in percent; up to {tolerance:g} %, "
        f"which {_whose(question)}, PTQ is enough."
    )


def _about_bits(question: Question) -> tuple[str, ...]:
    bits = question.scheme.element.bits
    if bits <= 4:
        return (
            f"Weights of {bits} bits are where training recovers most: at 4 bits and below QAT often beats PTQ (the "
            "guide, 6.1.3; LLM-QAT, 2305.17888).",
        )
    return ()


def _obstacles(question: Question, cost: Cost) -> tuple[str, ...]:
    """Why QAT is not the first thing to do; empty where it is."""
    found = []
    bits = question.scheme.element.bits
    if bits >= 8:
        found.append(
            f"At {bits} bits PTQ alone usually stays within 1 % (jquant sweep on the demo model: int8:channel 0.6 %): "
            "look for the cause first, as outliers in activations (SmoothQuant) or too coarse a granularity."
        )
    if cost.available_bytes is not None and cost.memory_bytes > cost.available_bytes:
        needed = math.ceil(cost.memory_bytes / cost.available_bytes * question.devices)
        found.append(
            f"QAT of all weights needs {size_text(cost.memory_bytes)} before activations, {question.devices} "
            f"device{'s have' if question.devices > 1 else ' has'} {size_text(cost.available_bytes)}: it takes "
            f"{needed} of them. Adapters over a frozen {question.scheme} base hold "
            f"{size_text(cost.frozen_base_bytes)} of weights (jquant.qat.lora; QLoRA, 2305.14314)."
        )
    if question.budget_hours is not None and cost.hours > question.budget_hours:
        found.append(
            f"QAT would take {_hours(cost.hours)}, more than the {_hours(question.budget_hours)} given: fewer tokens, "
            f"or {math.ceil(cost.device_hours / question.budget_hours)} devices, would do."
        )
    if question.budget_hours is None and question.parameters > LARGE_MODEL:
        found.append(
            f"The model has {_count(question.parameters)} parameters, more than the {_count(LARGE_MODEL)} up to which "
            "the guide advises QAT; a budget of hours would decide instead."
        )
    if found:
        found.append("Before it: smaller groups, GPTQ after AWQ, one more bit for the layers that lose most.")
    return tuple(found)


def _about_cost(question: Question, cost: Cost) -> str:
    rate = question.rate
    teacher = f", and {cost.teacher_flops:.2g} (2·N·D) for the teacher" if question.distilled else ""
    share = "" if rate.utilization == 1 else f"{100 * rate.utilization:.3g} % (assumed) of "
    return (
        f"QAT of {_count(question.parameters)} parameters on {_count(question.tokens)} tokens takes "
        f"{cost.training_flops:.2g} operations (6·N·D){teacher}: {_hours(cost.hours)} on {question.devices} × "
        f"{rate.device} at {share}{rate.flops / 1e12:g} TFLOP/s ({rate.source}), and {size_text(cost.memory_bytes)} "
        "before activations."
    )


def _count(value: float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def _hours(value: float) -> str:
    if value >= 48:
        return f"{value / 24:.3g} days"
    if value >= 1:
        return f"{value:.3g} hours"
    return f"{60 * value:.3g} minutes" if value >= 1 / 60 else f"{3600 * value:.2g} seconds"
