"""The picture of experiments/scaling.py: time above, memory below, a column for each axis."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jquant.core.errors import InputError
from jquant.io.atomic import replacing

if TYPE_CHECKING:
    from experiments.scaling import Series

COLOURS = {"quantize": "#d55e00", "evaluation": "#2f7fc1", "sweep": "#159a74", "QAT": "#c45a9a"}
INK, MUTED, RULE = "#1f2328", "#636c76", "#d8dde3"
_ROWS = (("seconds", "least", "processor seconds"), ("megabytes", "held", "MB beside the runtime"))


def write_plot(found: Sequence[Series], path: Path) -> None:
    """Measured points, joined; dashed, the theory at the same points, moved onto the last of them.

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
    for row, (measured, theory, unit) in enumerate(_ROWS):
        for column, axis in enumerate(axes):
            panel: Any = panels[row][column]
            _draw(panel, [each for each in found if each.axis == axis], measured, theory)
            panel.set_xlabel(axis, color=INK)
            if column == 0:
                panel.set_ylabel(unit, color=INK)
    figure.suptitle(
        "Growth of time and memory: points measured, dashes theory at the same points, numbers the exponents of both",
        fontsize=11,
        color=INK,
        x=0.01,
        ha="left",
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    with replacing(path) as file:
        file.write(image.getvalue())


def _draw(panel: Any, found: Sequence[Series], measured: str, theory: str) -> None:
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
        values, expected, slopes = getattr(each, measured), getattr(each, theory), each.slopes()
        colour = COLOURS[each.stage]
        label = f"{each.stage} {slopes[measured]:.2f} ({slopes[theory]:.2f})"
        panel.plot(points, values, marker="o", markersize=4.5, linewidth=1.4, color=colour, label=label)
        moved = [value * values[-1] / expected[-1] for value in expected]
        panel.plot(points, moved, linestyle=(0, (4, 3)), linewidth=1.1, color=colour, alpha=0.8)
    panel.legend(fontsize=7.5, frameon=False, loc="upper left", labelcolor=INK, handlelength=1.4)
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)
