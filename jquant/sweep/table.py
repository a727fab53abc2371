"""A sweep as a table in the terminal, as results.csv and as results.json."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from jquant.io.atomic import replacing
from jquant.sweep.appearance import several_methods
from jquant.sweep.columns import columns, perplexity_stderr, stderr_text
from jquant.sweep.pareto import frontier
from jquant.sweep.results import Cell, Sweep

_FOLDED = {"scheme": 21, "method": 8}  # least widths of columns of words; longer words are folded
_FOLDED_WITH_METHODS = {"scheme": 18, "method": 8}


def sweep_table(sweep: Sweep) -> Table:
    """The reference, then the cells in grid order; P and K mark the frontiers of perplexity and KL against bits.

    With several methods their names take the place of the model's size.

    Args:
        sweep: at least the reference.

    Returns:
        A table for `rich.console.Console.print`.
    """
    shown = [(column, column.terminal_title) for column in columns(sweep) if column.terminal_title]
    least = _FOLDED
    if several_methods(sweep):  # eighty columns have no room for their names beside all figures
        shown = [(column, title) for column, title in shown if column.key != "model_bytes"]
        least = _FOLDED_WITH_METHODS
    marks = frontier_marks(sweep, perplexity="P", kl="K", separator="")
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0),
        caption=_caption(sweep.reference),
        caption_justify="left",
    )
    for column, title in shown:
        if column.is_number():
            table.add_column(title, justify="right", no_wrap=True)
        else:
            table.add_column(title, overflow="fold", min_width=least[column.key])
    table.add_column("", no_wrap=True)
    # Text objects: a spec string is data, not rich markup.
    table.add_row(*(Text(column.text(sweep.reference, sweep.reference)) for column, _ in shown), Text(""), style="dim")
    table.add_section()
    for cell, mark in zip(sweep.cells, marks, strict=True):
        row = (Text(column.text(cell, sweep.reference)) for column, _ in shown)
        table.add_row(*row, Text(mark), style="bold" if mark else "")
    return table


def _caption(reference: Cell) -> str:
    marks = "P, K: no scheme of as few bits has lower perplexity, KL."
    if math.isnan(reference.stderr):  # of one window
        return marks
    return f"One standard error of the reference's perplexity: {stderr_text(perplexity_stderr(reference))}. {marks}"


def frontier_marks(sweep: Sweep, *, perplexity: str, kl: str, separator: str) -> list[str]:
    """For each cell the words of the frontiers it is on, joined; empty where it is on neither."""
    on = {perplexity: set(frontier(sweep.cells, "perplexity")), kl: set(frontier(sweep.cells, "kl"))}
    return [separator.join(word for word in on if index in on[word]) for index in range(len(sweep.cells))]


def write_csv(sweep: Sweep, path: Path) -> None:
    """The reference and the cells, one row each, one column a field of `Cell`; written whole or not at all.

    Floats are written so that they read back equal; None is an empty field.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Cell)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(cell.as_json() for cell in (sweep.reference, *sweep.cells))
    with replacing(path) as file:
        file.write(text.getvalue().encode("utf-8"))


def write_json(sweep: Sweep, path: Path) -> None:
    """manifest, reference, cells in grid order, and the ids on each frontier; written whole or not at all.

    JSON has no infinity and no NaN: they are written as the strings "Infinity", "-Infinity" and "NaN", which Python's
    float() and JavaScript's Number() read.
    """
    record = {
        "manifest": sweep.manifest,
        "reference": sweep.reference.as_json(),
        "cells": [cell.as_json() for cell in sweep.cells],
        "frontier": {
            metric: [sweep.cells[index].id for index in frontier(sweep.cells, metric)]
            for metric in ("perplexity", "kl")
        },
    }
    text = json.dumps(_strict(record), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode("utf-8") + b"\n")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
