"""The columns of a sweep's table, in the terminal and in the report: what they hold and how a value is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jquant.sweep.appearance import several_methods
from jquant.sweep.results import Cell, Sweep


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: a value to sort by, its text, and its standard error; all take a cell and the reference."""

    key: str
    title: str
    terminal_title: str | None  # None: not in the terminal, whose lines are short
    meaning: str  # one sentence
    value: Callable[[Cell, Cell], float | str]
    text: Callable[[Cell, Cell], str]
    stderr: Callable[[Cell], float] | None = None

    def is_number(self) -> bool:
        """Whether values are sorted as numbers and set to the right."""
        return self.key not in ("scheme", "method")


def columns(sweep: Sweep) -> tuple[Column, ...]:
    """The columns for a sweep; the method has one only where the cells' methods differ."""
    return tuple(column for column in _COLUMNS if column.key != "method" or several_methods(sweep))


def perplexity_stderr(cell: Cell) -> float:
    """The standard error of exp(nll) to first order: perplexity · stderr(nll)."""
    return cell.perplexity * cell.stderr


def perplexity_change(cell: Cell, reference: Cell) -> float:
    """Relative to the reference's perplexity: 0.01 is one percent more."""
    return cell.perplexity / reference.perplexity - 1


def significant(value: float, digits: int = 4) -> str:
    """A number with that many significant digits and thousands set apart; powers of ten only far from one."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -5 <= exponent < 9:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}".replace("-", "−")


def percent(value: float, *, signed: bool = False) -> str:
    """A share as percent with two decimals, fewer from a thousand percent on."""
    if not math.isfinite(value):
        return significant(value)
    decimals = 2 if abs(value) < 10 else 0
    return f"{100 * value:{'+' if signed else ''},.{decimals}f}".replace("-", "−")


def perplexity_text(value: float) -> str:
    """Three decimals, or four digits from a thousand on."""
    return f"{value:,.3f}" if value < 1000 else significant(value)


def stderr_text(value: float) -> str:
    """± and two digits."""
    return f"± {significant(value, 2)}"


_COLUMNS = (
    Column(
        key="scheme",
        title="Scheme",
        terminal_title="Scheme",
        meaning="Element format, granularity and scale, as jquant spells them.",
        value=lambda cell, _: cell.scheme,
        text=lambda cell, _: cell.scheme,
    ),
    Column(
        key="method",
        title="Method",
        terminal_title="Method",
        meaning="How the codes were chosen.",
        value=lambda cell, _: cell.method,
        text=lambda cell, _: cell.method,
    ),
    Column(
        key="bits_per_weight",
        title="Bits/weight",
        terminal_title="Bits",
        meaning="Bits at rest of the quantized matrices, scales and zero points included, over their weights.",
        value=lambda cell, _: cell.bits_per_weight,
        text=lambda cell, _: f"{cell.bits_per_weight:.3f}",
    ),
    Column(
        key="model_bytes",
        title="Model MB",
        terminal_title="MB",
        meaning="The whole model with its unquantized tensors, in 10⁶ bytes.",
        value=lambda cell, _: cell.model_bytes,
        text=lambda cell, _: f"{cell.model_bytes / 1e6:,.1f}",
    ),
    Column(
        key="sqnr_db",
        title="SQNR dB",
        terminal_title="SQNR",
        meaning="Signal to quantization noise of the weights: 10·log₁₀(ΣW² / Σ(W − Ŵ)²).",
        value=lambda cell, _: cell.sqnr_db,
        text=lambda cell, _: f"{cell.sqnr_db:.2f}".replace("-", "−") if math.isfinite(cell.sqnr_db) else "∞",
    ),
    Column(
        key="perplexity",
        title="Perplexity",
        terminal_title="Perplexity",
        meaning="exp of the mean negative log-likelihood a token, with one standard error over the windows.",
        value=lambda cell, _: cell.perplexity,
        text=lambda cell, _: perplexity_text(cell.perplexity),
        stderr=perplexity_stderr,
    ),
    Column(
        key="perplexity_change",
        title="Change %",
        terminal_title="Δ %",
        meaning="Perplexity against the reference's, in percent.",
        value=perplexity_change,
        text=lambda cell, reference: percent(perplexity_change(cell, reference), signed=True),
    ),
    Column(
        key="kl",
        title="KL",
        terminal_title="KL",
        meaning="KL(reference ‖ quantized) of the next-token distributions, nats a token, with one standard error.",
        value=lambda cell, _: cell.kl,
        text=lambda cell, _: significant(cell.kl, 3),
        stderr=lambda cell: cell.kl_stderr,
    ),
    Column(
        key="top1",
        title="Top-1 %",
        terminal_title="Top-1 %",
        meaning="Share of positions whose most likely token is the reference's.",
        value=lambda cell, _: cell.top1,
        text=lambda cell, _: percent(cell.top1),
        stderr=lambda cell: 100 * cell.top1_stderr,
    ),
    Column(
        key="seconds_quantize",
        title="Quantize s",
        terminal_title=None,
        meaning="Time to quantize the model, in seconds.",
        value=lambda cell, _: cell.seconds_quantize,
        text=lambda cell, _: f"{cell.seconds_quantize:.1f}",
    ),
    Column(
        key="seconds_evaluate",
        title="Evaluate s",
        terminal_title=None,
        meaning="Time to measure it, in seconds.",
        value=lambda cell, _: cell.seconds_evaluate,
        text=lambda cell, _: f"{cell.seconds_evaluate:.1f}",
    ),
)
