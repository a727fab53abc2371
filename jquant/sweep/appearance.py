"""How a cell looks in every plot: one colour for an element family, one marker for a granularity, one axis range.

Where a sweep holds several methods, markers tell those apart instead: the granularity stands in a cell's spec string.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jquant.sweep.results import Cell, Sweep

CEILING = 2.0  # times the reference's perplexity: beyond it a scheme is broken, and its place says no more


@dataclass(frozen=True, kw_only=True)
class Family:
    """Element formats of one kind. Colours keep apart on white, on black, and for colour-blind eyes by lightness."""

    prefix: str  # of the spec string
    name: str
    colour: str


@dataclass(frozen=True, kw_only=True)
class Marker:
    """A shape, as matplotlib and plotly call it, and as a character for legends."""

    name: str  # as legends have it
    matplotlib: str
    plotly: str
    glyph: str


# The first whose prefix fits counts.
FAMILIES = (
    Family(prefix="int", name="integer", colour="#2f7fc1"),
    Family(prefix="fp", name="float", colour="#d55e00"),
    Family(prefix="mx", name="MX", colour="#159a74"),
    Family(prefix="nvfp", name="NVFP", colour="#c45a9a"),
    Family(prefix="nf", name="NormalFloat", colour="#b58900"),
    Family(prefix="codebook", name="codebook", colour="#7a6fce"),
)
OTHER_FAMILY = Family(prefix="", name="other", colour="#7d8590")

MARKERS = {
    "group": Marker(name="per group", matplotlib="o", plotly="circle", glyph="●"),
    "channel": Marker(name="per channel", matplotlib="D", plotly="diamond", glyph="◆"),
    "tensor": Marker(name="per tensor", matplotlib="s", plotly="square", glyph="■"),
    "block": Marker(name="per block", matplotlib="p", plotly="pentagon", glyph="⬟"),
    "token": Marker(name="per token", matplotlib="h", plotly="hexagon", glyph="⬢"),
}
METHOD_MARKERS = {
    "rtn": Marker(name="rtn", matplotlib="o", plotly="circle", glyph="●"),
    "rtn-mse": Marker(name="rtn-mse", matplotlib="s", plotly="square", glyph="■"),
    "hqq": Marker(name="hqq", matplotlib="p", plotly="pentagon", glyph="⬟"),
    "gptq": Marker(name="gptq", matplotlib="D", plotly="diamond", glyph="◆"),
    "awq": Marker(name="awq", matplotlib="*", plotly="star", glyph="★"),
    "awq+gptq": Marker(name="awq+gptq", matplotlib="P", plotly="cross", glyph="✚"),
}
OTHER_MARKER = Marker(name="other", matplotlib="X", plotly="x", glyph="✖")


@dataclass(frozen=True, kw_only=True)
class PerplexityAxis:
    """The perplexity axis: its scale, and the value above which cells stand at the edge as arrows (None: no such)."""

    scale: Literal["linear", "log"]
    ceiling: float | None


def family(cell: Cell) -> Family:
    """The family a cell's element belongs to, told from its spec string: mxfp4 and fp4 share elements, not families."""
    return next((family for family in FAMILIES if cell.scheme.startswith(family.prefix)), OTHER_FAMILY)


def marker(sweep: Sweep, cell: Cell) -> Marker:
    """The marker of a cell's method where the sweep holds several, of its granularity otherwise."""
    if several_methods(sweep):
        return METHOD_MARKERS.get(cell.method, OTHER_MARKER)
    return MARKERS.get(cell.granularity, OTHER_MARKER)


def label(sweep: Sweep, cell: Cell) -> str:
    """What a plot writes beside a cell: its scheme, with its method where the sweep holds several."""
    return f"{cell.scheme} {cell.method}" if several_methods(sweep) else cell.scheme


def several_methods(sweep: Sweep) -> bool:
    """Whether the cells' methods differ."""
    return len({cell.method for cell in sweep.cells}) > 1


def perplexity_axis(sweep: Sweep) -> PerplexityAxis:
    """Linear up to `CEILING` × the reference; logarithmic and whole where more than half the cells lie beyond that."""
    ceiling = CEILING * sweep.reference.perplexity
    beyond = sum(not cell.perplexity <= ceiling for cell in sweep.cells)
    if 2 * beyond > len(sweep.cells):
        return PerplexityAxis(scale="log", ceiling=None)
    return PerplexityAxis(scale="linear", ceiling=ceiling if beyond and math.isfinite(ceiling) else None)
