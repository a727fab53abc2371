"""A validation as Markdown, and as one HTML page that fetches nothing and runs nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import Any

from jquant.evaluation.validate import Check, Validation, percent

_SIGNS = {"passed": "✓ passed", "failed": "✗ failed", "missing": "– not measured"}
_COMMAND = re.compile(r"`([^`]+)`")
_WIDTH, _ROW, _LEFT = 720, 34, 150  # of the chart, px
_COLUMNS = ("check", "status", "metric", "items", "reference", "model", "loss", "95 % interval", "threshold", "flips")


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
            "<footer>A loss is the share of the reference's score that is gone; of perplexity, its increase. The chart "
            "draws each as a multiple of its own threshold; an arrow stands for one beyond its edge. Intervals "
            "hold 95 % of what other items of the same kind would give, items drawn in pairs. Made by jquant.</footer>",
            "</body>",
            "</html>",
            "",
        )
    )


def marked_up(text: str) -> str:
    """HTML of a sentence in which commands stand between backticks."""
    return _COMMAND.sub(r"<code>\1</code>", escape(text))


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
        yield f"<li>{marked_up(said)}</li>"
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
    yield '<div class="wide">'
    yield f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(said)}">'
    yield f'<rect class="allowed" x="{x(low):.1f}" y="4" width="{x(1) - x(low):.1f}" height="{height - 34}"/>'
    yield f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{height - 30}"/>'
    yield f'<line class="limit" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="4" y2="{height - 30}"/>'
    apart = x(1) - x(0) > 64  # room for both labels under their lines
    for at, anchor, label in ((x(0), "end", "no loss"), (x(1), "start", "threshold")):
        yield (
            f'<text class="axis" text-anchor="{"middle" if apart else anchor}" x="{at:.1f}" y="{height - 12}">'
            f"{label}</text>"
        )
    for index, check in enumerate(shown):
        y = 4 + _ROW * index + _ROW / 2
        yield f'<text class="name" x="{_LEFT - 12}" y="{y + 4:.1f}">{escape(check.name)}</text>'
        edges = [value / check.threshold for value in check.interval]
        if not any(map(math.isnan, edges)):  # an open end is cut like one that lies outside
            yield f'<line class="interval" x1="{x(edges[0]):.1f}" x2="{x(edges[1]):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _mark(check, x(check.loss / check.threshold), y, check.loss / check.threshold > high)
        yield f'<text class="value" x="{_WIDTH - 72}" y="{y + 4:.1f}">{escape(_loss(check))}</text>'
    yield "</svg></div>"


def _mark(check: Check, x: float, y: float, is_beyond: bool) -> str:
    """A dot at the loss; an arrow at the edge where it lies beyond."""
    if is_beyond:
        return f'<path class="mark {check.status}" d="M{x - 6:.1f} {y - 7:.1f}l12 7l-12 7z"/>'
    return f'<circle class="mark {check.status}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'


def _table(validation: Validation) -> Iterator[str]:
    yield "<h2>Checks</h2><div class='scroll'><table class='checks'><thead><tr>"
    yield "".join(f'<th scope="col">{escape(name)}</th>' for name in _COLUMNS)
    yield "</tr></thead><tbody>"
    for check in validation.checks:
        cells = _row(check)
        yield f'<tr class="{check.status}"><th scope="row">{escape(cells[0])}</th>'
        yield f'<td class="status">{escape(cells[1])}</td>'
        yield "".join(f"<td>{escape(cell)}</td>" for cell in cells[2:]) + "</tr>"
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
    is_share = check.name != "KL divergence"
    return [
        check.name,
        _SIGNS[check.status] + (", not surely" if not check.is_sure and not math.isnan(low) else ""),
        check.metric,
        f"{check.items:,}" if check.items else "",
        _number(check.reference),
        _number(check.value),
        _loss(check),
        "" if math.isnan(low) else f"{percent(low, '+')} … {percent(high, '+')}",
        f"{check.threshold:.1%}" if is_share else f"{check.threshold:g}",
        "" if flips is None else f"−{flips.lost} +{flips.gained}, p {flips.p_value:.2g}",
    ]


def _loss(check: Check) -> str:
    if math.isnan(check.loss):
        return ""
    return percent(check.loss, "+") if check.name != "KL divergence" else f"{check.loss:.3g}"


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
