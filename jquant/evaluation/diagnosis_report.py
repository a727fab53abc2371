"""A diagnosis as text for a terminal, and as one HTML page with heat maps that fetches nothing and runs nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from jquant.evaluation.diagnosis import Diagnosis, ranked
from jquant.evaluation.validation_report import marked_up

_LEFT, _CELL, _HEIGHT = 120, 26, 24  # of the maps, px
_LIGHT, _DARK = (244, 241, 234), (140, 20, 40)  # ends of the colour scale, sRGB


def to_text(diagnosis: Diagnosis) -> str:
    """The findings first, then where the loss is, then what to change."""
    lines = []
    if diagnosis.findings:
        lines.append("Findings")
        for each in diagnosis.findings:
            lines += [f"  [{each.case}] {each.where}: {each.cause}. {each.said}.", f"      {each.remedy}"]
    else:
        lines.append("No faults found by these checks.")
    total = sum(each.kl for each in diagnosis.layers)
    if total > 0:
        of = f" at {diagnosis.base}" if diagnosis.base else ""
        lines += ["", f"Layers that lose most{of}, each alone (KL, nats a token; share of the sum {total:.4g})"]
        lines += [f"  {each.path:28} {each.kl:9.2e}  {each.kl / total:6.1%}" for each in ranked(diagnosis)]
    if diagnosis.variants:
        lines += ["", "All layers at once (KL; gained for a bit a weight over the first)"]
        lines += [
            f"  {each.scheme:20} {each.bits_per_weight:6.3f} bits  {each.kl:8.4f}  {_per_bit(each.per_bit, index)}"
            for index, each in enumerate(diagnosis.variants)
        ]
        best = max(diagnosis.variants[1:], key=lambda each: each.per_bit, default=None)
        if best is not None and best.per_bit > 0:
            lines.append(f"  Of these {best.scheme} gains most for its bits.")
    if diagnosis.moves:
        lines += ["", "Single layers worth most for their bits"]
        lines += [
            f"  {move.path:28} to {move.after:16} −{move.gain:.2e} nats for {move.bits_per_weight:+.4f} bits a weight"
            for move in diagnosis.moves[:8]
        ]
    if diagnosis.allocation is not None:
        counts = ", ".join(
            f"{count} {scheme}" for scheme, count in Counter(diagnosis.allocation.schemes.values()).items()
        )
        lines += [
            "",
            f"Best for the budget: {diagnosis.allocation.bits_per_weight:.3f} bits a weight: {counts}",
            f"  KL {diagnosis.measured_allocation:.4f} measured with all of them, {diagnosis.allocation.predicted:.4f} "
            "predicted by the sum",
        ]
    return "\n".join(lines)


def to_html(diagnosis: Diagnosis) -> str:
    """The report as a page."""
    css = files("jquant.evaluation").joinpath("validation.css").read_text(encoding="utf-8")
    model = diagnosis.facts.get("model", {})
    title = f"Diagnosis of {model.get('name', 'a model') if isinstance(model, Mapping) else model}"
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{css}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            *_findings(diagnosis),
            *_maps(diagnosis),
            *_tables(diagnosis),
            *_facts(diagnosis),
            "<footer>KL is of the float model's predictions from those with one layer rounded, in nats a token. "
            "Made by jquant.</footer>",
            "</body>",
            "</html>",
            "",
        )
    )


def _findings(diagnosis: Diagnosis) -> Iterator[str]:
    yield "<h2>Findings</h2>"
    if not diagnosis.findings:
        yield "<p>No faults found by these checks.</p>"
        return
    yield "<ul class='advice'>"
    for each in diagnosis.findings:
        yield (
            f"<li><b>{escape(each.case)}: {escape(each.where)}, {escape(each.cause)}.</b> {escape(each.said)}. "
            f"{marked_up(each.remedy[:1].upper() + each.remedy[1:])}.</li>"
        )
    yield "</ul>"


def _maps(diagnosis: Diagnosis) -> Iterator[str]:
    sensitivity = {each.path: each.kl for each in diagnosis.layers}
    if sensitivity:
        yield from _map(
            f"Loss of each layer alone{' at ' + diagnosis.base if diagnosis.base else ''} (KL)", sensitivity
        )
    if diagnosis.outliers:
        inputs = {each.path: each.input_ratio for each in diagnosis.outliers}
        weights = {each.path: each.weight_ratio for each in diagnosis.outliers}
        yield from _map("Outliers of inputs: largest channel over the median channel", inputs)
        yield from _map("Outliers of weights: largest magnitude over root mean square", weights)


def _map(title: str, values: Mapping[str, float]) -> Iterator[str]:
    """Blocks from left to right, layers from top to bottom; colour by logarithm."""
    kinds = list(dict.fromkeys(path.split(".", 2)[2] for path in values))
    blocks = 1 + max(int(path.split(".")[1]) for path in values)
    positive = [value for value in values.values() if 0 < value < math.inf]
    if not positive:
        return
    low, high = math.log(min(positive)), math.log(max(positive))
    width, height = _LEFT + _CELL * blocks + 10, _HEIGHT * len(kinds) + 26
    yield f"<h2>{escape(title)}</h2>"
    yield f'<p class="scale">{_swatch(0)} {min(positive):.3g} … {max(positive):.3g} {_swatch(1)}, logarithmic</p>'
    yield (
        f'<div class="scroll map"><svg style="min-width:{min(width, 900)}px" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}; blocks across, layers down">'
    )
    for row, kind in enumerate(kinds):
        y = _HEIGHT * row
        yield f'<text class="name" x="{_LEFT - 8}" y="{y + 16}">{escape(kind)}</text>'
        for block in range(blocks):
            path = f"blocks.{block}.{kind}"
            if path not in values:
                continue
            value = values[path]
            share = (math.log(value) - low) / (high - low or 1.0) if 0 < value < math.inf else float(value > 0)
            yield (
                f'<rect x="{_LEFT + _CELL * block}" y="{y}" width="{_CELL - 1}" height="{_HEIGHT - 1}" '
                f'fill="{_colour(share)}"><title>{escape(path)}: {value:.4g}</title></rect>'
            )
    for block in range(0, blocks, 5 if blocks > 12 else 1):
        x = _LEFT + _CELL * block + _CELL / 2
        yield f'<text class="axis" text-anchor="middle" x="{x:.0f}" y="{height - 8}">{block}</text>'
    yield "</svg></div>"


def _colour(share: float) -> str:
    parts = (round(a + (b - a) * min(max(share, 0.0), 1.0)) for a, b in zip(_LIGHT, _DARK, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def _swatch(share: float) -> str:
    return f'<span style="background:{_colour(share)}" class="swatch"></span>'


def _tables(diagnosis: Diagnosis) -> Iterator[str]:
    total = sum(each.kl for each in diagnosis.layers)
    if total > 0:
        rows = [
            (each.path, each.scheme, f"{each.kl:.3e}", f"{each.kl / total:.1%}", f"{each.weight_error:.2e}")
            for each in ranked(diagnosis, 12)
        ]
        yield from _table("Layers that lose most", ("layer", "scheme", "KL", "share of the sum", "weight error"), rows)
    if diagnosis.variants:
        rows = [
            (each.scheme, "", f"{each.bits_per_weight:.3f}", f"{each.kl:.4f}", _per_bit(each.per_bit, index))
            for index, each in enumerate(diagnosis.variants)
        ]
        yield from _table("All layers at once", ("scheme", "", "bits", "KL", "gained for a bit"), rows)
    if diagnosis.moves:
        rows = [
            (
                move.path,
                f"{move.before} → {move.after}",
                f"{move.gain:.2e}",
                f"{move.bits_per_weight:+.4f}",
                f"{move.per_bit:.3g}",
            )
            for move in diagnosis.moves[:15]
        ]
        columns = ("layer", "change", "KL gained", "bits a weight", "gained for a bit")
        yield from _table("Single layers worth most for their bits", columns, rows)
    if diagnosis.allocation is not None:
        counts = Counter(diagnosis.allocation.schemes.values())
        rows = [(scheme, "", str(count), "", "") for scheme, count in sorted(counts.items())]
        title = (
            f"Best for the budget: {diagnosis.allocation.bits_per_weight:.3f} bits a weight, KL "
            f"{diagnosis.measured_allocation:.4f} measured, {diagnosis.allocation.predicted:.4f} predicted"
        )
        yield from _table(title, ("scheme", "", "layers", "", ""), rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"<h2>{escape(title)}</h2><div class='scroll'><table><thead><tr>"
    yield "".join(f'<th scope="col">{escape(name)}</th>' for name in columns) + "</tr></thead><tbody>"
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _facts(diagnosis: Diagnosis) -> Iterator[str]:
    yield "<h2>What was measured</h2><dl>"
    for name, value in diagnosis.facts.items():
        pairs = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, item in pairs:
            if item not in (None, ""):
                yield f"<dt>{escape(f'{name} {inner}'.strip())}</dt><dd>{escape(str(item))}</dd>"
    yield "</dl>"


def _per_bit(value: float, index: int) -> str:
    if not index:
        return "the base"
    return "gains at no cost" if math.isinf(value) else "loses" if value <= 0 else f"{value:.4g}"
