"""The picture of experiments/scaling.py: time above, memory below, a column for each axis."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jquant.core.errors import InputError
from jquant.io.atomic import replacing

if TYPE_CHECKING:
    from experiments.scaling import Series

COLOURS = {"quantize": "#d55e00", "evaluation": "#2f7fc1", "sweep": "#159a74", "QAT": "#c45a9a"}
INK, MUTED, RULE = "#1f2328", "#636c76", "#d8dde3"


def write_plot(found: Sequence[Series], path: Path) -> None:
    """Measured points, joined; dashed, theory at the same points: times a factor for time, plus a constant for memory.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot needs the package 'matplotlib': pip install 'jquant[report]'") from error
    axes = list(dict.fromkeys(each.axis for each in found))
    figure = Figure(figsize=(3.6 * len(axes), 7.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(axes), sharey="row", squeeze=False)
    for across, row in zip(panels, _ROWS, strict=True):
        for column, axis in enumerate(axes):
            panel: Any = across[column]
            _draw(panel, [each for each in found if each.axis == axis], row)
            panel.set_xlabel(axis, color=INK)
            if column == 0:
                panel.set_ylabel(row.unit, color=INK)
        low, high = across[0].get_ylim()
        across[0].set_ylim(low, high * (high / low) ** 0.35)  # room for the legends; the axis is shared
    figure.suptitle(
        "Points are measured, dashes are theory, moved onto the last point. Time: exponents, of theory in brackets. "
        "Memory: MB measured for each MB of theory",
        fontsize=11,
        color=INK,
        x=0.01,
        ha="left",
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    with replacing(path) as file:
        file.write(image.getvalue())


def _draw(panel: Any, found: Sequence[Series], row: _Row) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    points = found[0].points
    panel.set_xticks(points, [f"{value:,}" for value in points])
    panel.minorticks_off()
    panel.grid(True, color=RULE, linewidth=0.6)
    panel.tick_params(colors=MUTED, labelsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for each in found:
        values, colour = getattr(each, row.measured), COLOURS[each.stage]
        panel.plot(points, values, marker="o", markersize=4.5, linewidth=1.4, color=colour, label=row.label(each))
        panel.plot(points, row.expected(each), linestyle=(0, (4, 3)), linewidth=1.1, color=colour, alpha=0.8)
    panel.legend(fontsize=7.5, frameon=False, loc="upper left", labelcolor=INK, handlelength=1.4)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Panels of one quantity."""

    measured: str  # field of Series
    unit: str
    label: Callable[[Series], str]
    expected: Callable[[Series], list[float]]  # theory, so that it meets the last point that was measured


def _time_label(each: Series) -> str:
    measured, theory = each.exponents()
    return f"{each.stage}  {measured:.2f} ({theory:.2f})"


def _memory_label(each: Series) -> str:
    slope = each.memory_slope()
    return f"{each.stage}  {'(constant)' if slope is None else f'{slope:.2f} (1)'}"


_ROWS = (
    _Row(
        measured="seconds",
        unit="processor seconds",
        label=_time_label,
        expected=lambda each: [value * each.seconds[-1] / each.least[-1] for value in each.least],
    ),
    _Row(
        measured="megabytes",
        unit="MB beside the runtime",
        label=_memory_label,
        expected=lambda each: [value + each.megabytes[-1] - each.held[-1] for value in each.held],
    ),
)
