"""Is this quantized model good enough? Thresholds, paired noise, a verdict, and what the measurements advise.

A benchmark passes where the share of the reference's score that is lost is at most its threshold; one that is required
and was not measured does not pass. Defaults are the thresholds of the user's guide (6.1.5, Quality Validation).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jquant.core.errors import InputError
from jquant.evaluation.benchmark import TaskResult
from jquant.evaluation.comparison import TextComparison
from jquant.evaluation.paired import UNKNOWN, Flips, Interval, degradation, degradation_interval, flips

GUIDE_THRESHOLDS: Mapping[str, float] = {
    "mmlu": 0.03,
    "hellaswag": 0.02,
    "gsm8k": 0.05,
    "humaneval": 0.05,
    "ifeval": 0.10,
}
OTHER_THRESHOLD = 0.05  # of a benchmark that the guide does not name: its `thresholds.get(benchmark, 0.05)`
PERPLEXITY_INCREASE = 0.05  # the guide's PerplexityValidator
_TAILED = 30  # times the mean KL: where the worst percentile lies beyond, few positions carry the loss

Status = Literal["passed", "failed", "missing"]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What may be lost, as shares: 0.03 is three per cent of the reference's score."""

    benchmarks: Mapping[str, float] = field(default_factory=lambda: dict(GUIDE_THRESHOLDS))
    other: float = OTHER_THRESHOLD
    perplexity: float = PERPLEXITY_INCREASE
    kl: float | None = None  # nats a token, mean; None: reported, not judged
    certain: bool = False  # the whole interval must lie within the threshold, not the measured value alone

    def __post_init__(self) -> None:
        named = {**self.benchmarks, "other": self.other, "perplexity": self.perplexity, "kl": self.kl or 0.0}
        for name, value in named.items():
            if not 0 <= value < math.inf:
                raise InputError(f"threshold of {name} is {value}: give a share of at least 0, as 0.05 for 5 %")

    def of(self, task: str) -> float:
        """The longest name that the task's begins with decides: mmlu_astronomy is mmlu."""
        names = [name for name in self.benchmarks if task == name or task.startswith(f"{name}_")]
        return self.benchmarks[max(names, key=len)] if names else self.other


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was judged."""

    name: str  # the benchmark, "perplexity", "KL divergence"
    metric: str
    status: Status
    reference: float = math.nan
    value: float = math.nan
    loss: float = math.nan  # the share lost; of perplexity the increase; of KL the value itself
    interval: Interval = UNKNOWN
    threshold: float
    items: int = 0
    flips: Flips | None = None  # of items that are right or wrong
    note: str = ""

    @property
    def is_sure(self) -> bool:
        """Whether the interval lies on one side of the threshold."""
        return self.interval.high <= self.threshold or self.interval.low > self.threshold


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The verdict and all that it rests on."""

    checks: tuple[Check, ...]
    text: TextComparison | None
    recommendations: tuple[str, ...]
    facts: Mapping[str, Any]  # of model, reference and settings, for the report

    @property
    def passed(self) -> bool:
        """Whether something was judged and all of it passed."""
        return bool(self.checks) and all(check.status == "passed" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "passed": self.passed,
            "checks": [{**dataclasses.asdict(check), "is_sure": check.is_sure} for check in self.checks],
            "text": None if self.text is None else self.text.as_json(),
            "recommendations": list(self.recommendations),
            **self.facts,
        }


@dataclass(frozen=True, kw_only=True)
class Made:
    """How the model was quantized, as far as its checkpoint says: what advice can change."""

    method: str = ""
    scheme: str = ""
    activation: str = ""
    group: int | None = None
    bits: float | None = None  # of the element
    symmetric: bool = False


