"""A sweep's Pareto plot as PNG and SVG: bits per weight against perplexity and against KL divergence."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jquant.core.errors import InputError
from jquant.io.atomic import replacing
from jquant.sweep.appearance import Family, Marker, family, label, marker, perplexity_axis
from jquant.sweep.columns import perplexity_text, significant
from jquant.sweep.labels import Box, place_labels
from jquant.sweep.pareto import Metric, frontier
from jquant.sweep.results import Cell, Sweep

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

INK, MUTED, RULE = "#1f2328", "#636c76", "#d8dde3"
POINT = 6.0  # diameter of a point, in typographic points
LABEL = 7.0  # size of a label's type


def write_plot(sweep: Sweep, *paths: Path) -> None:
    """Write the plot of `sweep_figure` to each path, in the format of its suffix (.png, .svg or .pdf).

    The same sweep gives the same bytes. A file is written whole or not at all.

    Raises:
        InputError: for another suffix, a sweep without cells, or where matplotlib is missing.
    """
    for path in paths:
        if path.suffix not in _METADATA:
            raise InputError(f"plot {str(path)!r}: unknown format {path.suffix!r}; give {', '.join(_METADATA)}")
    figure = sweep_figure(sweep)
    from matplotlib import rc_context

    for path in paths:
        image = io.BytesIO()
        with rc_context({"svg.hashsalt": "jquant"}):
            figure.savefig(image, format=path.suffix[1:], dpi=160, metadata=_METADATA[path.suffix])
        with replacing(path) as file:
            file.write(image.getvalue())


# No dates, so that equal sweeps give equal files.
_METADATA: dict[str, dict[str, str | None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def sweep_figure(sweep: Sweep) -> Figure:
    """Two panels, one point a cell: colour tells the element family, shape granularity or method, a ring the frontier.

    Perplexity is linear up to twice the reference; cells beyond stand at the upper edge as arrows with their value.
    KL is logarithmic; cells with KL ≤ 0 stand at the lower edge. A point without a free place for its label has none.

    Returns:
        A matplotlib Figure that belongs to no window and no pyplot state.

    Raises:
        InputError: for a sweep without cells, or where matplotlib is missing.
    """
    if not sweep.cells:
        raise InputError("a sweep without cells has nothing to plot; run at least one scheme")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot needs the package 'matplotlib': pip install 'jquant[report]'") from error

    figure = Figure(figsize=(12.5, 6.4), facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.84, bottom=0.14, wspace=0.15)
    axis = perplexity_axis(sweep)
    _draw_panel(left, sweep, "perplexity", scale=axis.scale, ceiling=axis.ceiling)
    _draw_panel(right, sweep, "kl", scale="log", ceiling=None)
    _draw_legend(figure, sweep)
    model = sweep.manifest.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    figure.text(0.06, 0.945, _plain(f"Quantization of {name or 'the model'}"), size=13, color=INK, weight="bold")
    canvas.draw()  # fixes the axes' geometry, which the labels are placed by
    unlabelled = _label_points(left, sweep, "perplexity") + _label_points(right, sweep, "kl")
    note = "Lower and further left is better. Line and rings: Pareto frontier. Arrows: beyond the axis, with the value."
    if unlabelled:
        note += f" No room for the names of {unlabelled} of {2 * len(sweep.cells)} points."
    figure.text(0.06, 0.905, note, size=9, color=MUTED)
    return figure


def _draw_panel(panel: Axes, sweep: Sweep, metric: Metric, *, scale: str, ceiling: float | None) -> None:
    panel.set_yscale(scale)
    panel.set_xlabel("bits per weight, scales included", color=INK, size=9)
    panel.set_title(
        {"perplexity": "Perplexity", "kl": "KL divergence to the reference, nats a token"}[metric],
        loc="left",
        size=10,
        color=INK,
        pad=12,
    )
    low, high = _limits(sweep, metric, scale=scale, ceiling=ceiling)
    panel.set_ylim(low, high)
    bits = [cell.bits_per_weight for cell in sweep.cells]
    margin = max(0.06 * (max(bits) - min(bits)), 0.25)
    panel.set_xlim(min(bits) - 1.6 * margin, max(bits) + 1.6 * margin)

    front = frontier(sweep.cells, metric)
    panel.step(
        [sweep.cells[i].bits_per_weight for i in front],
        [getattr(sweep.cells[i], metric) for i in front],
        where="post",
        color=MUTED,
        linewidth=0.9,
        zorder=1,
    )
    for index, cell in enumerate(sweep.cells):
        (x, y), edge = _position(cell, metric, low=low, high=high)
        panel.plot(
            [x],
            [y],
            linestyle="none",
            marker={"above": "^", "below": "v", "": marker(sweep, cell).matplotlib}[edge],
            markersize=POINT,
            markerfacecolor=family(cell).colour if not edge else "white",
            markeredgecolor=INK if index in front and not edge else family(cell).colour,
            markeredgewidth=1.1 if index in front or edge else 0.3,
            clip_on=False,
            zorder=3 if index in front else 2,
        )
    if metric == "perplexity" and low < sweep.reference.perplexity < high:
        panel.axhline(sweep.reference.perplexity, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)

    panel.grid(color=RULE, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(colors=MUTED, labelsize=8, length=0, which="both")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(MUTED)
    if scale == "log":
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        # Within two decades powers of ten alone would leave the axis almost bare.
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 1)))
        panel.yaxis.set_minor_formatter(NullFormatter())


def _limits(sweep: Sweep, metric: Metric, *, scale: str, ceiling: float | None) -> tuple[float, float]:
    """The y axis: all values that it can show, and the reference, with room at both ends."""
    values = [getattr(cell, metric) for cell in sweep.cells]
    if metric == "perplexity":
        values.append(sweep.reference.perplexity)
    shown = [
        value
        for value in values
        if math.isfinite(value) and (ceiling is None or value <= ceiling) and (scale == "linear" or value > 0)
    ]
    if not shown:
        return 0.1, 1.0
    low, high = min(shown), max(shown)
    if scale == "log":
        room = (high / low) ** 0.06 if high > 1.001 * low else 1.1
        return low / room**1.5, high * room
    room = 0.06 * (high - low) or 0.01 * high
    return low - 1.5 * room, high + room


def _position(cell: Cell, metric: Metric, *, low: float, high: float) -> tuple[tuple[float, float], str]:
    """Where a cell stands, and whether it is beyond an edge ("above", "below"); what is no number counts as above."""
    value = getattr(cell, metric)
    if value < low:
        return (cell.bits_per_weight, low), "below"
    if not value <= high:
        return (cell.bits_per_weight, high), "above"
    return (cell.bits_per_weight, value), ""


def _label_points(panel: Axes, sweep: Sweep, metric: Metric) -> int:
    """Labels for the frontier's points, then for the others; placed in pixels, by the drawn text's size.

    Returns:
        The number of points without a label.
    """
    low, high = panel.get_ylim()
    front = frontier(sweep.cells, metric)
    # The others from above, where there is room, down into the crowd.
    others = sorted(set(range(len(sweep.cells))) - set(front), key=lambda i: -getattr(sweep.cells[i], metric))
    order = [*front, *others]
    centres: dict[int, tuple[float, float]] = {}
    toward: dict[int, float] = {}
    texts: dict[int, Annotation] = {}
    for index in order:
        cell = sweep.cells[index]
        where, edge = _position(cell, metric, low=low, high=high)
        x, y = panel.transData.transform(where)
        centres[index] = (float(x), float(y))
        # Below and left of a frontier point lies no other point, by what a frontier is.
        toward[index] = {"above": 270.0, "below": 90.0, "": 225.0 if index in front else 25.0}[edge]
        text = label(sweep, cell)
        if edge:
            text += f"  {significant(getattr(cell, metric), 3)}"
        texts[index] = panel.annotate(
            _plain(text),
            where,
            xytext=(0, 0),
            textcoords="offset points",
            size=LABEL,
            color=INK if index in front else MUTED,
            ha="center",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.4, "shrinkA": 0, "shrinkB": POINT / 2},
        )
    unit = panel.figure.dpi / 72  # pixels in a typographic point
    frame = _extent(panel, panel)
    obstacles = _steps([centres[i] for i in front])
    if metric == "perplexity" and low < sweep.reference.perplexity < high:
        obstacles += _label_reference(panel, sweep)
    boxes = place_labels(
        [centres[i] for i in order],
        [_size(texts[i], panel) for i in order],
        [toward[i] for i in order],
        frame=Box(frame.left, frame.bottom + 1, frame.right + 8 * unit, frame.top + 9 * unit),
        obstacles=obstacles,
        radius=0.75 * POINT * unit,
    )
    for index, box in zip(order, boxes, strict=True):
        if box is None:
            texts[index].remove()
            continue
        x, y = box.centre
        texts[index].set_position(((x - centres[index][0]) / unit, (y - centres[index][1]) / unit))
    return sum(box is None for box in boxes)


def _steps(front: list[tuple[float, float]]) -> list[Box]:
    """The frontier line's level and upright pieces."""
    pieces = []
    for (x0, y0), (x1, y1) in itertools.pairwise(front):
        pieces += [Box(x0, y0 - 1, x1, y0 + 1), Box(x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))]
    return pieces


