"""A sweep as one self-contained HTML page: two charts, a sortable table, and where every number comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from jquant.core.errors import InputError
from jquant.io.atomic import replacing
from jquant.sweep.appearance import Family, Marker, family, label, marker, perplexity_axis, several_methods
from jquant.sweep.columns import (
    Column,
    columns,
    percent,
    perplexity_change,
    perplexity_stderr,
    perplexity_text,
    significant,
    stderr_text,
)
from jquant.sweep.pareto import frontier
from jquant.sweep.results import Cell, Sweep
from jquant.sweep.table import frontier_marks

# The page may run what it holds and fetch nothing.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_report(sweep: Sweep, path: Path) -> None:
    """Write the page; plotly.js stands inside it (about 5 MB), and it needs no network. Written whole or not at all.

    Args:
        sweep: at least one cell.
        path: of the .html file.

    Raises:
        InputError: for a sweep without cells, or where plotly is missing.
    """
    page = report_html(sweep)
    with replacing(path) as file:
        file.write(page.encode("utf-8"))


def report_html(sweep: Sweep) -> str:
    """The page as one string; see `write_report`."""
    if not sweep.cells:
        raise InputError("a sweep without cells has nothing to report; run at least one scheme")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError("the report needs the package 'plotly': pip install 'jquant[report]'") from error
    title = f"Quantization of {_model_name(sweep)}"
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_asset('report.css')}</style>",
            "</head>",
            "<body>",
            *_introduction(sweep, title),
            *_charts(sweep),
            *_table(sweep),
            *_facts(sweep),
            f'<script type="application/json" id="sweep">{_json(_chart_data(sweep))}</script>',
            _script(get_plotlyjs()),
            _script(_asset("report.js")),
            "</body>",
            "</html>",
            "",
        )
    )


def _introduction(sweep: Sweep, title: str) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    text, protocol = _section(sweep, "text"), _section(sweep, "protocol")
    said = _counted(sweep)
    if "name" in text:
        said += f" on the text {text['name']}"
    if "windows" in protocol and "window" in protocol:
        said += f", {protocol['windows']} windows of {protocol['window']} tokens"
    yield f'<p class="muted">{escape(said)}.</p>'
    if note := _section(sweep, "model").get("note"):
        yield f'<p class="note" id="model-note">{escape(str(note))}</p>'
    reference = sweep.reference
    yield (
        f"<p>The reference, {escape(reference.scheme)}, has perplexity {perplexity_text(reference.perplexity)} "
        f"{stderr_text(perplexity_stderr(reference))}. Lower is better for perplexity and for KL, the divergence of "
        "the quantized model's next-token distribution from the reference's. ± is one standard error over the windows; "
        "all schemes share the windows, so their differences are surer than these errors.</p>"
    )


def _counted(sweep: Sweep) -> str:
    if not several_methods(sweep):
        return f"{len(sweep.cells)} schemes"
    schemes, methods = ({getattr(cell, name) for cell in sweep.cells} for name in ("scheme", "method"))
    return f"{len(sweep.cells)} cells, {len(schemes)} schemes by {len(methods)} methods,"


def _charts(sweep: Sweep) -> Iterator[str]:
    families: dict[Family, None] = dict.fromkeys(family(cell) for cell in sweep.cells)
    markers: dict[Marker, None] = dict.fromkeys(marker(sweep, cell) for cell in sweep.cells)
    axis = perplexity_axis(sweep)
    whole = '<label><input type="checkbox" id="perplexity-whole"> Whole range, logarithmic</label>'
    beyond = sum(not cell.perplexity <= axis.ceiling for cell in sweep.cells) if axis.ceiling is not None else 0
    yield '<div class="charts">'
    for metric, heading, control in (
        ("perplexity", "Perplexity", whole if beyond else ""),
        ("kl", "KL divergence", '<label><input type="checkbox" id="kl-log" checked> Logarithmic</label>'),
    ):
        yield (
            f'<section class="chart"><header><h2>{heading}</h2>{control}</header>'
            f'<div class="plot" id="plot-{metric}" role="img" '
            f'aria-label="{heading} against bits per weight; the table holds the same values"></div></section>'
        )
    yield "</div>"
    yield '<ul class="legend" aria-label="Colours and shapes">'
    for each in families:
        yield f'<li><span style="color:{each.colour}">●</span> {escape(each.name)}</li>'
    for each in markers:
        yield f'<li class="muted">{each.glyph} {escape(each.name)}</li>'
    yield '<li class="muted">line and rings: Pareto frontier</li>'
    if beyond:
        yield f'<li class="muted">△ beyond the axis, more than twice the reference ({beyond})</li>'
    yield "</ul>"


def _table(sweep: Sweep) -> Iterator[str]:
    shown = columns(sweep)
    marks = frontier_marks(sweep, perplexity="perplexity", kl="KL", separator=", ")
    yield "<h2>Schemes</h2>"
    yield (
        '<div class="controls"><input type="search" id="filter" placeholder="Filter, as in: int4 group" '
        'aria-label="Filter schemes by words" autocomplete="off">'
        '<label><input type="checkbox" id="frontier-only"> Frontier only</label>'
        f'<span id="shown" class="muted" role="status">{len(sweep.cells)} of {len(sweep.cells)} schemes</span></div>'
    )
    yield '<div class="scroll" tabindex="0" role="region" aria-label="Table of schemes"><table id="cells"><thead><tr>'
    for column in shown:
        kind = "number" if column.is_number() else "text"
        words = "" if column.is_number() else ' class="words"'
        yield (
            f'<th scope="col" data-kind="{kind}" data-key="{column.key}" aria-sort="none"{words}>'
            f'<button type="button" title="{escape(column.meaning)}">{escape(column.title)}</button></th>'
        )
    yield (
        '<th scope="col" data-kind="text" data-key="frontier" aria-sort="none" class="words">'
        '<button type="button" title="No scheme of as few bits is better in this.">Frontier</button></th>'
    )
    yield '</tr></thead><tbody class="reference">'
    yield _row(sweep, sweep.reference, shown, mark="", dot="")
    yield "</tbody><tbody>"
    for cell, mark in zip(sweep.cells, marks, strict=True):
        glyph = marker(sweep, cell).glyph
        dot = f'<span class="dot" style="color:{family(cell).colour}" aria-hidden="true">{glyph}</span>'
        yield _row(sweep, cell, shown, mark=mark, dot=dot)
    yield "</tbody></table></div>"
    yield "<details><summary>What the columns mean</summary><dl class='columns'>"
    for column in shown:
        yield f"<dt>{escape(column.title)}</dt><dd>{escape(column.meaning)}</dd>"
    yield "<dt>Frontier</dt><dd>No scheme of as few bits per weight is better in perplexity, in KL.</dd></dl></details>"


def _row(sweep: Sweep, cell: Cell, shown: tuple[Column, ...], *, mark: str, dot: str) -> str:
    cells = []
    for index, column in enumerate(shown):
        value = column.value(cell, sweep.reference)
        text = escape(column.text(cell, sweep.reference))
        if column.stderr is not None:
            text += f' <span class="stderr">{stderr_text(column.stderr(cell))}</span>'
        tag, attributes = ("th", ' scope="row"') if index == 0 else ("td", "")
        attributes += "" if column.is_number() else ' class="words"'
        mark_of_plot = dot if index == 0 else ""
        cells.append(f'<{tag}{attributes} data-value="{escape(_sortable(value))}">{mark_of_plot}{text}</{tag}>')
    cells.append(f'<td class="words" data-value="{escape(mark)}">{escape(mark)}</td>')
    start = '<tr class="frontier">' if mark else "<tr>"
    return f"{start}{''.join(cells)}</tr>"


def _sortable(value: float | str) -> str:
    """As JavaScript's Number() reads it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value)


