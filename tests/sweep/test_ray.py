"""A sweep on a real Ray cluster of two workers on this machine: the numbers of a local one, whoever dies on the way."""

from __future__ import annotations

import dataclasses
import importlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jquant.core.errors import InputError
from jquant.sweep import executor_ray, ray_cluster
from jquant.sweep.config import SweepConfig
from jquant.sweep.ray_worker import versions
from jquant.sweep.results import Sweep
from jquant.sweep.run import run_sweep
from jquant.sweep.work import Event
from tests.tiny_checkpoint import write

# Ray forks and starts another program at once, which is safe; JAX warns of any fork once its devices are open.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")]

SCHEMES = ("int8:channel", "int4:g32", "nf4:g32")
METHODS = ("rtn", "gptq")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a cluster of two cores that this process is connected to."""
    ray = importlib.import_module("ray")
    with pytest.MonkeyPatch.context() as patch:  # workers inherit it, and compile once for all tests
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def _config(model: Path, out: Path, **changes: Any) -> SweepConfig:
    base: dict[str, Any] = {
        "model": str(model),
        "schemes": SCHEMES,
        "methods": METHODS,
        "out": out,
        "window": 64,
        "windows": 3,
        "calibration_windows": 8,
        "report": False,
        "executor": "ray",
        "memory_per_cell": 0,
    }
    return SweepConfig(**(base | changes))


@pytest.fixture(scope="module")
def local(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    out = tmp_path_factory.mktemp("sweep") / "local"
    return run_sweep(_config(model, out, executor="local", memory_per_cell=None))


def _numbers(sweep: Sweep) -> list[dict[str, object]]:
    cells = [sweep.reference, *sweep.cells]
    return [{k: v for k, v in dataclasses.asdict(cell).items() if not k.startswith("seconds")} for cell in cells]


def _workers(doing: str = "") -> list[psutil.Process]:
    """Worker processes of the cluster, by what Ray calls them while they do it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(word.startswith(f"ray::CellWorker{doing}") for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def _await(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def test_numbers_are_those_of_a_local_sweep(address: str, model: Path, local: Sweep, tmp_path: Path) -> None:
    events: list[Event] = []
    sweep = run_sweep(_config(model, tmp_path / "out"), events.append)
    assert _numbers(sweep) == _numbers(local)
    assert sweep.manifest["environment"]["device"] == "cpu (workers on Ray)"
    assert "2 cells under way" in [event.stage for event in events]
    finished = [event for event in events if event.cell is not None]
    assert [event.done for event in finished] == [1, 2, 3, 4, 5, 6]
    assert sum(event.seconds is not None for event in events) == 1
    # A local run of the same folder finds the same cells.
    again = run_sweep(_config(model, tmp_path / "out", executor="local", memory_per_cell=None))
    assert again == sweep
    for lost in (sweep.reference, sweep.cells[3]):
        (tmp_path / "out" / "cells" / f"{lost.id}.json").unlink()
    assert _numbers(run_sweep(_config(model, tmp_path / "out"))) == _numbers(local)
    assert _await(lambda: not _workers())


def test_a_worker_killed_in_a_cell_is_replaced(address: str, model: Path, local: Sweep, tmp_path: Path) -> None:
    killed: list[int] = []
    notes: list[str] = []

    def listen(event: Event) -> None:
        if event.note is not None:
            notes.append(event.note)
        if event.stage == "2 cells under way" and not killed:
            (victim, *_) = _await(lambda: _workers(".measure"))
            victim.kill()
            killed.append(victim.pid)

    sweep = run_sweep(_config(model, tmp_path / "out"), listen)
    assert _numbers(sweep) == _numbers(local)
    assert len(notes) == 1
    assert f"the worker on {socket.gethostname()} died" in notes[0]
    assert notes[0].endswith("attempt 2 of 3")


def test_a_cell_whose_workers_always_die(address: str, model: Path, tmp_path: Path) -> None:
    def listen(event: Event) -> None:
        if event.stage == "int4:g32" and event.note is None and event.cell is None:
            for worker in _await(lambda: _workers(".measure")):
                worker.kill()

    with pytest.raises(
        InputError, match=r"^int4:g32: the worker on .* died, 3 times in a row .* finished cells are kept"
    ):
        run_sweep(_config(model, tmp_path / "out", schemes=("int4:g32",), methods=("rtn",)), listen)
    assert _await(lambda: not _workers())


def test_a_driver_killed_and_started_again(address: str, model: Path, local: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jquant.cli", "sweep", str(model), "--schemes", ",".join(SCHEMES)]
    command += ["--methods", ",".join(METHODS), "--window", "64", "--windows", "3", "--calibration-windows", "8"]
    command += ["--no-report", "--out", str(out), "--executor", "ray", "--ray-address", address]
    command += ["--memory-per-cell", "0"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert _await(lambda: len(list((out / "cells").glob("*.json"))) >= 3, 120)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (out / "results.json").exists()
    stamps = {file: file.stat().st_mtime_ns for file in (out / "cells").glob("*.json")}
    assert _await(lambda: not _workers()), "workers outlive their driver"
    sweep = run_sweep(_config(model, out))
    assert _numbers(sweep) == _numbers(local)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


def test_a_model_that_workers_do_not_see(address: str, model: Path, tmp_path: Path) -> None:
    moved = write(tmp_path / "moved")

    def listen(event: Event) -> None:
        if moved.exists():
            moved.rename(tmp_path / "elsewhere")

    with pytest.raises(InputError, match=rf"worker on {socket.gethostname()}: .*moved.*every host must see"):
        run_sweep(_config(moved, tmp_path / "out"), listen)


def test_a_results_folder_that_is_lost(address: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def listen(event: Event) -> None:
        if event.cell is not None and out.exists():
            out.rename(tmp_path / "unmounted")

    with pytest.raises(InputError, match=r"out: the sweep's folder is gone since it began"):
        run_sweep(_config(model, out), listen)
    assert not out.exists()


def test_workers_of_another_version(address: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_ray, "versions", lambda: {**versions(), "jax": "0.9.1"})
    with pytest.raises(InputError, match=rf"has jax {versions()['jax']}, the driver on .* has 0\.9\.1"):
        run_sweep(_config(model, tmp_path / "out"))


def test_a_cluster_without_room(address: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no host of the Ray cluster has room for a worker of 64 CPUs"):
        run_sweep(_config(model, tmp_path / "out", cpus_per_cell=64))
    with pytest.raises(InputError, match="connected to a Ray cluster already"):
        run_sweep(_config(model, tmp_path / "out", ray_address=address))


def test_an_address_that_is_silent(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing, as another kind of server would."""
    monkeypatch.setattr(ray_cluster, "REACHABLE_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        wrong = f"127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(InputError, match=f"ray-address {wrong}: no Ray cluster answers"):
            ray_cluster.check_reachable(wrong)
        assert time.monotonic() - started < 10
    ray_cluster.check_reachable(address)