def _label_reference(panel: Axes, sweep: Sweep) -> list[Box]:
    """Names the reference line at its left end, where the frontier leaves room; returns the boxes of line and name."""
    value = sweep.reference.perplexity
    text = panel.annotate(
        _plain(f"{sweep.reference.scheme} {perplexity_text(value)}"),
        (0, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        size=LABEL,
        color=INK,
        ha="left",
        va="top",
    )
    line = float(panel.transData.transform((0, value))[1])
    frame = _extent(panel, panel)
    return [_extent(text, panel), Box(frame.left, line - 1, frame.right, line + 1)]


def _size(text: Annotation, panel: Axes) -> tuple[float, float]:
    from matplotlib.text import Text

    # Text's own method: Annotation's would count the leader line.
    extent = Text.get_window_extent(text, _renderer(panel))
    return extent.width + 3, extent.height + 1


def _extent(artist: Artist, panel: Axes) -> Box:
    extent = artist.get_window_extent(_renderer(panel))
    return Box(extent.x0, extent.y0, extent.x1, extent.y1)


def _renderer(panel: Axes) -> Any:
    return panel.figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]


def _draw_legend(figure: Figure, sweep: Sweep) -> None:
    """One entry a family and one a marker that occur."""
    from matplotlib.lines import Line2D

    families: dict[Family, None] = dict.fromkeys(family(cell) for cell in sweep.cells)
    markers: dict[Marker, None] = dict.fromkeys(marker(sweep, cell) for cell in sweep.cells)
    entries = [
        Line2D([], [], linestyle="none", marker="o", markersize=POINT, color=each.colour, label=each.name)
        for each in families
    ] + [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=each.matplotlib,
            markersize=POINT,
            markerfacecolor="white",
            markeredgecolor=MUTED,
            label=each.name,
        )
        for each in markers
    ]
    figure.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=(0.052, 0.015),
        ncols=len(entries),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handletextpad=0.1,
        columnspacing=1.4,
    )


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: a pair of dollar signs would make it a formula."""
    return text.replace("$", r"\$")
