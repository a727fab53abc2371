"""Cells on a Ray cluster: as many workers as it has room for, each with the model loaded, measure one after another.

The driver, this process, opens no device and holds no weights. It claims cells in the sweep's folder, hands them out
and writes what comes back: only it must see the folder. Workers must see the model. What all cells share (the
reference's states, statistics of the data) is computed by one worker and kept in Ray's object store: one copy on each
host, however many workers it has, mapped and not copied; Ray spills it to the host's disk where it does not fit.

A worker that dies is replaced and its cell measured again, up to ATTEMPTS times. A driver that dies takes its workers
with it; started again, it finds the finished cells in the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.errors import InputError
from jquant.io.locate import DEMO
from jquant.ptq.rtn import selected_layers
from jquant.sweep.config import SweepConfig
from jquant.sweep.grid import Point
from jquant.sweep.quantize import check_fits
from jquant.sweep.ray_cluster import cannot_start, cluster, one_line, requests, room
from jquant.sweep.ray_worker import CellWorker, Job, versions
from jquant.sweep.results import Cell
from jquant.sweep.statistics import wanted
from jquant.sweep.work import Work

ATTEMPTS = 3  # times that a cell is given to a worker which then dies, before the sweep gives up
_POLL_SECONDS = 1.0  # after which nodes that came and cells that others hold are looked at


def backend(config: SweepConfig) -> str:
    """Where workers compute: as the config says, so that the driver needs to ask no one."""
    return "gpu" if config.gpus_per_cell else "cpu"


def compute_missing(work: Work) -> None:
    """Computes the cells that the sweep's folder lacks, and writes them.

    Raises:
        InputError: ray is missing, the cluster cannot be reached or has no room for a worker, a worker does not fit the
            driver or cannot open the model, or a cell's workers died ATTEMPTS times.
    """
    work.tell("load", 0)
    model = work.checkpoint.abstract(dtype=jnp.dtype(work.config.dtype))
    check_fits(model, selected_layers(model, work.config.layers), work.points)
    with cluster(work.config) as ray:
        crew = _Crew(ray, work, requests(work.config, _bytes_of(model)))
        try:
            crew.run()
        finally:
            crew.dismiss()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """Something that a worker is doing."""

    worker: Any  # Ray's handle of it
    name: str  # a cell's scheme and method, or one of those below
    point: Point | None = None
    shared: Any = None  # where the object store will hold what all cells share


# What `_Call.name` is where it is no cell; the last is what was lost with a host.
_START, _OPEN, _REFERENCE, _STATISTICS = "starting a worker", "loading the model", "the reference", "statistics"
_SHARED = "what all cells share"


class _Crew:
    """The workers, what each is doing, and what is left to do."""

    def __init__(self, ray: Any, work: Work, requests: Mapping[str, float]) -> None:
        self._ray, self._work, self._requests = ray, work, requests
        self._driver = {**versions(), "host": socket.gethostname()}
        self._job = ray.put(_job(work))
        self._workers: dict[Any, str] = {}  # handle -> host, once it is known
        self._idle: list[Any] = []
        self._calls: dict[Any, _Call] = {}  # by the reference of what it will return
        self._left = list(work.points)
        self._has_reference = work.store.read(work.reference_id) is not None
        self._claims: dict[Point, contextlib.ExitStack] = {}
        self._deaths: Counter[str] = Counter()
        self._hidden: Any = None  # references into the object store, once computed
        self._statistics: Any = None
        self._most = 1  # workers at once so far
        self._looked = -math.inf  # when capacity was last looked at

    def run(self) -> None:
        """Until no cell is left."""
        self._collect_found()
        while self._left or not self._has_reference:
            self._hire()
            self._idle = [worker for worker in self._idle if not self._give(worker)]
            if not self._calls:
                time.sleep(_POLL_SECONDS)  # all that is left is held by other processes
                continue
            done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_POLL_SECONDS)
            for result in done:
                self._finish(self._calls.pop(result), result)

    def dismiss(self) -> None:
        """Ends all workers and lets go of cells that are not finished."""
        for worker in self._workers:
            self._ray.kill(worker)
        for claim in self._claims.values():
            claim.close()

    def _hire(self) -> None:
        """Starts workers while there is room for them and work."""
        if time.monotonic() < self._looked + _POLL_SECONDS:
            return
        self._looked = time.monotonic()
        for _ in range(min(room(self._ray, self._requests), max(1, len(self._left))) - len(self._workers)):
            self._start()
        self._most = max(self._most, len(self._workers))

    def _start(self) -> None:
        cpus, gpus = self._requests["CPU"], self._requests["GPU"]
        options = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "memory": self._requests["memory"],
            "max_restarts": 0,  # the driver starts another one, and says so
            "scheduling_strategy": "SPREAD",
        }
        worker = self._ray.remote(CellWorker).options(**options).remote(int(cpus), gpus)
        self._workers[worker] = ""
        self._calls[worker.check.remote(self._driver)] = _Call(worker=worker, name=_START)

    def _collect_found(self) -> None:
        """Cells that an earlier run, or another process, has finished."""
        for point in list(self._left):
            cell = self._work.store.read(self._work.ids[point])
            if cell is not None:
                self._done(point, cell)

    def _give(self, worker: Any) -> bool:
        """Gives an idle worker something to do; False where there is nothing now."""
        doing = {call.name for call in self._calls.values()}
        if self._hidden is None:
            return _REFERENCE not in doing and self._ask_reference(worker)
        for point in sorted(self._left, key=lambda point: point.needs_data):
            lacking = point.needs_data and self._statistics is None
            if str(point) in doing or (lacking and _STATISTICS in doing) or not self._claim(point):
                continue
            cell = self._work.store.read(self._work.ids[point])
            if cell is not None:  # by another process since
                self._done(point, cell)
                continue
            return self._ask_statistics(worker) if lacking else self._ask_cell(worker, point)
        return False

    def _ask_reference(self, worker: Any) -> bool:
        hidden, cell = worker.reference.options(num_returns=2).remote(self._work.reference_id)
        self._calls[cell] = _Call(worker=worker, name=_REFERENCE, shared=hidden)
        self._tell("reference")
        return True

    def _ask_statistics(self, worker: Any) -> bool:
        statistics, seconds = worker.statistics.options(num_returns=2).remote()
        self._calls[seconds] = _Call(worker=worker, name=_STATISTICS, shared=statistics)
        self._tell("statistics")
        return True

    def _ask_cell(self, worker: Any, point: Point) -> bool:
        statistics = self._statistics if point.needs_data else None
        result = worker.measure.remote(point, self._work.ids[point], self._hidden, statistics)
        self._calls[result] = _Call(worker=worker, name=str(point), point=point)
        cells = sum(call.point is not None for call in self._calls.values())
        self._tell(f"{cells} cells under way" if cells > 1 else str(point))
        return True

    def _finish(self, call: _Call, result: Any) -> None:
        """Takes what a call gave, or does something about what kept it from giving it."""
        errors = self._ray.exceptions
        try:
            value = self._ray.get(result)
        except errors.ObjectLostError as error:  # a host went, with what it held for all; also where a task says so
            self._idle.append(call.worker)
            if self._hidden is not None or self._statistics is not None:  # the first to notice
                self._hidden = self._statistics = None
                self._again(_SHARED, error, "a host that held it")
            return
        except errors.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise
        except errors.RayError as error:  # the worker, or its host, is gone
            if "in its creation task" in str(error):
                raise InputError(cannot_start(error)) from None
            self._ray.kill(call.worker)
            host = self._workers.pop(call.worker)
            self._again(call.name, error, f"the worker on {host}" if host else "a worker, or its host,")
            return
        if call.name == _START:
            self._calls[call.worker.open.remote(self._job)] = dataclasses.replace(call, name=_OPEN)
            return
        self._idle.append(call.worker)
        if call.name == _OPEN:
            self._opened(call.worker, value)
        elif call.name == _REFERENCE:
            self._hidden = call.shared
            with self._work.store.claim(self._work.reference_id, wait=True):
                if self._work.store.read(self._work.reference_id) is None:
                    self._work.store.write(value)
            self._has_reference = True
        elif call.name == _STATISTICS:
            self._statistics = call.shared
            self._tell("statistics", share=1.0, seconds=value)
        elif call.point is not None:
            self._work.store.write(value)
            self._deaths[_SHARED] = 0
            self._done(call.point, value)

    def _opened(self, worker: Any, found: Mapping[str, str]) -> None:
        """The first worker that has the model says where the sweep runs."""
        self._workers[worker] = found["host"]
        self._deaths[_START] = self._deaths[_OPEN] = 0
        store = self._work.store
        where = {"device": f"{found['device']} (workers on Ray)"}
        dataclasses.replace(store, environment={**store.environment, **where}).make()

    def _again(self, name: str, error: Exception, who: str) -> None:
        """Counts a death, and says so; what was being done is still to do."""
        self._deaths[name] += 1
        count, reason = self._deaths[name], one_line(error)
        limit = ATTEMPTS * (self._most if name in (_START, _OPEN) else 1)
        if count == limit:
            raise InputError(
                f"{name}: {who} died, {count} times in a row now ({reason}). Where memory is the cause, give more by "
                f"--memory-per-cell; finished cells are kept in {self._work.config.out}"
            )
        self._tell(name, note=f"{who} died ({reason}); again: {name}, attempt {count + 1} of {limit}")

    def _claim(self, point: Point) -> bool:
        """Whether this process holds the cell, or does from now."""
        if point not in self._claims:
            stack = contextlib.ExitStack()
            if not stack.enter_context(self._work.store.claim(self._work.ids[point], wait=False)):
                stack.close()
                return False
            self._claims[point] = stack
        return True

    def _done(self, point: Point, cell: Cell) -> None:
        self._left.remove(point)
        if point in self._claims:
            self._claims.pop(point).close()
        self._tell(str(point), cell=cell)

    def _tell(self, stage: str, **more: Any) -> None:
        self._work.tell(stage, len(self._work.points) - len(self._left), **more)


def _job(work: Work) -> Job:
    config = work.config
    is_path = config.model != DEMO and Path(config.model).expanduser().exists()
    return Job(
        model=str(work.checkpoint.path.resolve()) if is_path else config.model,
        sha256=work.checkpoint.sha256(),
        dtype=config.dtype,
        layers=config.layers,
        backend=work.backend,
        batch=work.batch,
        windows=work.windows,
        calibration=work.calibration,
        wanted=wanted(work.points),
    )


def _bytes_of(model: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
