"""What a worker on a Ray cluster does: opens the model once, then measures cells as it is told. It does not know Ray.

A worker needs the checkpoint to be where the job says, and nothing else: the text comes as tokens, what cells share
comes from whichever worker computed it, and cells go back to the driver, which writes them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

from jquant import __version__
from jquant.core.errors import InputError
from jquant.data.blocks import Windows
from jquant.evaluation.scoring import Reference, prepare_reference
from jquant.models.checkpoint import open_checkpoint
from jquant.ptq.rtn import selected_layers
from jquant.sweep.cell import NUMERICS, Subject, measure, reference_cell
from jquant.sweep.grid import Point
from jquant.sweep.results import Cell
from jquant.sweep.statistics import Statistics, Wanted, gather

_DEFAULT_MEMORY_SHARE = 0.75  # of a GPU's memory that JAX takes at its start


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What a worker must know of a sweep."""

    model: str  # as `open_checkpoint` takes it, on every host
    sha256: str  # of that checkpoint
    dtype: str
    layers: Sequence[str]
    backend: str
    batch: int
    windows: Windows
    calibration: Windows | None
    wanted: Wanted | None


class CellWorker:
    """One worker process, on one device, with its own copy of the float model."""

    def __init__(self, cpus: int, gpus: float) -> None:
        """Before the first array: which device, how many threads.

        Args:
            cpus: threads of XLA's pool.
            gpus: 0 for the CPU; else the share of the GPU that Ray has made visible.
        """
        os.environ["NPROC"] = str(cpus)  # read where XLA starts its CPU client
        if not gpus:
            jax.config.update("jax_platforms", "cpu")
        elif gpus < 1:
            os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_DEFAULT_MEMORY_SHARE * gpus:.4f}"
        self._host = socket.gethostname()

    def check(self, driver: Mapping[str, str]) -> None:
        """Compares versions with the driver's. Raises InputError naming both where they differ."""
        for name, here in versions().items():
            if driver.get(name) != here:
                raise InputError(
                    f"worker on {self._host}: has {name} {here}, the driver on {driver['host']} has "
                    f"{driver.get(name)}: install the same on all hosts, numbers may differ otherwise"
                )

    def open(self, job: Job) -> Mapping[str, str]:
        """Loads the model.

        Returns:
            The host, and what device it computes on.

        Raises:
            InputError: the backend is another than wanted, or the model cannot be opened or is another one; the message
                names the host.
        """
        if jax.default_backend() != job.backend:
            raise InputError(
                f"worker on {self._host}: computes on {jax.default_backend()}, not on {job.backend}: install "
                "jquant[gpu] there, or pass --gpus-per-cell 0"
            )
        try:
            checkpoint = open_checkpoint(job.model)
            if checkpoint.sha256() != job.sha256:
                raise InputError(f"{checkpoint.path}: is another model than the driver's of that name")
            model = checkpoint.model(dtype=jnp.dtype(job.dtype))
        except (InputError, OSError) as error:
            raise InputError(
                f"worker on {self._host}: {error}; every host must see the driver's model at the same path"
            ) from error
        self._job, self._model, self._layers = job, model, selected_layers(model, job.layers)
        return {"device": jax.devices()[0].device_kind, "host": self._host}

    def reference(self, cell_id: str) -> tuple[list[np.ndarray], Cell]:
        """The float model's final states, which every worker compares with, and its cell."""
        started = time.perf_counter()
        reference, perplexity = prepare_reference(self._model, self._job.windows, batch=self._job.batch)
        cell = reference_cell(self._subject(reference), perplexity, cell_id, time.perf_counter() - started)
        return [np.asarray(states) for states in reference.hidden], cell

    def statistics(self) -> tuple[Statistics, float]:
        """What all cells that learn from data need, and the seconds it took."""
        job = self._job
        assert job.calibration is not None
        assert job.wanted is not None
        tokens = job.calibration.tokens
        found = gather(self._model, list(self._layers), tokens, batch=job.batch, wanted=job.wanted)
        return found, found.seconds

    def measure(self, point: Point, cell_id: str, hidden: Sequence[np.ndarray], statistics: Statistics | None) -> Cell:
        """One cell.

        Args:
            point: its scheme and method.
            cell_id: its name.
            hidden: from `reference`, of any worker.
            statistics: from `statistics`, of any worker; None where the method learns from no data.

        Raises:
            InputError: the method cannot solve a layer.
        """
        reference = Reference(
            head=self._model.head,
            hidden=[jnp.asarray(states) for states in hidden],
            windows=self._job.windows,
            batch=self._job.batch,
        )
        return measure(self._subject(reference), point, cell_id, statistics=statistics)

    def _subject(self, reference: Reference) -> Subject:
        return Subject(model=self._model, layers=self._layers, windows=self._job.windows, reference=reference)


def versions() -> dict[str, str]:
    """What must be equal on driver and workers, for cells to be those that the driver itself would compute."""
    return {
        "jquant": __version__,
        "cells' numerics": str(NUMERICS),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
    }