def _facts(sweep: Sweep) -> Iterator[str]:
    yield '<h2>Where the numbers come from</h2><div class="facts">'
    loose = {key: value for key, value in sweep.manifest.items() if not isinstance(value, dict)}
    groups = {key: value for key, value in sweep.manifest.items() if isinstance(value, dict)}
    if loose:
        groups["sweep"] = loose | groups.get("sweep", {})
    for name, group in groups.items():
        yield f"<section><h3>{escape(str(name).capitalize())}</h3><table>"
        for key, value in _flatten(group):
            yield f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        yield "</table></section>"
    yield "</div>"
    yield "<footer>Results compare only where the hashes of text and model are equal. Made by jquant.</footer>"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every leaf of nested dicts; a list of plain values is one leaf."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{prefix}.{index}")
    else:
        yield prefix, _leaf(value)


def _leaf(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_leaf, value)) or "none"
    return str(value)


def _chart_data(sweep: Sweep) -> dict[str, Any]:
    """What report.js draws; a number that JSON cannot hold is null."""
    axis = perplexity_axis(sweep)
    return {
        "ceiling": axis.ceiling,
        "perplexity_scale": axis.scale,
        "frontier": {"perplexity": frontier(sweep.cells, "perplexity"), "kl": frontier(sweep.cells, "kl")},
        "reference": {
            "perplexity": _number(sweep.reference.perplexity),
            "label": f"{sweep.reference.scheme} {perplexity_text(sweep.reference.perplexity)}",
        },
        "cells": [
            {
                "label": label(sweep, cell),
                "words": " ".join(
                    (cell.scheme, cell.method, cell.element, cell.granularity, family(cell).name)
                ).lower(),
                "bits": cell.bits_per_weight,
                "perplexity": _number(cell.perplexity),
                "kl": _number(cell.kl),
                "colour": family(cell).colour,
                "symbol": marker(sweep, cell).plotly,
                "short": {"perplexity": significant(cell.perplexity, 3), "kl": significant(cell.kl, 3)},
                "tooltip": _tooltip(sweep, cell),
            }
            for cell in sweep.cells
        ],
    }


def _tooltip(sweep: Sweep, cell: Cell) -> list[str]:
    change = percent(perplexity_change(cell, sweep.reference), signed=True)
    return [
        label(sweep, cell),
        f"{cell.bits_per_weight:.3f} bits per weight",
        f"perplexity {perplexity_text(cell.perplexity)} {stderr_text(perplexity_stderr(cell))} ({change} %)",
        f"KL {significant(cell.kl, 3)} {stderr_text(cell.kl_stderr)}",
        f"top-1 {percent(cell.top1)} % {stderr_text(100 * cell.top1_stderr)}",
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(value: Any) -> str:
    """JSON that cannot end its script element: '<' occurs only inside strings, where it may be written as an escape."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _script(source: str) -> str:
    return "<script>\n" + source.replace("</script", "<\\/script") + "\n</script>"


def _asset(name: str) -> str:
    return files("jquant.sweep").joinpath(name).read_text(encoding="utf-8")


def _section(sweep: Sweep, key: str) -> dict[str, Any]:
    section = sweep.manifest.get(key)
    return section if isinstance(section, dict) else {}


def _model_name(sweep: Sweep) -> str:
    return str(_section(sweep, "model").get("name") or "the model")
