"""Sweeps resume, share a folder, and hold the same numbers whoever computed them."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.data.blocks import text_windows
from jquant.data.text import load_text
from jquant.evaluation.perplexity import perplexity
from jquant.models.checkpoint import open_checkpoint
from jquant.ptq.rtn import quantize_layers
from jquant.sweep.config import SweepConfig
from jquant.sweep.grid import grid
from jquant.sweep.results import Cell, Sweep
from jquant.sweep.run import run_sweep
from tests.tiny_checkpoint import write

SCHEMES = ("int8:channel", "int4:g32", "int4:g32:asym", "nf4:g64", "mxfp4", "nvfp4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("model") / "tiny"))


def _config(model: str, out: Path, **changes: object) -> SweepConfig:
    base = {"model": model, "schemes": SCHEMES, "out": out, "window": 64, "windows": 3, "report": False}
    return SweepConfig(**(base | changes))  # type: ignore[arg-type]


def _numbers(sweep: Sweep) -> list[dict[str, object]]:
    cells = [sweep.reference, *sweep.cells]
    return [{k: v for k, v in dataclasses.asdict(cell).items() if not k.startswith("seconds")} for cell in cells]


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return run_sweep(_config(model, tmp_path_factory.mktemp("sweep") / "whole"))


def test_cells_do_not_depend_on_each_other(model: str, whole: Sweep, tmp_path: Path) -> None:
    """Each cell alone, on a freshly loaded packed model, gives the number that the sweep recorded."""
    checkpoint = open_checkpoint(model)
    windows = text_windows(load_text("pydoc"), checkpoint.tokenizer(), window=64, limit=3)
    for cell in whole.cells:
        fresh = checkpoint.model()
        quantize_layers(fresh, scheme(cell.scheme))
        assert perplexity(fresh, windows).value == pytest.approx(cell.perplexity, rel=1e-5), cell.scheme
    reverse = run_sweep(_config(model, tmp_path / "reverse", schemes=SCHEMES[::-1]))
    assert sorted(map(str, _numbers(reverse))) == sorted(map(str, _numbers(whole)))


def test_a_finished_sweep_is_only_read(model: str, whole: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "again"
    first = run_sweep(_config(model, out, schemes=SCHEMES[:2]))
    stamps = {file: file.stat().st_mtime_ns for file in (out / "cells").glob("*.json")}
    assert run_sweep(_config(model, out, schemes=SCHEMES[:2])) == first
    grown = run_sweep(_config(model, out))
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert _numbers(grown) == _numbers(whole)


def test_killed_and_started_again(model: str, whole: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "jquant.cli", "sweep", model, "--schemes", ",".join(SCHEMES), "--out", str(out)]
    command += ["--window", "64", "--windows", "3", "--no-report"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((out / "cells").glob("*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((out / "cells").glob("*.json"))) >= 3
    assert not (out / "results.json").exists()
    assert _numbers(run_sweep(_config(model, out))) == _numbers(whole)


def test_two_processes_in_one_folder(model: str, whole: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    command = [sys.executable, "-m", "jquant.cli", "sweep", model, "--schemes", ",".join(SCHEMES), "--out", str(out)]
    command += ["--window", "64", "--windows", "3", "--no-report"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert len(list((out / "cells").glob("*.json"))) == len(SCHEMES) + 1
    records = [json.loads(file.read_text()) for file in (out / "cells").glob("*.json")]
    assert {Cell.from_json(record).scheme for record in records} == {"float", *SCHEMES}
    assert _numbers(run_sweep(_config(model, out))) == _numbers(whole)


def test_folders_of_others_are_refused(model: str, whole: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    run_sweep(_config(model, out, schemes=("int4:g32",)))
    with pytest.raises(InputError, match=r"holds another sweep: protocol\.\w+ is 64 there, 32 here"):
        run_sweep(_config(model, out, window=32))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is no sweep"):
        run_sweep(_config(model, other))
    (next(iter((out / "cells").glob("*.json")))).write_text("{}")
    with pytest.raises(InputError, match="delete it"):
        run_sweep(_config(model, out, schemes=("int4:g32",)))


def test_mistakes_are_found_before_anything_is_computed(model: str, tmp_path: Path) -> None:
    for changes, message in (
        ({"schemes": ("int4:g32", "int4:g128")}, "scheme int4:g128 on layer blocks.0"),
        ({"schemes": ("int4:huge",)}, "unknown part 'huge'"),
        ({"layers": ("expert",)}, "matches nothing"),
        ({"text": "no-such-text"}, "no-such-text"),
        ({"window": 10**6}, "window"),
        ({"batch": 0}, "batch 0"),
    ):
        with pytest.raises(InputError, match=message):
            run_sweep(_config(model, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()


def test_grid() -> None:
    assert list(map(str, grid(("int4", "nf4"), (32, 64)))) == ["int4:g32", "int4:g64", "nf4:g32", "nf4:g64"]
    assert list(map(str, grid(("int4:g32", "int4:g32", "mxfp4")))) == ["int4:g32", "mxfp4"]
