"""Numbers are written with the digits they deserve."""

from __future__ import annotations

import dataclasses
import math

import pytest

from jquant.sweep.columns import columns, percent, perplexity_change, perplexity_stderr, perplexity_text, significant
from jquant.sweep.results import Sweep


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 3, "0"),
        (1234.5678, 4, "1,235"),
        (0.012345, 3, "0.0123"),
        (-0.5, 2, "−0.50"),
        (1.5e-7, 2, "1.5e−07"),
        (2.5e12, 2, "2.5e+12"),
        (999_999_999.0, 3, "999,999,999"),
        (math.inf, 3, "∞"),
        (-math.inf, 3, "−∞"),
        (math.nan, 3, "not a number"),
    ],
)
def test_significant_digits(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text


def test_percent_and_perplexity() -> None:
    assert percent(0.9597) == "95.97"
    assert percent(-0.0014, signed=True) == "−0.14"
    assert percent(0.25, signed=True) == "+25.00"
    assert percent(1234.5, signed=True) == "+123,450"
    assert percent(math.inf) == "∞"
    assert perplexity_text(36.0023) == "36.002"
    assert perplexity_text(12345.6) == "12,346"
    assert perplexity_text(math.inf) == "∞"


def test_the_error_of_perplexity_is_that_of_its_exponential(sweep: Sweep) -> None:
    cell = sweep.cells[0]
    step = 1e-6
    slope = (math.exp(cell.nll + step) - math.exp(cell.nll - step)) / (2 * step)
    assert perplexity_stderr(cell) == pytest.approx(slope * cell.stderr, rel=1e-6)
    assert perplexity_change(sweep.reference, sweep.reference) == 0


def test_the_method_has_a_column_only_where_methods_differ(sweep: Sweep) -> None:
    assert "method" not in {column.key for column in columns(sweep)}
    mixed = dataclasses.replace(sweep, cells=(*sweep.cells, dataclasses.replace(sweep.cells[0], method="gptq")))
    assert "method" in {column.key for column in columns(mixed)}
