"""A worker without Ray: what it computes is what a local sweep does, and what does not fit is named with its host."""

from __future__ import annotations

import dataclasses
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jquant.core.errors import InputError
from jquant.data.blocks import text_windows
from jquant.data.text import load_text
from jquant.models.checkpoint import open_checkpoint
from jquant.sweep import ray_cluster
from jquant.sweep.config import SweepConfig
from jquant.sweep.grid import grid
from jquant.sweep.ray_cluster import requests, room
from jquant.sweep.ray_worker import CellWorker, Job, versions
from jquant.sweep.run import run_sweep
from jquant.sweep.statistics import wanted
from tests.tiny_checkpoint import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[CellWorker]:
    monkeypatch.setenv("NPROC", "2")  # put back afterwards
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    yield CellWorker(1, 0)
    jax.config.update("jax_platforms", platforms)


@pytest.fixture
def job(model: Path) -> Job:
    checkpoint = open_checkpoint(model)
    texts = [
        text_windows(load_text(name), checkpoint.tokenizer(), window=64, limit=count)
        for name, count in (("pydoc", 3), ("pydoc:calibration", 8))
    ]
    return Job(
        model=str(model),
        sha256=checkpoint.sha256(),
        dtype="float32",
        layers=(r"^blocks\.",),
        backend="cpu",
        batch=1,
        windows=texts[0],
        calibration=texts[1],
        wanted=wanted(grid(("int4:g32",), methods=("gptq",))),
    )


def test_cells_are_those_of_a_local_sweep(model: Path, worker: CellWorker, job: Job, tmp_path: Path) -> None:
    points = grid(("int4:g32",), methods=("rtn", "gptq"))
    worker.open(job)
    hidden, reference = worker.reference("reference")
    statistics, seconds = worker.statistics()
    cells = [worker.measure(point, point.method, hidden, statistics) for point in points]
    local = run_sweep(
        SweepConfig(
            model=str(model),
            schemes=("int4:g32",),
            methods=("rtn", "gptq"),
            out=tmp_path / "out",
            window=64,
            windows=3,
            calibration_windows=8,
            report=False,
        )
    )
    assert seconds > 0
    for ours, theirs in zip([reference, *cells], [local.reference, *local.cells], strict=True):
        same = {"id": "", "seconds_quantize": 0.0, "seconds_evaluate": 0.0}
        assert dataclasses.replace(ours, **same) == dataclasses.replace(theirs, **same)  # type: ignore[arg-type]


def test_what_does_not_fit_is_named_with_its_host(model: Path, worker: CellWorker, job: Job) -> None:
    here = f"worker on {socket.gethostname()}"
    worker.check({**versions(), "host": "driver"})
    for name, other in (("jquant", "0.0.9"), ("jax", "0.9.1")):
        with pytest.raises(InputError, match=rf"{here}: has {name} .* driver on head has {other}"):
            worker.check({**versions(), name: other, "host": "head"})
    for changes, message in (
        ({"model": str(model.parent / "gone")}, "gone': there is no such file .* at the same path"),
        ({"sha256": "0" * 64}, "another model than the driver's"),
        ({"backend": "gpu"}, "computes on cpu, not on gpu"),
    ):
        with pytest.raises(InputError, match=rf"{here}: .*{message}"):
            worker.open(dataclasses.replace(job, **changes))  # type: ignore[arg-type]


def test_without_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = SweepConfig(model=str(model), schemes=("int4",), out=tmp_path / "out", report=False, executor="ray")
    with pytest.raises(InputError, match=r"pip install 'jquant\[ray\]'"):
        run_sweep(config)
    assert not (tmp_path / "out").exists()


def test_an_address_where_nothing_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for wrong in (address, f"ray://{address}", "127.0.0.1:port"):
            with pytest.raises(InputError, match=f"ray-address {wrong}: no Ray cluster answers"):
                ray_cluster.check_reachable(wrong)


def test_options_are_checked(tmp_path: Path) -> None:
    for changes, message in (
        ({"cpus_per_cell": 2}, "cpus-per-cell: .*--executor ray"),
        ({"ray_address": "auto"}, "ray-address: .*--executor ray"),
        ({"executor": "ray", "cpus_per_cell": 0}, "cpus-per-cell 0: it must be at least 1"),
        ({"executor": "ray", "gpus_per_cell": 2}, "gpus-per-cell 2: a cell runs on one device"),
        ({"executor": "ray", "memory_per_cell": -1}, "memory-per-cell -1"),
    ):
        with pytest.raises(InputError, match=message):
            SweepConfig(model="demo", schemes=("int4",), out=tmp_path, **changes)  # type: ignore[arg-type]


def test_room_is_what_hosts_hold(tmp_path: Path) -> None:
    def host(**resources: float) -> dict[str, Any]:
        return {"Alive": True, "NodeManagerHostname": "h", "Resources": {"memory": 20e9, **resources}}

    class Ray:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [host(CPU=7, GPU=1), host(CPU=16), {**host(CPU=64, GPU=8), "Alive": False}]

    def config(**changes: Any) -> SweepConfig:
        return SweepConfig(model="demo", schemes=("int4",), out=tmp_path, executor="ray", **changes)

    assert room(Ray, requests(config(memory_per_cell=0), 10**9)) == 7 + 16
    assert room(Ray, requests(config(), 10**9)) == 6 + 6  # 3 GB each
    assert room(Ray, requests(config(cpus_per_cell=2, memory_per_cell=0), 10**9)) == 3 + 8
    assert room(Ray, requests(config(gpus_per_cell=0.1, memory_per_cell=0), 10**9)) == 7
    with pytest.raises(InputError, match=r"room for a worker of 32 CPUs, 0 GPUs and 3\.0 GB: h has 7 CPUs, 1 GPUs"):
        room(Ray, requests(config(cpus_per_cell=32), 10**9))
