"""The table says what the cells hold, and the files read back equal."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from jquant.core.errors import InputError
from jquant.sweep.results import Cell, Sweep
from jquant.sweep.table import frontier_marks, sweep_table, write_csv, write_json


def _print(sweep: Sweep, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(sweep_table(sweep))
    return capture.get().splitlines()


def test_each_cell_has_a_row_in_grid_order_below_the_reference(sweep: Sweep) -> None:
    lines = _print(sweep, 100)
    starts = [line.split()[0] for line in lines if line.strip()]
    names = [sweep.reference.scheme, *(cell.scheme for cell in sweep.cells)]
    assert [start for start in starts if start in names] == names
    row = next(line for line in lines if line.startswith("int4:g128 "))
    assert row.split() == ["int4:g128", "4.250", "169.8", "19.20", "39.916", "+10.87", "0.135", "66.76"]
    assert next(line for line in lines if line.startswith("mxint8 ")).split()[-1] == "P"


def test_eighty_columns_are_enough(sweep: Sweep, methods_sweep: Sweep) -> None:
    for each in (sweep, methods_sweep):
        lines = _print(each, 80)
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)
        assert all(word in lines[0] for word in ("Scheme", "Bits", "Perplexity", "Top-1 %"))
        assert any(line.endswith(("P", "K")) for line in lines)


def test_methods_stand_beside_their_scheme(methods_sweep: Sweep) -> None:
    lines = _print(methods_sweep, 100)
    assert [line.split()[1] for line in lines if line.startswith("int4:g64 ")][:3] == ["rtn", "rtn-mse", "hqq"]


def test_a_scheme_is_data_not_markup(sweep: Sweep) -> None:
    cell = dataclasses.replace(sweep.cells[0], scheme="[red]x[/nope]")
    assert any("[red]x[/nope]" in line for line in _print(dataclasses.replace(sweep, cells=(cell,)), 100))


def test_marks_name_the_frontiers_a_cell_is_on(sweep: Sweep) -> None:
    marks = dict(
        zip(
            [cell.scheme for cell in sweep.cells],
            frontier_marks(sweep, perplexity="perplexity", kl="KL", separator=", "),
            strict=True,
        )
    )
    assert marks["int2:g32"] == "perplexity, KL"
    assert (marks["mxint8"], marks["int8:g128"], marks["int4:tensor"]) == ("perplexity", "KL", "")


def _with_odd_values(sweep: Sweep) -> Sweep:
    odd = dataclasses.replace(
        sweep.cells[0], scheme='a,"b"\nc', perplexity=math.inf, kl=math.nan, sqnr_db=-math.inf, mse=0.1 + 0.2
    )
    return dataclasses.replace(sweep, cells=(odd, *sweep.cells[1:]))


def test_csv_reads_back_equal(sweep: Sweep, tmp_path: Path) -> None:
    sweep = _with_odd_values(sweep)
    write_csv(sweep, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(Cell)]
    for row, cell in zip(rows, (sweep.reference, *sweep.cells), strict=True):
        for name, value in cell.as_json().items():
            if isinstance(value, float) and math.isnan(value):
                assert math.isnan(float(row[name]))
            else:
                assert (type(value)(row[name]) if value is not None else row[name] or None) == value


def test_json_is_strict_and_reads_back_equal(sweep: Sweep, tmp_path: Path) -> None:
    sweep = _with_odd_values(sweep)
    write_json(sweep, tmp_path / "results.json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["manifest"] == sweep.manifest
    assert Cell.from_json(record["cells"][5]) == sweep.cells[5]
    assert (record["cells"][0]["perplexity"], record["cells"][0]["kl"], record["cells"][0]["sqnr_db"]) == (
        "Infinity",
        "NaN",
        "-Infinity",
    )
    assert float(record["reference"]["sqnr_db"]) == math.inf
    assert sweep.cells[0].id not in record["frontier"]["perplexity"]
    assert record["frontier"]["kl"][0] == next(cell.id for cell in sweep.cells if cell.scheme == "int2:g32")


@pytest.mark.parametrize("write", [write_csv, write_json])
def test_a_failed_write_leaves_the_old_file(sweep: Sweep, tmp_path: Path, write) -> None:
    path = tmp_path / "results"
    path.write_text("old")
    broken = dataclasses.replace(
        sweep, manifest={"x": object()}, cells=(dataclasses.replace(sweep.cells[0], id="\ud800"),)
    )
    with pytest.raises((TypeError, UnicodeEncodeError)):
        write(broken, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["results"]
    with pytest.raises(InputError, match="cannot be written"):
        write(sweep, path / "below_a_file")
