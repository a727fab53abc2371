"""A validation as Markdown, and as one HTML page that fetches nothing and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import Any

from jquant.evaluation.validate import Check, Validation

_SIGNS = {"passed": "✓ passed", "failed": "✗ failed", "missing": "– not measured"}
_WIDTH, _ROW, _LEFT = 720, 34, 150  # of the chart, px
_COLUMNS = ("check", "metric", "items", "reference", "model", "loss", "95 % interval", "threshold", "flips", "status")


def to_markdown(validation: Validation) -> str:
    """The report for a terminal, an issue or a pull request."""
    lines = [f"# Validation: {_verdict(validation)}", ""]
    lines += [f"- {name}: {value}" for name, value in _facts(validation)]
    lines += ["", "| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(_row(check)) + " |" for check in validation.checks]
    notes = [f"- {check.name}: {check.note}" for check in validation.checks if check.note]
    lines += ["", *notes] if notes else []
    if validation.text is not None:
        lines += ["", "## Text", "", *(f"- {name}: {value}" for name, value in _text(validation))]
    lines += ["", "## What follows", "", *(f"- {said}" for said in validation.recommendations), ""]
    return "\n".join(lines)


def to_html(validation: Validation) -> str:
    """The report as a page."""
    css = files("jquant.evaluation").joinpath("validation.css").read_text(encoding="utf-8")
    verdict = _verdict(validation)
    state = "passed" if validation.passed else "failed"
    facts = dict(_facts(validation))
    title = f"Validation of {facts.get('model', 'a model')}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{css}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict {state}">{escape(verdict)}</p>',
            *_advice(validation),
            *_chart(validation),
            *_table(validation),
            *_text_section(validation),
            "<h2>What was compared</h2>",
            *_definitions(facts.items()),
            "<footer>A loss is the share of the reference's score that is gone; of perplexity, its increase. Intervals "
            "hold 95 % of what other items of the same kind would give, items drawn in pairs. Made by jquant.</footer>",
            "</body>",
            "</html>",
            "",
        )
    )


def _verdict(validation: Validation) -> str:
    if validation.passed:
        return f"PASSED, {len(validation.checks)} of {len(validation.checks)} checks"
    counts = {status: sum(check.status == status for check in validation.checks) for status in _SIGNS}
    reasons = [f"{counts['failed']} failed"] * bool(counts["failed"])
    reasons += [f"{counts['missing']} not measured"] * bool(counts["missing"])
    return f"NOT PASSED, {' and '.join(reasons)} of {len(validation.checks)} checks"


def _advice(validation: Validation) -> Iterator[str]:
    yield "<h2>What follows</h2><ul class='advice'>"
    for said in validation.recommendations:
        yield f"<li>{escape(said)}</li>"
    yield "</ul>"


def _chart(validation: Validation) -> Iterator[str]:
    """Each measured loss with its interval, beside its threshold; all as multiples of the threshold."""
    shown = [check for check in validation.checks if not math.isnan(check.loss) and check.threshold > 0]
    if not shown:
        return
    ends = [value / check.threshold for check in shown for value in (check.loss, *check.interval)]
    finite = [value for value in ends if math.isfinite(value)]
    low = max(min(0.0, *finite), -4.0)
    high = min(max(1.5, *finite) * 1.05, 12.0)
    height = _ROW * len(shown) + 34

    def x(value: float) -> float:
        return _LEFT + (min(max(value, low), high) - low) / (high - low) * (_WIDTH - _LEFT - 90)

    yield "<h2>Loss against threshold</h2>"
    said = "; ".join(f"{check.name} {check.loss:.1%} of {check.threshold:.1%}" for check in shown)
    yield f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(said)}">'
    yield f'<rect class="allowed" x="{x(low):.1f}" y="4" width="{x(1) - x(low):.1f}" height="{height - 34}"/>'
    yield f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{height - 30}"/>'
    yield f'<line class="limit" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="4" y2="{height - 30}"/>'
    yield f'<text class="axis" text-anchor="end" x="{x(0) + 4:.1f}" y="{height - 12}">no loss</text>'
    yield f'<text class="axis" text-anchor="start" x="{x(1) - 4:.1f}" y="{height - 12}">threshold</text>'
    for index, check in enumerate(shown):
        y = 4 + _ROW * index + _ROW / 2
        yield f'<text class="name" x="{_LEFT - 12}" y="{y + 4:.1f}">{escape(check.name)}</text>'
        edges = [value / check.threshold for value in check.interval]
        if all(map(math.isfinite, edges)):
            yield f'<line class="interval" x1="{x(edges[0]):.1f}" x2="{x(edges[1]):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        place = check.loss / check.threshold
        mark = "›" if place > high else ""
        yield f'<circle class="{check.status}" cx="{x(place):.1f}" cy="{y:.1f}" r="6"/>'
        yield f'<text class="value" x="{_WIDTH - 80}" y="{y + 4:.1f}">{escape(f"{_loss(check)} {mark}")}</text>'
    yield "</svg>"


def _table(validation: Validation) -> Iterator[str]:
    yield "<h2>Checks</h2><div class='scroll'><table><thead><tr>"
    yield "".join(f'<th scope="col">{escape(name)}</th>' for name in _COLUMNS)
    yield "</tr></thead><tbody>"
    for check in validation.checks:
        cells = _row(check)
        yield f'<tr class="{check.status}"><th scope="row">{escape(cells[0])}</th>'
        yield "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:]) + "</tr>"
        if check.note:
            yield f'<tr class="note"><td colspan="{len(_COLUMNS)}">{escape(check.note)}</td></tr>'
    yield "</tbody></table></div>"


def _text_section(validation: Validation) -> Iterator[str]:
    if validation.text is not None:
        yield "<h2>Text, token by token</h2>"
        yield from _definitions(_text(validation))


def _definitions(pairs: Any) -> Iterator[str]:
    yield "<dl>"
    for name, value in pairs:
        yield f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
    yield "</dl>"


def _row(check: Check) -> list[str]:
    flips = check.flips
    low, high = check.interval
    percent = check.name != "KL divergence"
    return [
        check.name,
        check.metric,
        f"{check.items:,}" if check.items else "",
        _number(check.reference),
        _number(check.value),
        _loss(check),
        "" if math.isnan(low) else f"{low:+.1%} … {high:+.1%}",
        f"{check.threshold:.1%}" if percent else f"{check.threshold:g}",
        "" if flips is None else f"−{flips.lost} +{flips.gained}, p {flips.p_value:.2g}",
        _SIGNS[check.status] + (", not surely" if not check.is_sure and not math.isnan(low) else ""),
    ]


def _loss(check: Check) -> str:
    if math.isnan(check.loss):
        return ""
    return f"{check.loss:+.1%}" if check.name != "KL divergence" else f"{check.loss:.3g}"


def _text(validation: Validation) -> Iterator[tuple[str, str]]:
    text = validation.text
    assert text is not None
    yield "perplexity", f"{text.perplexity:.4g}, reference {text.reference_perplexity:.4g}, ratio {text.ratio:.4f}"
    if not math.isnan(text.kl):
        yield "KL(reference ‖ model)", f"{text.kl:.4g} nats a token"
    if text.kl_quantiles:
        named = {"0.5": "median", "1": "largest"}
        yield "its quantiles", ", ".join(f"{named.get(q, q)} {value:.3g}" for q, value in text.kl_quantiles.items())
    if not math.isnan(text.top1):
        yield "same likeliest token", f"{text.top1:.2%}"
    if not math.isnan(text.flips_lost):
        yield "right before, wrong now", f"{text.flips_lost:.2%} of tokens; the other way {text.flips_gained:.2%}"
    if text.protocol is not None:
        each = text.protocol
        yield (
            "on",
            f"{each.text_name}, {each.windows} windows of {each.window} tokens, sha256 {each.tokens_sha256[:12]}…",
        )


def _facts(validation: Validation) -> Iterator[tuple[str, str]]:
    for name, value in validation.facts.items():
        if isinstance(value, dict):
            for inner, item in value.items():
                if item not in (None, ""):
                    yield f"{name} {inner}".removesuffix(" name"), str(item)
        elif value not in (None, ""):
            yield name, str(value)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}" if value < 1 else f"{value:.4g}"
