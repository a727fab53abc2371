"""Commands that measure: eval, validate, diagnose, sweep."""

from __future__ import annotations

import math
import time
from typing import Any

from jquant.commands.options import default_batch, parsed_scheme, round_layers
from jquant.commands.terminal import new_console, progress_bar, stage_bars, write_json
from jquant.evaluation.config import EvalConfig
from jquant.evaluation.diagnose_config import DiagnoseConfig
from jquant.evaluation.validate_config import ValidateConfig
from jquant.sweep.config import SweepConfig


def eval_command(config: EvalConfig) -> None:
    if config.benchmark.tasks:
        _eval_tasks(config)
        return
    started = time.perf_counter()
    schemes = parsed_scheme(config.scheme)

    from jquant.data.blocks import text_windows
    from jquant.data.overlap import refuse_seen
    from jquant.data.text import load_text
    from jquant.evaluation.scoring import evaluate, prepare_reference
    from jquant.models.checkpoint import open_checkpoint
    from jquant.models.save import model_bytes
    from jquant.nn.mesh import make_mesh

    mesh = make_mesh(config.mesh)
    text = load_text(config.text)
    checkpoint = open_checkpoint(config.model)
    if schemes is None:
        checkpoint = checkpoint.packed()
    windows = text_windows(
        text, checkpoint.tokenizer(), window=config.window, stride=config.stride, limit=config.windows
    )
    refuse_seen(checkpoint.provenance.get("calibration"), windows, checkpoint.name)
    batch = default_batch(config.batch, mesh)
    reference = None
    if config.reference is not None:
        other = open_checkpoint(config.reference).model(dtype=config.dtype, mesh=mesh)
        reference, _ = prepare_reference(other, windows, batch=batch)
    model = checkpoint.model(dtype=config.dtype, mesh=mesh)
    round_layers(model, schemes)
    with progress_bar(f"evaluating {len(windows.tokens)} windows", len(windows.tokens)) as advance:
        found = evaluate(model, windows, reference=reference, batch=batch, progress=advance)
    result = found.perplexity
    record = {
        "model": config.model,
        "model_sha256": checkpoint.sha256(),
        "scheme": config.scheme if schemes is None else str(schemes),
        "perplexity": result.value,
        "nll": result.nll,
        "stderr": result.stderr,
        "tokens": result.protocol.tokens_total,
        **{name: value for name, value in result.protocol.as_json().items() if name != "tokens_total"},
        "model_bytes": model_bytes(model),
        "note": checkpoint.note,
    }
    if found.divergence is not None:
        record |= {
            "reference": config.reference,
            "kl": found.divergence.kl.value,
            "kl_stderr": found.divergence.kl.stderr,
            "top1": found.divergence.top1.value,
            "top1_stderr": found.divergence.top1.stderr,
        }
    record["seconds"] = time.perf_counter() - started
    _print_evaluation(record)
    if config.json is not None:
        write_json(config.json, record)


def _eval_tasks(config: EvalConfig) -> None:
    started = time.perf_counter()
    schemes = parsed_scheme(config.scheme)

    from jquant.benchmark_run import benchmark, tasks_record
    from jquant.models.checkpoint import open_checkpoint
    from jquant.nn.mesh import make_mesh

    checkpoint = open_checkpoint(config.model)
    if schemes is None:
        checkpoint = checkpoint.packed()
    model = checkpoint.model(dtype=config.dtype, mesh=make_mesh(config.mesh))
    round_layers(model, schemes)
    with stage_bars() as listen:
        results = benchmark(model, checkpoint.tokenizer(), config.benchmark, progress=listen)
    _print_tasks(results)
    if config.json is not None:
        record = {
            "model": config.model,
            "model_sha256": checkpoint.sha256(),
            "scheme": config.scheme if schemes is None else str(schemes),
            "note": checkpoint.note,
            "chat": config.benchmark.chat,
            "limit": config.benchmark.limit,
            "tasks": tasks_record(results),
            "seconds": time.perf_counter() - started,
        }
        write_json(config.json, record)


def _print_tasks(results: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "items", "few-shot", "metric", "score", "stderr"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for result in results:
        for index, (metric, score) in enumerate(result.scores.items()):
            start = (result.task, str(result.count), str(result.few_shot)) if index == 0 else ("", "", "")
            stderr = result.stderr.get(metric, math.nan)
            table.add_row(*start, metric, f"{score:.4f}", "" if math.isnan(stderr) else f"{stderr:.4f}")
    new_console().print(table)


def _print_evaluation(record: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in record.items():
        if value is not None and value != "":
            table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    new_console().print(table)


def validate_command(config: ValidateConfig) -> int:
    from rich.markdown import Markdown

    from jquant.evaluation.validation_report import to_markdown
    from jquant.validation_run import run_validation

    with stage_bars() as listen:
        validation = run_validation(config, listen)
    text, console = to_markdown(validation), new_console()
    console.print(Markdown(text) if console.is_terminal else text, markup=False, highlight=False, soft_wrap=True)
    if config.out is not None:
        print(f"Written to {config.out}: validation.json, validation.md, validation.html")
    return 0 if validation.passed else 1


def diagnose_command(config: DiagnoseConfig) -> None:
    from jquant.diagnosis_run import run_diagnosis
    from jquant.evaluation.diagnosis_report import to_text

    with stage_bars() as listen:
        found = run_diagnosis(config, listen)
    print(to_text(found))
    for written in (config.recipe_out, None if config.out is None else config.out / "diagnosis.html"):
        if written is not None:
            print(f"Written: {written}")


def sweep_command(config: SweepConfig) -> None:
    from jquant.sweep.run import run_sweep
    from jquant.sweep.show import Progress, show_results

    with Progress() as progress:
        sweep = run_sweep(config, progress.listen)
    show_results(sweep, config)
