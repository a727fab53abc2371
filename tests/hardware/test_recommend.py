"""Recommendations follow from what fits, what is native and what is lost; every rejection says why."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.hardware.devices import DEVICES, find_device
from jquant.hardware.expected_loss import MEASURED, PRIOR, ExpectedLoss
from jquant.hardware.recommend import CANDIDATES, Candidate, Constraints, Option, Recommendation, recommend
from jquant.hardware.recommendation_table import render
from jquant.hardware.roofline import Load, memory
from jquant.models.published import PUBLISHED
from jquant.models.shape import model_shape

KNOWN = PUBLISHED["llama-3-70b"]
LLAMA70 = model_shape(KNOWN.config, name=KNOWN.name, source=KNOWN.source)
LLAMA8 = model_shape(PUBLISHED["llama-3-8b"].config, name="llama-3-8b", source="a test")


def asked(device: str, **changes: Any) -> Constraints:
    values = {"shape": LLAMA70, "device": find_device(device), **changes}
    return Constraints(**values)


def reasons(found: Recommendation) -> dict[tuple[str, str], str]:
    return {(each.candidate.scheme, each.candidate.method): "; ".join(each.reasons) for each in found.rejections}


def text(found: Recommendation) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(found))
    return captured.get()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_recommended_fits_keeps_the_loss_and_is_ranked(device: str) -> None:
    constraints = asked(device, shape=LLAMA8, memory_gb=64.0 if DEVICES[device].kind == "cpu" else None)
    found = recommend(constraints, PRIOR)
    assert found.options
    assert len(found.options) + len(found.rejections) == len(CANDIDATES)
    assert constraints.usable is not None
    for option in found.options:
        assert option.memory.total <= constraints.usable
        assert option.loss.percent <= 5
        assert option.loss.source
    seconds = [option.seconds for option in found.options]
    assert all(later >= 0.995 * sooner for sooner, later in pairwise(seconds))
    assert all(each.reasons for each in found.rejections)


def test_llama_70b_on_one_h100_needs_four_bits() -> None:
    found = recommend(asked("h100-sxm"), PRIOR)
    assert all(option.bits_per_weight < 5 for option in found.options)
    why = reasons(found)
    assert "needs 142 GB a device" in why["float", "none"]
    assert "2 devices would do" in why["float", "none"]
    assert "2 devices would do" in why["int8:channel", "smoothquant@int8:token"]
    assert "h100-sxm does not multiply nvfp4" in why["nvfp4", "rtn@nvfp4"]
    best = found.options[0]
    assert "memory and bandwidth gain" in best.notes[0]
    assert best.decode.bound == "bandwidth"
    # The weights are read once a token: 36 GB at 3.35 TB/s.
    assert best.decode.total == pytest.approx(best.memory.weights / 3.35e12, rel=0.05)


def test_two_a100_hold_eight_bits_and_have_no_fp8() -> None:
    found = recommend(asked("a100-80gb", devices=2), PRIOR)
    names = {(option.candidate.scheme, option.candidate.method) for option in found.options}
    assert ("int8:channel", "smoothquant@int8:token") in names
    why = reasons(found)
    assert (
        "a100-80gb does not multiply fp8 but int8, int4: decoded to bf16 first"
        in why["fp8_e4m3:channel", "rtn@fp8_e4m3:token"]
    )
    assert "accuracy and gain nothing" in why["fp8_e4m3:channel", "rtn@fp8_e4m3:token"]
    assert any("two all-reduces a block" in caveat for caveat in found.caveats)


def test_an_rtx_4090_cannot_hold_it_and_says_how_many_would() -> None:
    found = recommend(asked("rtx-4090"), PRIOR)
    assert not found.options
    assert "2 devices would do" in reasons(found)["int4:g128:asym:fp16", "gptq"]
    said = text(found)
    assert "Nothing fits and keeps the loss" in said
    assert "2 × rtx-4090 would hold int4:g128:asym:fp16 by gptq." in said
    assert recommend(asked("rtx-4090", devices=2), PRIOR).options


def test_an_m4_max_is_told_apart_in_what_is_not_known() -> None:
    found = recommend(asked("m4-max"), PRIOR)
    assert found.options
    assert all(option.prefill is None for option in found.options)
    assert any("No rate of multiplication with a source is known for m4-max" in caveat for caveat in found.caveats)
    assert "unknown rate" in {option.decode.bound for option in found.options}
    assert "but floats only" in reasons(found)["int8:channel", "rtn@int8:token"]


def test_prefill_is_counted_for_all_or_for_none_of_those_that_are_ranked() -> None:
    # Rates of int8 are known, of bf16 not: attention and head multiply in that.
    found = recommend(asked("epyc-9654", shape=LLAMA8, memory_gb=64.0), PRIOR)
    assert {option.multiplied_in for option in found.options} == {"bf16", "int8"}
    assert all(option.prefill is None for option in found.options)


def test_a_format_of_unknown_rate_is_as_fast_as_floats_at_least_and_is_ranked_with_prefill() -> None:
    device = find_device("h100-sxm")
    found = recommend(asked("h100-sxm", shape=LLAMA8), PRIOR)
    blind = dataclasses.replace(device, rates={**device.rates, "int8": None})
    unknown = recommend(Constraints(shape=LLAMA8, device=blind), PRIOR)

    def of_int8(result: Recommendation) -> Option:
        return next(option for option in result.options if option.multiplied_in == "int8")

    before, after = of_int8(found).prefill, of_int8(unknown).prefill
    assert before is not None
    assert after is not None
    assert after.total > before.total
    assert "has no source: as bf16 is assumed" in of_int8(unknown).notes[0]


def test_fnuz_is_named_on_the_mi300() -> None:
    found = recommend(asked("mi300x"), PRIOR)
    assert "is the fnuz kind" in reasons(found)["fp8_e4m3:channel", "rtn@fp8_e4m3:token"]
    options = {option.candidate.scheme: option for option in found.options}
    assert options["fp8_e4m3fnuz:channel"].multiplied_in == "fp8fnuz"
    assert options["fp8_e4m3:channel:fp16"].multiplied_in == "bf16"  # weights alone are decoded anyway
    assert (
        "does not multiply fp8fnuz"
        in reasons(recommend(asked("b200"), PRIOR))["fp8_e4m3fnuz:channel", "rtn@fp8_e4m3fnuz:token"]
    )


def test_throughput_takes_the_batch_that_pays() -> None:
    one = recommend(asked("h200", shape=LLAMA8), PRIOR)
    many = recommend(asked("h200", shape=LLAMA8, first="throughput"), PRIOR)
    assert {option.batch for option in one.options} == {1}
    assert all(option.batch > 1 for option in many.options)
    # Where multiplication is what takes time, codes that are multiplied beat codes that are decoded.
    assert many.options[0].multiplied_in in ("int8", "fp8")
    assert one.options[0].multiplied_in == "bf16"
    rates = [option.tokens_per_second for option in many.options]
    assert rates == sorted(rates, reverse=True) or max(rates) < 1.005 * rates[0]
    assert many.constraints.usable is not None
    assert all(option.memory.total <= many.constraints.usable for option in many.options)


def test_equally_fast_ones_stand_by_loss() -> None:
    key = str(scheme("int4:g64"))
    losses = {
        (key, method): ExpectedLoss(percent=loss, source="x")
        for method, loss in (("rtn", 3.0), ("gptq", 1.0), ("awq", 2.0))
    }
    candidates = [Candidate("int4:g64", method) for method in ("rtn", "gptq", "awq")]
    found = recommend(asked("h100-sxm"), losses, candidates=candidates)
    assert [option.candidate.method for option in found.options] == ["gptq", "awq", "rtn"]


def test_losses_decide() -> None:
    candidates = [Candidate("int8:channel", "rtn"), Candidate("int4:g128", "gptq"), Candidate("int3:g64", "gptq")]
    keys = [candidate.key for candidate in candidates]
    losses = {keys[0]: ExpectedLoss(percent=-0.1, source="mine"), keys[1]: ExpectedLoss(percent=7.0, source="mine")}
    found = recommend(asked("h200"), losses, candidates=candidates, unmeasured="Measure it.")
    assert [option.candidate.scheme for option in found.options] == ["int8:channel"]
    assert reasons(found)["int4:g128", "gptq"] == "loses 7 %, and 5 % are allowed (mine)"
    assert reasons(found)["int3:g64", "gptq"] == "its loss is not known"
    assert "Measure it." in found.caveats
    broken = {**losses, keys[1]: ExpectedLoss(percent=float("inf"), source="mine")}
    assert len(recommend(asked("h200", max_loss_percent=1e9), broken, candidates=candidates).options) == 1
    assert len(recommend(asked("h200", max_loss_percent=8.0), losses, candidates=candidates).options) == 2


def test_the_cache_counts() -> None:
    load = Load(batch=16, prompt=8000, output=100)
    floats, eight = (recommend(asked("h200", load=load, cache=cache), PRIOR) for cache in (None, scheme("int8:token")))
    first: Option = floats.options[0]
    same = next(option for option in eight.options if option.candidate == first.candidate)
    assert same.memory.cache < 0.6 * first.memory.cache
    assert same.decode.total < first.decode.total
    assert any("keys and values in int8:token" in caveat for caveat in eight.caveats)
    assert not any("keys and values" in caveat for caveat in floats.caveats)
    assert memory(LLAMA70, dataclasses.replace(_numerics(first)), load).total == pytest.approx(first.memory.total)


def _numerics(option: Option) -> Any:
    from jquant.hardware.roofline import Numerics

    return Numerics(weights=option.candidate.weights, inputs=option.candidate.inputs)


def test_the_prior_covers_what_it_can_and_is_of_one_source() -> None:
    assert len(PRIOR) == len(MEASURED)
    for candidate in CANDIDATES:
        assert candidate.scheme == "float" or candidate.weights is not None
        if candidate.key not in PRIOR:
            # not measurable here: operands that jquant does not multiply as codes, or rows of 256 that the demo lacks
            assert candidate.scheme in ("float", "q4_k") or candidate.method in (
                "rtn@nvfp4",
                "rtn@mxfp4",
                "rtn@mxfp8_e4m3",
            )


def test_rendered_and_as_json() -> None:
    found = recommend(asked("h100-sxm"), PRIOR, caveats=("a caveat",))
    said = text(found)
    for words in (
        "llama-3-70b, 70.6 billion parameters, on 1 × h100-sxm (72 GB usable each)",
        "Take int4:",
        "a caveat",
    ):
        assert words in said
    record = json.loads(json.dumps(found.as_json()))
    assert record["options"][0]["loss_source"]
    assert record["options"][0]["memory_bytes_per_device"]["total"] < 72e9
    assert len(record["options"]) + len(record["rejected"]) == len(CANDIDATES)


@pytest.mark.parametrize(
    ("device", "changes", "message"),
    [
        ("xeon-8480", {}, "memory is what is built in.*--memory"),
        ("h200", {"devices": 0}, "devices 0"),
        ("h200", {"max_loss_percent": -1.0}, "max loss -1"),
        ("h200", {"max_loss_percent": float("nan")}, "max loss nan"),
        ("h200", {"first": "speed"}, "first 'speed'.*latency or throughput"),
        ("h200", {"memory_gb": 0.0}, "memory of 0 GB"),
        ("h200", {"shape": dataclasses.replace(LLAMA70, max_length=1000)}, "exceed the 1000"),
    ],
)
def test_bad_constraints(device: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        asked(device, **changes)
