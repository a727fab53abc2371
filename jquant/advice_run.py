"""The conversation of `jquant advise`: questions on a terminal, then a recommendation, then PTQ or QAT.

Stands above the rooms, like the command line.
"""

from __future__ import annotations

from rich.console import Console
from rich.prompt import Prompt

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.hardware.interview import LOCAL, ask_constraints, ask_measurement
from jquant.hardware.local import local_device
from jquant.hardware.qat_decision import Decision, Question, decide, device_rate, render
from jquant.hardware.recommend import FLOAT, Recommendation
from jquant.hardware.recommendation_table import render as render_recommendation
from jquant.recommendation_run import describe_model, recommend_for

_TRAINING_TOKENS = 100_000_000  # as `jquant advise --tokens`
_TRAINING_DEVICE = "h100-sxm"  # where the device at hand has no rate that is known


def advise_interactively() -> None:
    """Asks on the terminal, and answers.

    Raises:
        InputError: the terminal's input ends before the last question.
    """
    console = Console()
    try:
        _converse(console)
    except EOFError:
        raise InputError("the answers ended before the last question") from None


def _converse(console: Console) -> None:
    def ask(question: str, default: str) -> str:
        return Prompt.ask(question, default=default, console=console)

    def say(line: str) -> None:
        console.print(line, style="red", highlight=False, markup=False)

    known = local_device().known
    config = ask_constraints(ask, say, describe_model, device=LOCAL if known is None else known.name)
    found = recommend_for(config)
    console.print()
    console.print(render_recommendation(found))
    console.print()
    measured = ask_measurement(ask, say, default=_wanted(found))
    device = found.constraints.device
    name = device.name if device.rate("bf16") is not None and config.device is not None else _TRAINING_DEVICE
    decision = decision_about(
        found, measured.scheme, measured.loss_percent, training_device=name, max_loss=config.max_loss
    )
    console.print()
    console.print(render(decision), highlight=False, markup=False)


def decision_about(
    found: Recommendation, spec: str, loss_percent: float | None, *, training_device: str, max_loss: float
) -> Decision:
    """PTQ or QAT for the model of a recommendation, with the loss that it was asked for as tolerance."""
    return decide(
        Question(
            scheme=scheme(spec),
            requirement="moderate",
            parameters=found.constraints.shape.parameters,
            tokens=_TRAINING_TOKENS,
            rate=device_rate(training_device),
            devices=found.constraints.devices,
            ptq_loss_percent=loss_percent,
            tolerance_percent=max_loss or None,
        )
    )


def _wanted(found: Recommendation) -> str:
    """The best option's scheme; else that of least bits which only loses too much."""
    quantized = [option.candidate.scheme for option in found.options if option.candidate.scheme != FLOAT]
    return quantized[0] if quantized else "int4:g128:asym:fp16"
