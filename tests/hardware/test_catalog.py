"""The catalog covers every format, and its figures are those of the formats' specifications."""

from __future__ import annotations

import json

import pytest

from jquant.core.formats import ELEMENTS
from jquant.core.scheme import PRESETS, scheme
from jquant.hardware.catalog import catalog

ENTRIES = {entry.name: entry for entry in catalog()}


def test_every_format_has_a_line_with_a_source() -> None:
    assert set(ENTRIES) >= {*ELEMENTS, *PRESETS}
    assert all(entry.sources for entry in ENTRIES.values())


@pytest.mark.parametrize(
    ("name", "largest", "smallest", "levels"),
    [
        ("int4", 8, 1, 16),
        ("fp8_e4m3", 448, 2**-9, 253),
        ("fp8_e5m2", 57344, 2**-16, 247),
        ("fp8_e4m3fnuz", 240, 2**-10, 255),
        ("fp8_e5m2fnuz", 57344, 2**-17, 255),
        ("fp8_e3m4", 15.5, 2**-6, 223),
        ("fp6_e2m3", 7.5, 0.125, 63),
        ("fp6_e3m2", 28, 0.0625, 63),
        ("fp4_e2m1", 6, 0.5, 15),
        ("nf4", 1, 0.07958029955625534, 16),
    ],
)
def test_ranges_as_specified(name: str, largest: float, smallest: float, levels: int) -> None:
    entry = ENTRIES[name]
    assert (entry.largest, entry.levels) == (largest, levels)
    assert entry.smallest == pytest.approx(smallest, rel=1e-7)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("int4:g128:fp16", 4.125),
        ("int4:g128", 4.25),
        ("nvfp4", 4.5),
        ("mxfp4", 4.25),
        ("nf4:g64", 4.5),
        ("nf4:g64:dq", 4.127),
    ],
)
def test_bits_per_weight_count_scales(spec: str, bits: float) -> None:
    assert scheme(spec).bits_per_weight == pytest.approx(bits, abs=5e-4)


def test_entries_are_plain_json() -> None:
    assert json.loads(json.dumps([entry.as_json() for entry in catalog()]))[0]["name"] == "fp32"
