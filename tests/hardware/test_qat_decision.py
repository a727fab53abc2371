"""PTQ or QAT: advice follows from loss and tolerance, cost from the formulas; the reasons say the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from jquant.cli import main
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.hardware.qat_decision import (
    TOLERANCE,
    Question,
    Recommendation,
    decide,
    device_rate,
    estimate_cost,
    measured_rate,
    render,
)
from tests.tiny_checkpoint import tiny_model, write


def question(**changes: Any) -> Question:
    """A small model at 3 bits on one H100."""
    values: dict[str, Any] = {
        "scheme": scheme("int3:g64"),
        "requirement": "moderate",
        "parameters": 135_000_000,
        "tokens": 100_000_000,
        "rate": device_rate("h100-sxm"),
    }
    return Question(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "measure_ptq_first"),
        ({"requirement": "strict"}, "measure_ptq_first"),
        ({"ptq_loss_percent": -0.2}, "ptq"),
        ({"ptq_loss_percent": 10.0}, "ptq"),
        ({"ptq_loss_percent": 10.01}, "qat"),
        ({"ptq_loss_percent": float("inf")}, "qat"),
        ({"ptq_loss_percent": 5.0, "requirement": "strict"}, "ptq"),
        ({"ptq_loss_percent": 5.1, "requirement": "strict"}, "qat"),
        ({"ptq_loss_percent": 5.1, "requirement": "strict", "tolerance_percent": 6.0}, "ptq"),
        ({"ptq_loss_percent": 5.1, "requirement": "relaxed", "tolerance_percent": 2.0}, "qat"),
        ({"ptq_loss_percent": 40.0, "budget_hours": 0.01}, "qat_if_ptq_fails"),
        ({"ptq_loss_percent": 40.0, "budget_hours": 1.0}, "qat"),
        ({"ptq_loss_percent": 40.0, "parameters": 5_000_000_000}, "qat_if_ptq_fails"),  # 100 GB on 80
        ({"ptq_loss_percent": 40.0, "parameters": 5_000_000_000, "distilled": False, "devices": 2}, "qat"),
        ({"ptq_loss_percent": 40.0, "parameters": 71_000_000_000, "devices": 64}, "qat_if_ptq_fails"),
        ({"ptq_loss_percent": 40.0, "parameters": 71_000_000_000, "devices": 64, "budget_hours": 100.0}, "qat"),
        ({"ptq_loss_percent": 40.0, "scheme": scheme("int8:channel")}, "qat_if_ptq_fails"),
    ],
)
def test_advice(changes: dict[str, Any], advice: Recommendation) -> None:
    decision = decide(question(**changes))
    assert decision.recommendation == advice
    assert all(reason.endswith(".") for reason in decision.reasons)
    assert len(render(decision).splitlines()) == 1 + len(decision.reasons)


def test_reasons_say_the_numbers_that_decided() -> None:
    text = render(decide(question(ptq_loss_percent=41.3, requirement="strict")))
    for said in ("41.3 %", "5 %", "strict", "135 million", "8.1e+16", "2.7e+16", "989.4 TFLOP/s", "40 %", "2.7 GB"):
        assert said in text
    assert "jquant quantize MODEL --method gptq --scheme int3:g64" in render(decide(question()))
    text = render(decide(question(ptq_loss_percent=41.3, parameters=70_600_000_000)))
    for said in ("1.41 TB", "80 GB", "18 of them", "30.9 GB", "70 billion", "GPTQ"):
        assert said in text


def test_cost_is_that_of_the_formulas() -> None:
    asked = question(parameters=10**9, tokens=10**9, devices=4, rate=measured_rate(100.0, memory_gb=50))
    cost = estimate_cost(asked)
    assert (cost.training_flops, cost.teacher_flops) == (6e18, 2e18)
    assert cost.device_hours == pytest.approx(8e18 / 100e12 / 3600)
    assert cost.hours == pytest.approx(cost.device_hours / 4)
    assert (cost.memory_bytes, cost.available_bytes) == (20e9, 200e9)
    assert cost.frozen_base_bytes == pytest.approx(1e9 * 3.5 / 8)  # int3 and a float32 scale a group of 64
    alone = estimate_cost(question(distilled=False))
    assert (alone.teacher_flops, alone.memory_bytes) == (0, 18 * 135e6)
    half = estimate_cost(question(rate=device_rate("h100-sxm", utilization=0.2)))
    assert half.hours == pytest.approx(2 * estimate_cost(question()).hours)


def test_the_guides_thresholds() -> None:
    assert TOLERANCE == {"strict": 5.0, "moderate": 10.0, "relaxed": 10.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requirement": "very"}, "requirement 'very'"),
        ({"parameters": 0}, "parameters 0"),
        ({"tokens": -1}, "tokens -1"),
        ({"devices": 0}, "devices 0"),
        ({"ptq_loss_percent": float("nan")}, "NaN"),
        ({"tolerance_percent": 0.0}, "tolerance_percent 0"),
        ({"budget_hours": -2.0}, "budget_hours -2"),
    ],
)
def test_bad_questions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        question(**changes)


def test_bad_rates() -> None:
    with pytest.raises(InputError, match=r"'h1000' is unknown.*known are h100-sxm, .*tpu-v6e"):
        device_rate("h1000")
    with pytest.raises(InputError, match=r"m4-max: no bf16 rate .*--tflops"):
        device_rate("m4-max")
    with pytest.raises(InputError, match=r"utilization 1\.5"):
        device_rate("h200", utilization=1.5)
    for rate in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="rate of"):
            measured_rate(rate)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--parameters", "7B", "--scheme", "int4:g128", "--ptq-loss", "3"]) == 0
    assert "Stay with PTQ" in capsys.readouterr().out
    model = str(write(tmp_path / "tiny"))
    words = [
        "advise",
        model,
        "--scheme",
        "int2:g32",
        "--ptq-loss",
        "300",
        "--tflops",
        "0.05",
        "--tokens",
        "1M",
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommendation"] == "qat"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tiny_model())))
    assert found["cost"]["training_flops"] == 6e6 * parameters
    for words, message in [
        (["--scheme", "int4", "--parameters", "many"], "parameters 'many'"),
        (["--scheme", "int4", "--parameters", "7B", "--device", "tpu-v9"], "'tpu-v9' is unknown"),
        (["--scheme", "int4", "--parameters", "7B", "--requirement", "strict", "--ptq-loss", "nan"], "NaN"),
    ]:
        assert main(["advise", *words]) == 2
        assert message in capsys.readouterr().err
    for words, message in [
        (["--scheme", "int4"], "either MODEL"),
        (["--scheme", "int4", "--parameters", "7B", "--device", "h200", "--tflops", "9"], "not both"),
    ]:
        with pytest.raises(SystemExit):  # the parser's own way to refuse: exit code 2
            main(["advise", *words])
        assert message in capsys.readouterr().err
