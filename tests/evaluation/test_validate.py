"""The verdict: what passes, what is missing, what is noise, what is refused, and what is advised."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.data.blocks import windows
from jquant.evaluation.benchmark import TaskResult
from jquant.evaluation.comparison import TextComparison, compare_records, compare_text
from jquant.evaluation.divergence import divergence
from jquant.evaluation.paired import Interval
from jquant.evaluation.perplexity import perplexity
from jquant.evaluation.scoring import prepare_reference
from jquant.evaluation.validate import Made, Thresholds, validate
from jquant.evaluation.validation_report import to_html, to_markdown
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import tiny_model


def _result(task: str, items: Sequence[float], **changes: Any) -> TaskResult:
    values = {
        "task": task,
        "version": "1",
        "few_shot": 0,
        "scores": {"acc": float(np.mean(items))},
        "stderr": {},
        "items": {"acc": tuple(map(float, items))},
        "answers": tuple(range(len(items))),
        "items_sha256": "same",
    }
    return TaskResult(**{**values, **changes})


def _pair(task: str, right: int, lost: int, gained: int = 0, of: int = 1000) -> tuple[dict, dict]:
    before = [1.0] * right + [0.0] * (of - right)
    after = [0.0] * lost + [1.0] * (right - lost + gained) + [0.0] * (of - right - gained)
    return {task: _result(task, before)}, {task: _result(task, after)}


def _text(**changes: Any) -> TextComparison:
    values = {
        "protocol": None,
        "reference_perplexity": 10.0,
        "perplexity": 10.2,
        "ratio": 1.02,
        "ratio_interval": Interval(1.015, 1.025),
        "kl": 0.01,
        "kl_quantiles": {"0.5": 0.005, "0.99": 0.05},
        "top1": 0.97,
        "flips_lost": 0.01,
        "flips_gained": 0.009,
    }
    return TextComparison(**{**values, **changes})


def test_the_guides_thresholds_judge() -> None:
    good = validate(*_pair("hellaswag", 500, 9), required=("hellaswag",))
    assert (good.passed, good.checks[0].loss, good.checks[0].threshold) == (True, pytest.approx(0.018), 0.02)
    bad = validate(*_pair("hellaswag", 500, 11), required=("hellaswag",))
    assert not bad.passed
    assert Thresholds().of("mmlu_astronomy") == 0.03
    assert Thresholds().of("arc_easy") == 0.05
    assert validate(*_pair("ifeval", 500, 49), required=()).passed
    assert not validate(*_pair("gsm8k", 500, 49), required=()).passed


def test_what_is_missing_does_not_pass() -> None:
    found = validate(*_pair("hellaswag", 500, 0))
    statuses = {check.name: check.status for check in found.checks}
    assert statuses == {
        "mmlu": "missing", "hellaswag": "passed", "gsm8k": "missing", "humaneval": "missing", "ifeval": "missing"
    }  # fmt: skip
    assert not found.passed
    assert "--tasks mmlu,gsm8k,humaneval,ifeval" in found.recommendations[-1]
    before, _ = _pair("hellaswag", 500, 0)
    one_sided = validate(before, {}, required=())
    assert (one_sided.passed, one_sided.checks[0].note) == (False, "not measured on the model")
    with pytest.raises(InputError, match="nothing to judge"):
        validate({}, {}, required=())


def test_noise_is_told_from_loss() -> None:
    few = validate(*_pair("hellaswag", 60, 6, 3, of=100), required=())
    check = few.checks[0]
    assert (check.status, check.is_sure) == ("failed", False)
    assert check.interval.low < 0.02 < check.interval.high
    assert check.flips is not None
    assert (check.flips.lost, check.flips.gained) == (6, 3)
    said = " ".join(few.recommendations)
    assert "may pass by its noise" in said
    assert int(re.search(r"About ([\d,]+) items would tell", said)[1].replace(",", "")) > 100  # type: ignore[index]
    many = validate(*_pair("hellaswag", 600, 60, of=1000), required=(), made=Made(method="rtn", scheme="int4:g128"))
    assert many.checks[0].is_sure
    assert "real, not noise" in many.recommendations[0]
    assert "--method gptq" in many.recommendations[1]


def test_certain_asks_for_the_whole_interval() -> None:
    pair = _pair("hellaswag", 60, 1, 1, of=100)
    assert validate(*pair, required=()).passed
    assert not validate(*pair, required=(), thresholds=Thresholds(certain=True)).passed
    same = _pair("hellaswag", 6000, 0, of=10_000)
    assert validate(*same, required=(), thresholds=Thresholds(certain=True)).passed


def test_advice_follows_how_the_model_was_made() -> None:
    pair = _pair("hellaswag", 600, 90)

    def said(**made: Any) -> str:
        return " ".join(validate(*pair, required=(), made=Made(**made)).recommendations)

    rounded = said(method="rtn", scheme="int4:g128", group=128, bits=4, symmetric=True)
    assert all(word in rounded for word in ("--method gptq", "halve them", ":asym", "jquant diagnose"))
    solved = said(method="gptq", scheme="int4:g32:asym", group=32, bits=4)
    assert not any(word in solved for word in ("--method gptq", "halve", ":asym)"))
    assert "without `activation`" in said(method="smoothquant", scheme="int8:channel", activation="int8:token", bits=8)
    assert "larger" not in rounded  # the guide's "increase group size" loses accuracy


def test_text_checks_and_what_they_say() -> None:
    assert validate({}, {}, text=_text(), required=()).passed
    worse = _text(ratio=1.08, ratio_interval=Interval(1.06, 1.1), perplexity=10.8, kl_quantiles={"0.99": 2.0})
    found = validate({}, {}, text=worse, required=())
    assert not found.passed
    assert any("Few positions carry" in said for said in found.recommendations)
    assert not validate({}, {}, text=_text(), required=(), thresholds=Thresholds(kl=0.001)).passed
    broken = _text(ratio=400.0, ratio_interval=Interval(300.0, 500.0), perplexity=4000.0)
    assert any("damage, not rounding" in said for said in validate({}, {}, text=broken, required=()).recommendations)
    task = validate(*_pair("gsm8k", 500, 100), text=_text(), required=())
    assert any("calibrate on text like the task's" in said for said in task.recommendations)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": {"acc": math.nan}}, "the model's acc is nan"),
        ({"scores": {"acc": -0.1}}, "the model's acc is -0.1"),
        ({"items_sha256": "other"}, "different questions"),
        ({"version": "2"}, "task versions differ, 1 for the reference and 2"),
        ({"few_shot": 5}, "numbers of solved examples differ"),
        ({"scores": {"f1": 0.5}}, "the reference has acc, the model has f1"),
        ({"answers": (0, 1), "items": {"acc": (1.0, 0.0)}}, "numbers of items differ, 4"),
    ],
)
def test_results_that_do_not_compare_are_refused(changes: dict[str, Any], message: str) -> None:
    items = [1, 0, 1, 1]
    before = _result("hellaswag", items)
    after = dataclasses.replace(before, **changes)
    with pytest.raises(InputError, match=f"hellaswag.*{message}"):
        validate({"hellaswag": before}, {"hellaswag": after})


def test_a_reference_of_zero_says_nothing() -> None:
    found = validate(*_pair("gsm8k", 0, 0, of=50), required=())
    assert (found.passed, found.checks[0].status) == (False, "failed")
    assert "nothing to lose" in found.checks[0].note
    with pytest.raises(InputError, match=r"perplexity is 0\.3"):
        validate({}, {}, text=_text(perplexity=0.3))
    with pytest.raises(InputError, match="threshold of mmlu is nan"):
        Thresholds(benchmarks={"mmlu": math.nan})


def test_comparison_by_definition() -> None:
    ids = np.random.default_rng(0).integers(0, 257, 300).astype(np.int32)
    cut, model, reference = windows(ids, window=64, stride=50), tiny_model(), tiny_model()
    quantize_layers(model, scheme("int3:g32"))
    prepared, before = prepare_reference(reference, cut, batch=2)
    found = compare_text(model, cut, prepared)
    after, apart = perplexity(model, cut, batch=2), divergence(model, reference, cut)
    assert found.ratio == pytest.approx(after.value / before.value, rel=1e-5)
    assert (found.kl, found.top1) == (pytest.approx(apart.kl.value, rel=1e-4), pytest.approx(apart.top1.value))
    assert found.ratio_interval.low < found.ratio < found.ratio_interval.high
    quantiles = list(found.kl_quantiles.values())
    assert quantiles == sorted(quantiles)
    same = compare_text(reference, cut, prepared)
    assert (same.ratio, same.top1, same.flips_lost) == (pytest.approx(1, abs=1e-6), 1.0, 0.0)
    with pytest.raises(InputError, match="other windows"):
        compare_text(model, windows(ids[1:], window=64), prepared)


def test_files_of_other_texts_do_not_compare() -> None:
    record = {
        "nll": 2.0, "stderr": 0.1, "text_sha256": "a", "tokens_sha256": "b", "window": 64, "stride": 64, "windows": 3
    }  # fmt: skip
    found = compare_records(record, {**record, "nll": 2.1}, "x and y")
    assert found.ratio == pytest.approx(math.exp(0.1))
    assert found.ratio_interval.low == pytest.approx(math.exp(0.1 - 1.96 * math.sqrt(0.02)))
    with pytest.raises(InputError, match="x and y: results are of different text_sha256"):
        compare_records(record, {**record, "text_sha256": "c"}, "x and y")
    with pytest.raises(InputError, match="the model's nll is None"):
        compare_records(record, {**record, "nll": None}, "x and y")


def test_reports_say_the_same_and_let_no_markup_through() -> None:
    hostile = "<script>alert(1)</script>"
    before, after = _pair("hellaswag", 500, 30)
    found = validate(before, after, text=_text(), facts={"model": {"name": hostile}})
    page, plain = to_html(found), to_markdown(found)
    assert hostile not in page
    assert "<script" not in page
    for text in (page, plain):
        assert "NOT PASSED, 1 failed and 4 not measured of 6 checks" in text
        assert "+6.0%" in text
    assert page.count("<circle") == 2
    record = found.as_json()
    assert record["passed"] is False
    assert dataclasses.asdict(found.checks[0])["name"] == record["checks"][0]["name"] == "perplexity"


def test_few_right_answers_are_no_crash() -> None:
    """HumanEval of a small model: 3 of 164 solved, of which the quantized one lost three and solved another."""
    found = validate(*_pair("humaneval", 3, 3, 1, of=164), required=())
    assert not found.passed
    assert not found.checks[0].is_sure
    assert any("right on too few of the 164 items" in said for said in found.recommendations)
    assert "−∞ … +100.0%" in to_markdown(found)
    page = to_html(found)
    assert "nan" not in page
    assert 'class="mark failed" d="M' in page  # an arrow at the chart's edge
    assert "<code>jquant advise</code>" in to_html(validate(*_pair("mmlu", 500, 400), made=Made(bits=4)))


@pytest.mark.parametrize(
    ("right", "lost", "gained", "of"), [(9, 5, 1, 24), (60, 8, 4, 100), (500, 9, 3, 1000), (40, 2, 2, 90)]
)
def test_more_items_are_asked_for_than_were_asked(right: int, lost: int, gained: int, of: int) -> None:
    """Intervals are lopsided where items are few: what counts is their end beyond the threshold."""
    found = validate(*_pair("hellaswag", right, lost, gained, of=of), required=())
    assert not found.checks[0].is_sure
    (needed,) = re.findall(r"About ([\d,]+) items would tell", "\n".join(found.recommendations))
    assert int(needed.replace(",", "")) >= of
