"""Runs a sweep: opens its folder, computes the cells that are missing, derives tables, plots and the report."""

from __future__ import annotations

import importlib.util
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp

from jquant import __version__
from jquant.core.errors import InputError
from jquant.data.blocks import TextTokenizer, Windows, text_windows
from jquant.data.overlap import check_disjoint
from jquant.data.text import load_calibration, load_text
from jquant.evaluation.result import Protocol
from jquant.evaluation.scoring import prepare_reference
from jquant.models.checkpoint import Checkpoint, open_checkpoint
from jquant.models.decoder import check_length
from jquant.ptq.rtn import selected_layers
from jquant.sweep import executor_ray, ray_cluster
from jquant.sweep.cell import FLOAT, NUMERICS, Subject, measure, reference_cell
from jquant.sweep.config import SweepConfig
from jquant.sweep.grid import ROUNDING, Point, grid
from jquant.sweep.plots import write_plot
from jquant.sweep.quantize import check_fits
from jquant.sweep.report import write_report
from jquant.sweep.results import Sweep
from jquant.sweep.statistics import Statistics, gather, wanted
from jquant.sweep.store import open_store
from jquant.sweep.table import write_csv, write_json
from jquant.sweep.work import Event, Listener, Work


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
        InputError: a part of the config is wrong, which is found before anything is computed; or, on Ray, the cluster
            cannot be reached, a worker does not fit the driver, or a cell's workers died again and again.
    """
    points = grid(config.schemes, config.groups, config.methods)
    if config.report:
        _check_report_extra()
    if config.executor == "ray":
        ray_cluster.check_extra()
    checkpoint = open_checkpoint(config.model)
    tokenizer = checkpoint.tokenizer()
    windows = text_windows(
        load_text(config.text), tokenizer, window=config.window, stride=config.stride, limit=config.windows
    )
    check_length(checkpoint.config, windows.window)
    calibration = _calibration(config, tokenizer, windows) if any(point.needs_data for point in points) else None
    backend = jax.default_backend() if config.executor == "local" else executor_ray.backend(config)
    batch = (1 if backend == "cpu" else 8) if config.batch is None else config.batch
    definition = _definition(config, checkpoint, windows, backend=backend, batch=batch)
    store = open_store(config.out, definition, _environment(config))
    work = Work(
        config=config,
        store=store,
        checkpoint=checkpoint,
        windows=windows,
        calibration=calibration,
        backend=backend,
        batch=batch,
        points=points,
        ids={point: store.cell_id(str(point.scheme), point.method, _given(point, calibration)) for point in points},
        reference_id=store.cell_id(FLOAT, "none"),
        listen=listen,
    )
    if any(store.read(cell_id) is None for cell_id in (work.reference_id, *work.ids.values())):
        if config.executor == "local":
            _compute_missing(work)
        else:
            executor_ray.compute_missing(work)
            store = open_store(config.out, definition, store.environment)  # with the workers' device
    reference = store.read(work.reference_id)
    cells = tuple(cell for point in points if (cell := store.read(work.ids[point])) is not None)
    assert reference is not None
    assert len(cells) == len(points)
    manifest = store.manifest | ({} if calibration is None else {"calibration": _as_manifest(calibration)})
    sweep = Sweep(manifest=manifest, reference=reference, cells=cells)
    listen(Event(stage="outputs", done=len(points), total=len(points)))
    write_outputs(sweep, config)
    return sweep


def write_outputs(sweep: Sweep, config: SweepConfig) -> None:
    """results.csv, results.json and, where asked for, pareto.png, pareto.svg and report.html."""
    write_csv(sweep, config.out / "results.csv")
    write_json(sweep, config.out / "results.json")
    if config.report:
        write_plot(sweep, config.out / "pareto.png", config.out / "pareto.svg")
        write_report(sweep, config.out / "report.html")


def _compute_missing(work: Work) -> None:
    done = 0
    work.tell("load", done)
    subject = _prepare(work)
    statistics: Statistics | None = None
    left = list(work.points)
    # First what nobody else computes; then, in turn, what others held and may have left unfinished.
    for wait in (False, True):
        for point in list(left):
            cell_id = work.ids[point]
            with work.store.claim(cell_id, wait=wait) as claimed:
                if not claimed:
                    continue
                cell = work.store.read(cell_id)
                if cell is None:
                    if point.needs_data and statistics is None:
                        statistics = _gather(work, subject, done)
                    name = str(point)
                    work.tell(name, done)
                    known = statistics if point.needs_data else None
                    cell = measure(subject, point, cell_id, statistics=known, progress=work.within(name, done))
                    work.store.write(cell)
            left.remove(point)
            done += 1
            work.tell(str(point), done, cell=cell)


def _prepare(work: Work) -> Subject:
    """Loads the model and runs the reference. Its cell is written once; every process needs its states."""
    config, windows = work.config, work.windows
    model = work.checkpoint.model(dtype=jnp.dtype(config.dtype))
    layers = selected_layers(model, config.layers)
    check_fits(model, layers, work.points)
    work.store.make()
    work.tell("reference", 0)
    started = time.perf_counter()
    reference, perplexity = prepare_reference(model, windows, batch=work.batch, progress=work.within("reference", 0))
    subject = Subject(model=model, layers=layers, windows=windows, reference=reference)
    with work.store.claim(work.reference_id, wait=True):
        if work.store.read(work.reference_id) is None:
            seconds = time.perf_counter() - started
            work.store.write(reference_cell(subject, perplexity, work.reference_id, seconds))
    return subject


def _gather(work: Work, subject: Subject, done: int) -> Statistics:
    """What all cells of the grid that learn from data need."""
    work.tell("statistics", done)
    needs = wanted(work.points)
    assert needs is not None
    assert work.calibration is not None
    statistics = gather(
        subject.model,
        list(subject.layers),
        work.calibration.tokens,
        batch=work.batch,
        wanted=needs,
        progress=lambda share: work.tell("statistics", done, share=share),
    )
    work.tell("statistics", done, share=1.0, seconds=statistics.seconds)
    return statistics


def _calibration(config: SweepConfig, tokenizer: TextTokenizer, windows: Windows) -> Windows:
    """The windows that methods learn from. Raises InputError where there are too few, or evaluation holds a part."""
    count = config.calibration_windows
    found = text_windows(load_calibration(config.calibration), tokenizer, window=config.window, limit=count)
    if len(found.tokens) < count:
        raise InputError(
            f"calibration text {config.calibration!r} has {found.total_tokens} tokens, {count} windows of "
            f"{config.window} need {count * config.window}: give a longer text, or "
            f"--calibration-windows {len(found.tokens)}"
        )
    check_disjoint(found, windows)
    return found


def _given(point: Point, calibration: Windows | None) -> dict[str, Any]:
    """What decides a cell's numbers beyond the sweep's definition: nothing for rounding, which has no settings."""
    if point.method == ROUNDING:
        return {}
    given: dict[str, Any] = {"configs": point.configs()}
    if point.needs_data:
        assert calibration is not None
        given["calibration"] = {
            "text_sha256": calibration.text_sha256,
            "ids_sha256": calibration.sha256,
            "window": calibration.window,
            "windows": len(calibration.tokens),
        }
    return given


def _as_manifest(calibration: Windows) -> dict[str, Any]:
    """Of the whole run; a cell's id holds it too."""
    return {
        "name": calibration.text_name,
        "sha256": calibration.text_sha256,
        "ids_sha256": calibration.sha256,
        "window": calibration.window,
        "windows": len(calibration.tokens),
        "statistics": "of the float model, one pass for all cells (jquant quantize: of the model as quantized so far)",
    }


def _definition(
    config: SweepConfig, checkpoint: Checkpoint, windows: Windows, *, backend: str, batch: int
) -> dict[str, Any]:
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
        "backend": backend,
        "batch": batch,  # sums are taken in another order, which moves the last digits
        "numerics": NUMERICS,
    }


def _environment(config: SweepConfig) -> dict[str, Any]:
    where = {
        "jquant": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if config.executor == "local":
        where["device"] = f"{len(jax.devices())} × {jax.devices()[0].device_kind}"
    return where  # of Ray's workers as the first of them says; the driver does not start devices that they may share


def _check_report_extra() -> None:
    for package in ("matplotlib", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the report needs {package}: pip install 'jquant[report]', or pass --no-report")