def validate(
    reference: Mapping[str, TaskResult],
    quantized: Mapping[str, TaskResult],
    *,
    text: TextComparison | None = None,
    required: Sequence[str] = tuple(GUIDE_THRESHOLDS),
    thresholds: Thresholds | None = None,
    made: Made | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Validation:
    """Judges a quantized model by its reference.

    Args:
        reference: results of the reference, by task.
        quantized: of the model; on the same items.
        text: both on one text, where that was measured.
        required: benchmarks without which the verdict is not `passed`; others that were measured are judged too.
        thresholds: the guide's by default.
        made: what is known of the quantization, for advice.
        facts: for the report.

    Raises:
        InputError: scores are NaN or negative, or results are of unequal tasks or items; the message names them.
    """
    thresholds = Thresholds() if thresholds is None else thresholds
    checks = []
    if text is not None:
        checks += _text_checks(text, thresholds)
    for task in dict.fromkeys((*required, *reference, *quantized)):
        checks.append(_task_check(task, reference.get(task), quantized.get(task), thresholds))
    if not checks:
        raise InputError("nothing to judge: give a text, tasks or results, or name required benchmarks")
    return Validation(
        checks=tuple(checks),
        text=text,
        recommendations=tuple(recommend(checks, text, made or Made())),
        facts=dict(facts or {}),
    )


def _text_checks(text: TextComparison, thresholds: Thresholds) -> list[Check]:
    for name, value in (("reference", text.reference_perplexity), ("model", text.perplexity)):
        if math.isnan(value) or value < 1:
            raise InputError(f"the {name}'s perplexity is {value}: one below 1 or not a number was not measured")
    low, high = text.ratio_interval
    loss, interval = text.ratio - 1, Interval(low - 1, high - 1)
    tokens = 0 if text.protocol is None else text.protocol.tokens_scored
    found = [
        Check(
            name="perplexity",
            metric="increase",
            status=_status(loss, interval, thresholds.perplexity, thresholds),
            reference=text.reference_perplexity,
            value=text.perplexity,
            loss=loss,
            interval=interval,
            threshold=thresholds.perplexity,
            items=tokens,
        )
    ]
    if thresholds.kl is not None:
        missing = math.isnan(text.kl)
        found.append(
            Check(
                name="KL divergence",
                metric="nats a token",
                status="missing" if missing else "passed" if text.kl <= thresholds.kl else "failed",
                reference=0.0,
                value=text.kl,
                loss=text.kl,
                threshold=thresholds.kl,
                items=tokens,
                note="not measured; give --reference" if missing else "",
            )
        )
    return found


def _task_check(task: str, before: TaskResult | None, after: TaskResult | None, thresholds: Thresholds) -> Check:
    threshold = thresholds.of(task)
    if before is None or after is None:
        whose = (
            "either model" if before is None and after is None else "the model" if after is None else "the reference"
        )
        return Check(name=task, metric="", status="missing", threshold=threshold, note=f"not measured on {whose}")
    metric = before.primary
    _check_same(before, after, metric)
    for name, result in (("reference", before), ("model", after)):
        score = result.scores[metric]
        if math.isnan(score) or not 0 <= score < math.inf:
            raise InputError(f"{task}: the {name}'s {metric} is {score}; a score must be a number of at least 0")
    old, new = before.scores[metric], after.scores[metric]
    loss = degradation(old, new)
    if math.isnan(loss):
        return Check(
            name=task,
            metric=metric,
            status="failed",
            reference=old,
            value=new,
            threshold=threshold,
            items=before.count,
            note="the reference scores 0: there is nothing to lose, and the benchmark says nothing of this model",
        )
    interval, changed = UNKNOWN, None
    if metric in before.items and metric in after.items:
        items = before.items[metric], after.items[metric]
        interval = degradation_interval(*items)
        if all(value in (0.0, 1.0) for side in items for value in side):
            changed = flips(*items)
    return Check(
        name=task,
        metric=metric,
        status=_status(loss, interval, threshold, thresholds),
        reference=old,
        value=new,
        loss=loss,
        interval=interval,
        threshold=threshold,
        items=before.count,
        flips=changed,
        note="" if changed or metric in before.items else "no scores of single items: how sure the loss is is unknown",
    )


def _check_same(before: TaskResult, after: TaskResult, metric: str) -> None:
    """Raises InputError where the two were not asked the same."""
    task = before.task
    for what, old, new in (
        ("numbers of items", before.count, after.count),
        ("task versions", before.version, after.version),
        ("numbers of solved examples", before.few_shot, after.few_shot),
    ):
        if old != new:
            raise InputError(f"{task}: {what} differ, {old} for the reference and {new} for the model: ask both alike")
    if before.items_sha256 != after.items_sha256:
        raise InputError(f"{task}: the two results are of different questions: run both on the same data and limit")
    if metric not in after.scores:
        raise InputError(
            f"{task}: the reference has {metric}, the model has {', '.join(after.scores)}: these do not compare"
        )


def _status(loss: float, interval: Interval, threshold: float, thresholds: Thresholds) -> Status:
    judged = interval.high if thresholds.certain else loss
    return "passed" if judged <= threshold else "failed"  # NaN, as of an unknown interval, does not pass


def recommend(checks: Sequence[Check], text: TextComparison | None, made: Made) -> list[str]:
    """What follows from the measurements, most pressing first."""
    found = []
    missing = [check.name for check in checks if check.status == "missing"]
    failed = [check for check in checks if check.status == "failed"]
    measured = [check for check in checks if check.status != "missing"]
    sure = [check for check in failed if check.is_sure]
    if sure:
        worst = max(sure, key=lambda check: check.loss - check.threshold)
        names = ", ".join(check.name for check in sure)
        found.append(
            f"The loss is real, not noise, on {names} (worst: {worst.name}, {worst.loss:.1%} where "
            f"{worst.threshold:.1%} may be lost)."
        )
    for check in failed:
        if check not in sure and not math.isnan(check.interval.high):
            found.append(
                f"{check.name} fails by its value and may pass by its noise: {percent(check.loss)}, 95 % interval "
                f"{percent(check.interval.low)} to {percent(check.interval.high)}, threshold {check.threshold:.1%}. "
                + _more_items(check)
            )
    if failed:
        found += _other_settings(made)
    found += _of_text(text, failed)
    for check in measured:
        if check.status == "passed" and not check.is_sure and not math.isnan(check.interval.high):
            found.append(
                f"{check.name} passes by its value, but a loss of up to {check.interval.high:.1%} is not ruled out. "
                + _more_items(check)
            )
        if check.status == "passed" and check.flips is not None and check.flips.p_value < 0.05:
            direction = "lost" if check.flips.lost > check.flips.gained else "gained"
            found.append(
                f"{check.name} passes, and yet answers changed more in one direction than chance explains: "
                f"{check.flips.lost} lost, {check.flips.gained} gained (p = {check.flips.p_value:.2g}); items are "
                f"{direction}, within what the threshold allows."
            )
    if missing:
        found.append(
            f"Not measured: {', '.join(missing)}. Run `jquant validate … --tasks {','.join(missing)}`, or say by "
            "--require which benchmarks matter to you."
        )
    if not missing and not failed:
        found.append(
            f"All {len(measured)} checks pass"
            + (
                ": within these thresholds the model stands in for its reference on what was measured."
                if all(check.is_sure for check in measured)
                else " by their values; those named above need more items to be sure."
            )
        )
    return found


def _other_settings(made: Made) -> list[str]:
    """What to change, from how the model was made: the nearest remedy first."""
    found = []
    solver = made.method.split("@")[0]
    if made.activation:
        found.append(
            f"Inputs are quantized too ({made.activation}): quantize the weights alone to see which of the two loses "
            "(the same recipe without `activation`)."
        )
    if made.scheme and solver in ("rtn", "rtn-mse", "hqq"):
        found.append(
            f"Weights were rounded without data ({solver}): --method gptq, or --method awq, at the same {made.scheme} "
            "costs no bit and usually gains most."
        )
    if made.group is None and made.scheme and made.bits is not None and made.bits <= 4 and ":channel" in made.scheme:
        found.append(f"Scales are one a channel ({made.scheme}): groups of 128 or 64 give each its own range.")
    if made.group is not None and made.group > 32:
        found.append(
            f"Groups are of {made.group}: halve them, which is more accurate and costs {16 / made.group:.3f} bits a "
            "weight with 16-bit scales."
        )
    if made.symmetric and made.bits is not None and made.bits <= 4:
        found.append(f"Codes are symmetric ({made.scheme}): a zero point (:asym) uses all levels of skewed groups.")
    if made.bits is not None and made.bits <= 4:
        found.append(
            "Not all layers lose alike: `jquant diagnose REFERENCE --bits B --recipe-out FILE` measures each and puts "
            "the bits where they count."
        )
        found.append(
            "If that is not enough: more bits (int8 or fp8), or training with quantization (`jquant advise` says what "
            "it would take)."
        )
    if not found:
        found.append(
            "Raise the precision (more bits, smaller groups), or find the layers that lose: `jquant diagnose`."
        )
    return found


def _of_text(text: TextComparison | None, failed: Sequence[Check]) -> list[str]:
    found = []
    if text is None:
        return found
    tail = text.kl_quantiles.get("0.99", math.nan)
    if failed and tail > _TAILED * text.kl > 0:
        found.append(
            f"Few positions carry the divergence: 1 in 100 exceeds {tail:.3g} nats, the mean is {text.kl:.3g}. That is "
            "what outlier channels do: see the outlier map of `jquant diagnose`, and put awq or smoothquant first."
        )
    lost = sorted(check.name for check in failed if check.is_sure)
    if lost and text.ratio - 1 <= PERPLEXITY_INCREASE:
        found.append(
            f"Perplexity holds ({text.ratio - 1:+.1%}) where {', '.join(lost)} does not: calibrate on "
            "text like the task's."
        )
    if failed and text.ratio > 10:
        found.append(
            f"Perplexity is {text.ratio:.3g} times the reference's: that is damage, not rounding; run "
            "`jquant diagnose MODEL --reference REFERENCE` for wrong scales, swapped weights or another tokenizer."
        )
    return found


def percent(value: float, sign: str = "") -> str:
    """A share as reports write it; `sign` is "+" to show that of a loss."""
    return f"{value:{sign}.1%}".replace("-", "−").replace("inf%", "∞")


def _more_items(check: Check) -> str:
    """How many items would tell: the interval's end beyond the threshold nears the loss with their square root."""
    gap = abs(check.loss - check.threshold)
    reach = check.loss - check.interval.low if check.loss > check.threshold else check.interval.high - check.loss
    if not gap or not check.items or check.name == "perplexity":
        return "Measure more of it." if check.name != "perplexity" else "Measure more windows."
    if math.isinf(reach):
        return (
            f"The reference is right on too few of the {check.items:,} items to judge by: take a benchmark that it can "
            "do."
        )
    needed = math.ceil(check.items * (reach / gap) ** 2)
    return f"About {needed:,} items would tell; {check.items:,} were asked."
