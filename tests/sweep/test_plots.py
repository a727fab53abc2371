"""The plot shows every cell, names frontier cells without overlap, and is the same file for the same sweep."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text

from jquant.core.errors import InputError
from jquant.sweep.appearance import FAMILIES, OTHER_FAMILY, family, perplexity_axis
from jquant.sweep.pareto import frontier
from jquant.sweep.plots import sweep_figure, write_plot
from jquant.sweep.results import Cell, Sweep


def _replace(sweep: Sweep, scheme: str, **values: float) -> Sweep:
    cells = tuple(dataclasses.replace(cell, **values) if cell.scheme == scheme else cell for cell in sweep.cells)
    return dataclasses.replace(sweep, cells=cells)


def _markers(panel: Axes) -> list[tuple[float, float, str]]:
    lines = [line for line in panel.get_lines() if line.get_linestyle() == "None"]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0]), str(line.get_marker())) for line in lines]  # type: ignore[index]


def _labels(panel: Axes) -> list[Annotation]:
    return [text for text in panel.texts if isinstance(text, Annotation)]


def test_every_cell_stands_at_its_bits_and_value_or_at_the_edge(sweep: Sweep) -> None:
    perplexity, kl = sweep_figure(sweep).axes
    assert [(x, y) for x, y, _ in _markers(kl)] == [(cell.bits_per_weight, cell.kl) for cell in sweep.cells]
    top = perplexity.get_ylim()[1]
    for (x, y, shape), cell in zip(_markers(perplexity), sweep.cells, strict=True):
        beyond = cell.perplexity > 2 * sweep.reference.perplexity
        assert (x, y) == (cell.bits_per_weight, top if beyond else cell.perplexity)
        assert (shape == "^") == beyond
    assert perplexity.get_yscale() == "linear"
    assert kl.get_yscale() == "log"


def test_labels_lie_within_the_figure_and_cover_neither_each_other_nor_points(sweep: Sweep) -> None:
    figure = sweep_figure(sweep)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    for panel, metric in zip(figure.axes, ("perplexity", "kl"), strict=True):
        boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in _labels(panel)]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        centres = [panel.transData.transform((x, y)) for x, y, _ in _markers(panel)]
        assert not any(box.contains(*centre) for box in boxes for centre in centres)
        named = {text.get_text().split("  ")[0] for text in _labels(panel)}
        front = {sweep.cells[i].scheme for i in frontier(sweep.cells, metric)}  # type: ignore[arg-type]
        assert front <= named
        assert len(named) >= 0.75 * len(sweep.cells)


def test_the_reference_has_its_line(sweep: Sweep) -> None:
    perplexity, _ = sweep_figure(sweep).axes
    assert any(
        line.get_linestyle() != "-" and list(line.get_ydata()) == [36.002, 36.002]  # type: ignore[arg-type]
        for line in perplexity.get_lines()
    )
    assert "float 36.002" in {text.get_text() for text in _labels(perplexity)}


def test_values_that_an_axis_cannot_show_stand_at_its_edge(sweep: Sweep) -> None:
    sweep = _replace(sweep, "mxfp4", perplexity=math.nan, kl=math.inf)
    sweep = _replace(sweep, "int8:g128", perplexity=math.inf, kl=0.0)
    perplexity, kl = sweep_figure(sweep).axes
    at = {cell.scheme: index for index, cell in enumerate(sweep.cells)}
    assert _markers(perplexity)[at["mxfp4"]][1:] == (perplexity.get_ylim()[1], "^")
    assert _markers(perplexity)[at["int8:g128"]][1:] == (perplexity.get_ylim()[1], "^")
    assert _markers(kl)[at["mxfp4"]][1:] == (kl.get_ylim()[1], "^")
    assert _markers(kl)[at["int8:g128"]][1:] == (kl.get_ylim()[0], "v")
    assert "int8:g128  0" in {text.get_text() for text in _labels(kl)}


def test_a_sweep_of_broken_schemes_is_drawn_whole_on_a_log_axis(sweep: Sweep) -> None:
    cells = tuple(
        dataclasses.replace(cell, perplexity=10.0**n * cell.perplexity) for n, cell in enumerate(sweep.cells[:5])
    )
    sweep = dataclasses.replace(sweep, cells=cells)
    assert perplexity_axis(sweep).ceiling is None
    perplexity, _ = sweep_figure(sweep).axes
    assert perplexity.get_yscale() == "log"
    assert [y for _, y, _ in _markers(perplexity)] == [cell.perplexity for cell in cells]


@pytest.mark.parametrize("count", [1, 2])
def test_few_or_equal_cells_are_drawn(sweep: Sweep, count: int, tmp_path: Path) -> None:
    cell = dataclasses.replace(sweep.cells[0], kl=0.0, perplexity=sweep.reference.perplexity)
    write_plot(dataclasses.replace(sweep, cells=(cell,) * count, manifest={}), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_files_are_the_same_for_the_same_sweep_and_leave_pyplot_alone(sweep: Sweep, tmp_path: Path) -> None:
    pyplot_before = "matplotlib.pyplot" in sys.modules
    for folder in ("a", "b"):
        write_plot(sweep, tmp_path / folder / "plot.png", tmp_path / folder / "plot.svg")
    for name in ("plot.png", "plot.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ElementTree.parse(tmp_path / "a" / "plot.svg")
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before


def test_dollar_signs_are_no_formula(sweep: Sweep, tmp_path: Path) -> None:
    cell = dataclasses.replace(sweep.cells[0], scheme="a$b$\\frac")
    odd = dataclasses.replace(sweep, cells=(cell,), manifest={"model": {"name": "$\\nonsense$"}})
    write_plot(odd, tmp_path / "plot.png")


def test_mistakes_are_named(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"unknown format '\.gif'; give \.png, \.svg, \.pdf"):
        write_plot(sweep, tmp_path / "plot.gif")
    with pytest.raises(InputError, match="without cells"):
        write_plot(dataclasses.replace(sweep, cells=()), tmp_path / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"pip install 'jquant\[report\]'"):
        write_plot(sweep, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_families_are_told_from_the_scheme(sweep: Sweep) -> None:
    def of(scheme: str) -> str:
        cell: Cell = dataclasses.replace(sweep.cells[0], scheme=scheme)
        return family(cell).name

    assert [of(s) for s in ("int4:g64", "fp4_e2m1:g32", "mxfp4", "mxint8", "nvfp4", "nf4:dq", "codebook(-1/1)")] == [
        "integer",
        "float",
        "MX",
        "MX",
        "NVFP",
        "NormalFloat",
        "codebook",
    ]
    assert of("q4_k") == OTHER_FAMILY.name
    assert len({family.colour for family in (*FAMILIES, OTHER_FAMILY)}) == len(FAMILIES) + 1


def test_markers_and_labels_tell_methods_apart(methods_sweep: Sweep) -> None:
    _, kl = sweep_figure(methods_sweep).axes
    shapes = [shape for _, _, shape in _markers(kl)]
    by_method = {}
    for cell, shape in zip(methods_sweep.cells, shapes, strict=True):
        by_method.setdefault(cell.method, set()).add(shape)
    assert by_method == {"rtn": {"o"}, "rtn-mse": {"s"}, "hqq": {"p"}, "awq+gptq": {"P"}, "unheard-of": {"X"}}
    assert all(text.get_text().split("  ")[0].split()[1] in by_method for text in _labels(kl))
    legend = [text.get_text() for each in sweep_figure(methods_sweep).legends for text in each.get_texts()]
    assert legend == ["integer", "rtn", "rtn-mse", "hqq", "awq+gptq", "other"]
