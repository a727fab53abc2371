"""Runs a sweep: opens its folder, computes the cells that are missing, derives tables, plots and the report."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jquant import __version__
from jquant.core.errors import InputError
from jquant.core.scheme import Scheme
from jquant.data.blocks import Windows, text_windows
from jquant.data.text import load_text
from jquant.evaluation.result import Protocol
from jquant.evaluation.scoring import prepare_reference
from jquant.models.checkpoint import Checkpoint, open_checkpoint
from jquant.models.decoder import check_length
from jquant.ptq.rtn import selected_layers
from jquant.sweep.cell import FLOAT, METHOD, Subject, check_fits, measure, reference_cell
from jquant.sweep.config import SweepConfig
from jquant.sweep.grid import grid
from jquant.sweep.plots import write_plot
from jquant.sweep.report import write_report
from jquant.sweep.results import Cell, Sweep
from jquant.sweep.store import Store, open_store
from jquant.sweep.table import write_csv, write_json

NUMERICS = 1  # raised when a change moves numbers of cells: cells of another value are not mixed with these

Listener = Callable[["Event"], None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a listener hears: a stage began, windows were done within a cell, or a cell was finished or found."""

    stage: str  # "load", "reference", a scheme's spec string, "outputs"
    done: int  # cells finished or found
    total: int  # cells of the grid
    share: float = 0.0  # of the current cell
    cell: Cell | None = None  # the one that was just finished or found


def run_sweep(config: SweepConfig, listen: Listener = lambda event: None) -> Sweep:
    """Computes what is missing in `config.out` and writes the derived files.

    The folder may be shared by several processes, and any of them may be killed at any moment: started again, a sweep
    finishes the rest and holds the same numbers.

    Args:
        config: what to run.
        listen: called as work proceeds.

    Returns:
        The complete sweep, cells in grid order.

    Raises:
        InputError: a part of the config is wrong; this is found before anything is computed.
    """
    schemes = grid(config.schemes, config.groups)
    if config.report:
        _check_report_extra()
    checkpoint = open_checkpoint(config.model)
    text = load_text(config.text)
    windows = text_windows(
        text, checkpoint.tokenizer(), window=config.window, stride=config.stride, limit=config.windows
    )
    check_length(checkpoint.config, windows.window)
    store = open_store(config.out, _definition(config, checkpoint, windows), _environment())
    wanted = {FLOAT: store.cell_id(FLOAT, "none")} | {
        str(scheme): store.cell_id(str(scheme), METHOD) for scheme in schemes
    }
    if any(store.read(cell_id) is None for cell_id in wanted.values()):
        _compute_missing(config, store, checkpoint, windows, schemes, wanted, listen)
    cells = {name: store.read(cell_id) for name, cell_id in wanted.items()}
    reference = cells.pop(FLOAT)
    finished = tuple(cell for cell in cells.values() if cell is not None)
    assert reference is not None
    assert len(finished) == len(schemes)
    sweep = Sweep(manifest=store.manifest, reference=reference, cells=finished)
    listen(Event(stage="outputs", done=len(schemes), total=len(schemes)))
    write_outputs(sweep, config)
    return sweep


def write_outputs(sweep: Sweep, config: SweepConfig) -> None:
    """results.csv, results.json and, where asked for, pareto.png, pareto.svg and report.html."""
    write_csv(sweep, config.out / "results.csv")
    write_json(sweep, config.out / "results.json")
    if config.report:
        write_plot(sweep, config.out / "pareto.png", config.out / "pareto.svg")
        write_report(sweep, config.out / "report.html")


def _compute_missing(
    config: SweepConfig,
    store: Store,
    checkpoint: Checkpoint,
    windows: Windows,
    schemes: Sequence[Scheme],
    wanted: dict[str, str],
    listen: Listener,
) -> None:
    total, done = len(schemes), 0
    listen(Event(stage="load", done=done, total=total))
    subject = _prepare(config, store, checkpoint, windows, schemes, wanted[FLOAT], listen)
    left = list(schemes)
    # First what nobody else computes; then, in turn, what others held and may have left unfinished.
    for wait in (False, True):
        for scheme in list(left):
            name = str(scheme)
            with store.claim(wanted[name], wait=wait) as claimed:
                if not claimed:
                    continue
                cell = store.read(wanted[name])
                if cell is None:
                    listen(Event(stage=name, done=done, total=total))
                    cell = measure(
                        subject, scheme, wanted[name], progress=_within(listen, name, done, total, len(windows.tokens))
                    )
                    store.write(cell)
            left.remove(scheme)
            done += 1
            listen(Event(stage=name, done=done, total=total, cell=cell))


def _prepare(
    config: SweepConfig,
    store: Store,
    checkpoint: Checkpoint,
    windows: Windows,
    schemes: Sequence[Scheme],
    reference_id: str,
    listen: Listener,
) -> Subject:
    """Loads the model and runs the reference. Its cell is written once; every process needs its states."""
    model = checkpoint.model(dtype=jnp.dtype(config.dtype))
    layers = selected_layers(model, config.layers)
    check_fits(layers, schemes)
    store.make()
    batch = _batch(config)
    listen(Event(stage="reference", done=0, total=len(schemes)))
    started = time.perf_counter()
    reference, perplexity = prepare_reference(
        model, windows, batch=batch, progress=_within(listen, "reference", 0, len(schemes), len(windows.tokens))
    )
    subject = Subject(model=model, layers=layers, windows=windows, reference=reference)
    with store.claim(reference_id, wait=True):
        if store.read(reference_id) is None:
            store.write(reference_cell(subject, perplexity, reference_id, time.perf_counter() - started))
    return subject


def _within(listen: Listener, stage: str, done: int, total: int, windows: int) -> Callable[[int], None]:
    return lambda count: listen(Event(stage=stage, done=done, total=total, share=count / windows))


def _definition(config: SweepConfig, checkpoint: Checkpoint, windows: Windows) -> dict[str, Any]:
    """Everything that decides the numbers of all cells. Paths are not in it: a moved model is the same model."""
    protocol = Protocol.of(windows).as_json()
    text = {"name": protocol.pop("text_name"), "sha256": protocol.pop("text_sha256")}
    return {
        "model": {
            "name": checkpoint.path.name if config.model != "demo" else "demo (SmolLM2-135M-Instruct)",
            "sha256": checkpoint.sha256(),
            "architecture": checkpoint.config.architecture,
            "note": checkpoint.note,
        },
        "text": text,
        "protocol": protocol,
        "layers": list(config.layers),
        "dtype": config.dtype,
        "backend": jax.default_backend(),
        "batch": _batch(config),  # sums are taken in another order, which moves the last digits
        "numerics": NUMERICS,
    }


def _batch(config: SweepConfig) -> int:
    return (1 if jax.default_backend() == "cpu" else 8) if config.batch is None else config.batch


def _environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "jquant": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{len(jax.devices())} × {device.device_kind}",
    }


def _check_report_extra() -> None:
    for package in ("matplotlib", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the report needs {package}: pip install 'jquant[report]', or pass --no-report")
