"""The command line: parsing and wiring. Each command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jquant.config_file import read_config_file
from jquant.core.errors import InputError
from jquant.evaluation.config import EvalConfig
from jquant.evaluation.diagnose_config import DiagnoseConfig
from jquant.evaluation.validate_config import ValidateConfig
from jquant.hardware.advise_config import AdviseConfig
from jquant.hardware.recommend_config import HardwareConfig, RecommendConfig
from jquant.models.export_config import ConvertConfig, ExportConfig
from jquant.models.generate_config import GenerateConfig
from jquant.ptq.config import QuantizeConfig
from jquant.qat.command import QATCommand
from jquant.sweep.config import SweepConfig

if TYPE_CHECKING:
    from jquant.data.text import Text
    from jquant.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Lists what a checkpoint holds: architecture, parameters, tensor types, bits per weight, sizes."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A GGUF file, a safetensors file, a Hugging Face folder, a folder of `jquant quantize`, or `demo`."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class FormatsConfig:
    """Lists the number formats: bits, range, levels, bits per weight with scales, hardware, sources."""

    json: bool = False
    """Print JSON."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failed validation, 2 for a mistake of the caller, 130 when
    interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from jquant import __version__

        print(f"jquant {__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise InputError(f"unknown command {words[0]!r}; there are {', '.join(COMMANDS)}")
        if words == ["advise"]:
            _advise_by_questions()
            return 0
        config_type, run = COMMANDS[words[0]]
        code = run(_parse(config_type, words[0], words[1:]))
    except InputError as error:
        print(f"jquant: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jquant: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return code or 0


def _parse(config_type: type, command: str, words: list[str]) -> Any:
    """The config from `--config FILE`, if given, and from the words, which win."""
    path = None
    for index, word in enumerate(words):
        if word == "--config":
            if index + 1 == len(words):
                raise InputError("--config needs the path of a YAML file")
            path, words = words[index + 1], words[:index] + words[index + 2 :]
            break
        if word.startswith("--config="):
            path, words = word.removeprefix("--config="), words[:index] + words[index + 1 :]
            break
    if path is None:
        return tyro.cli(config_type, prog=f"jquant {command}", args=words)
    values = read_config_file(path, config_type)
    default = config_type(**{**_required(config_type), **values})
    return tyro.cli(config_type, prog=f"jquant {command}", args=words, default=default)


def _required(config_type: type) -> dict[str, Any]:
    return {
        field.name: tyro.MISSING for field in dataclasses.fields(config_type) if field.default is dataclasses.MISSING
    }


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {(config.__doc__ or '').splitlines()[0]}" for name, (config, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jquant COMMAND …        (jquant COMMAND --help for its options)",
            "",
            "The quantization lab for JAX.",
            "",
            "commands:",
            *lines,
            "",
            "MODEL is `demo`, the path of a GGUF file or of a checkpoint folder, or a hub id.",
            "Options may also come from a YAML file: jquant COMMAND --config FILE.",
        ]
    )


def _eval(config: EvalConfig) -> None:
    if config.tasks:
        _eval_tasks(config)
        return
    started = time.perf_counter()
    schemes = _parsed_scheme(config.scheme)

    from jquant.data.blocks import text_windows
    from jquant.data.text import load_text
    from jquant.evaluation.scoring import evaluate, prepare_reference
    from jquant.models.checkpoint import open_checkpoint
    from jquant.models.save import model_bytes

    text = load_text(config.text)
    checkpoint = open_checkpoint(config.model)
    if schemes is None:
        checkpoint = checkpoint.packed()
    _refuse_calibration_text(checkpoint, text)
    windows = text_windows(
        text, checkpoint.tokenizer(), window=config.window, stride=config.stride, limit=config.windows
    )
    batch = _batch(config.batch)
    reference = None
    if config.reference is not None:
        other = open_checkpoint(config.reference).model(dtype=config.dtype)
        reference, _ = prepare_reference(other, windows, batch=batch)
    model = checkpoint.model(dtype=config.dtype)
    _round(model, schemes)
    with _progress(f"evaluating {len(windows.tokens)} windows", len(windows.tokens)) as advance:
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
        _write_json(config.json, record)


def _eval_tasks(config: EvalConfig) -> None:
    started = time.perf_counter()
    schemes = _parsed_scheme(config.scheme)

    from jquant.benchmark_run import benchmark, tasks_record
    from jquant.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(config.model)
    model = checkpoint.model(dtype=config.dtype)
    _round(model, schemes)
    with _stages() as listen:
        results = benchmark(
            model,
            checkpoint.tokenizer(),
            config.tasks,
            max_length=config.max_length,
            progress=listen,
            limit=config.limit,
            task_path=config.task_path,
            few_shot=config.few_shot,
            chat=config.chat,
            allow_code=config.allow_code,
        )
    _print_tasks(results)
    if config.json is not None:
        record = {
            "model": config.model,
            "model_sha256": checkpoint.sha256(),
            "scheme": config.scheme if schemes is None else str(schemes),
            "note": checkpoint.note,
            "tasks": tasks_record(results),
            "seconds": time.perf_counter() - started,
        }
        _write_json(config.json, record)


def _validate(config: ValidateConfig) -> int:
    from rich.markdown import Markdown

    from jquant.evaluation.validation_report import to_markdown
    from jquant.validation_run import run_validation

    with _stages() as listen:
        validation = run_validation(config, listen)
    text, console = to_markdown(validation), _console()
    console.print(Markdown(text) if console.is_terminal else text, markup=False, highlight=False, soft_wrap=True)
    if config.out is not None:
        print(f"Written to {config.out}: validation.json, validation.md, validation.html")
    return 0 if validation.passed else 1


def _diagnose(config: DiagnoseConfig) -> None:
    from jquant.diagnosis_run import run_diagnosis
    from jquant.evaluation.diagnosis_report import to_text

    with _stages() as listen:
        found = run_diagnosis(config, listen)
    print(to_text(found))
    for written in (config.recipe_out, None if config.out is None else config.out / "diagnosis.html"):
        if written is not None:
            print(f"Written: {written}")


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
    _console().print(table)


def _refuse_calibration_text(checkpoint: Checkpoint, text: Text) -> None:
    if checkpoint.calibration_sha256 == text.sha256:
        raise InputError(
            f"{checkpoint.name} was calibrated on the text {text.name}: its perplexity there says nothing; give another"
        )


def _sweep(config: SweepConfig) -> None:
    from jquant.sweep.run import run_sweep
    from jquant.sweep.show import Progress, show_results

    with Progress() as progress:
        sweep = run_sweep(config, progress.listen)
    show_results(sweep, config)


def _quantize(config: QuantizeConfig) -> None:
    from jquant.io.native import check_new_folder
    from jquant.models.checkpoint import open_checkpoint
    from jquant.nn.matrices import layer_shapes
    from jquant.ptq.coverage import render
    from jquant.ptq.pipeline import Event
    from jquant.ptq.presets import calibrated, find_recipe
    from jquant.ptq.recipe import one_rule
    from jquant.quantization_run import quantize_checkpoint

    check_new_folder(config.out)
    checkpoint = open_checkpoint(config.model)
    shapes = layer_shapes(checkpoint.abstract(dtype=config.dtype))
    if config.scheme is not None:
        recipe = one_rule(config.method, config.scheme, layers=config.layers)
    else:
        assert config.recipe is not None
        recipe = find_recipe(config.recipe, shapes)
    windows = None
    if calibrated(recipe):
        windows = _calibration(config, checkpoint.tokenizer(), recipe)
    with _progress(f"quantizing {checkpoint.config.num_layers} blocks", checkpoint.config.num_layers + 1) as advance:

        def heard(event: Event) -> None:
            advance(event.done)
            worst = max((layer.error for layer in event.reports), default=0.0)
            if event.reports and config.verbose:
                _console(stderr=True).print(f"{event.part}: {event.seconds:.1f} s, largest error {worst:.2e}")

        coverage = quantize_checkpoint(
            checkpoint,
            recipe,
            config.out,
            calibration=windows,
            batch=_batch(config.batch),
            dtype=config.dtype,
            spill=config.spill,
            on_estimate=lambda estimate: _console(stderr=True).print(f"[dim]{estimate}[/dim]", highlight=False),
            progress=heard,
        )
    if config.coverage:
        _console().print(render(coverage))
    weights = sum(math.prod(layer.shape) for layer in coverage.layers)
    bits = sum(layer.bits_per_weight * math.prod(layer.shape) for layer in coverage.layers) / weights
    print(f"{coverage.summary()}\n{bits:.3f} bits a weight, padding included; {coverage.seconds:.1f} s; {config.out}")


def _calibration(config: QuantizeConfig, tokenizer: Any, recipe: Any) -> Any:
    """The windows that the recipe learns from."""
    from jquant.data.blocks import text_windows
    from jquant.data.text import load_text
    from jquant.ptq.presets import recommended

    source, count, window = config.calibration, config.calibration_windows, config.window
    if source == "recommended":
        advice = recommended(recipe)
        source, count, window = advice.text, advice.windows, advice.window
    windows = text_windows(load_text(source), tokenizer, window=window, limit=count)
    if len(windows.tokens) < count:
        raise InputError(
            f"calibration text {source!r} has {windows.total_tokens} tokens, {count} windows of {window} need "
            f"{count * window}: give a longer text, or --calibration-windows {len(windows.tokens)}"
        )
    return windows


def _qat(config: QATCommand) -> None:
    from jquant.data.blocks import text_windows
    from jquant.data.text import load_text
    from jquant.models.checkpoint import open_checkpoint
    from jquant.models.save import packed_bits
    from jquant.qat.progress import shown_progress
    from jquant.qat.rules import find_recipe
    from jquant.qat_run import Distillation, check_out, train_checkpoint

    check_out(config.out)
    recipe = find_recipe(config.recipe)
    checkpoint = open_checkpoint(config.model)
    tokenizer = checkpoint.tokenizer()
    training = text_windows(load_text(config.data), tokenizer, window=config.window, limit=config.windows)
    evaluation = None
    if config.eval_text is not None:
        text = load_text(config.eval_text)
        evaluation = text_windows(text, tokenizer, window=config.eval_window, limit=config.eval_windows)
    console = _console(stderr=True)
    with shown_progress(console) as listen:
        result = train_checkpoint(
            checkpoint,
            recipe,
            training,
            config.out,
            config=config.training(),
            distillation=Distillation(
                weight=config.distillation_weight,
                temperature=config.temperature,
                hidden_weight=config.hidden_weight,
                remat=config.remat,
            ),
            evaluation=evaluation,
            eval_batch=_batch(None),
            announce=lambda said: console.print(said, highlight=False, markup=False),
            listen=listen,
        )
    bits = packed_bits(open_checkpoint(config.out).model())
    if result is not None:
        figures = {"loss": result.loss, **result.evaluation}
        said = ", ".join(f"{name} {value:.6g}" for name, value in figures.items() if not math.isnan(value))
        resumed = f", {result.resumed_from} of them by an earlier run" if result.resumed_from else ""
        print(f"{result.steps} steps{resumed}; {said or 'nothing was left to train'}; {result.seconds:.1f} s")
        if result.best_step is not None:
            print(f"taken is the state of step {result.best_step}, whose {config.best} {result.best:.6g} was the best")
    print(f"{bits:.3f} bits a weight in packed layers, padding included; {config.out}")


def _export(config: ExportConfig | ConvertConfig) -> None:
    from jquant.models.checkpoint import open_checkpoint
    from jquant.models.export import export

    started = time.perf_counter()
    limit = int(config.max_shard_gb * 1e9)
    checkpoint = open_checkpoint(config.model).packed()
    evaluation = None if config.text is None else _measured_perplexity(checkpoint, config)
    export(
        checkpoint,
        config.out,
        format=config.format,
        dtype=config.dtype,
        max_shard_bytes=limit,
        evaluation=evaluation,
    )
    files = list(config.out.iterdir()) if config.out.is_dir() else [config.out]
    size = sum(file.stat().st_size for file in files)
    print(f"{config.out}: {config.format}, {size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s")


def _measured_perplexity(checkpoint: Checkpoint, config: ExportConfig | ConvertConfig) -> dict[str, str]:
    """Rows of a model card."""
    from jquant.data.blocks import text_windows
    from jquant.data.text import load_text
    from jquant.evaluation.scoring import evaluate
    from jquant.io.native import check_new_folder

    if config.format == "gguf":
        raise InputError("--text with a gguf, which has no model card to say a perplexity in: leave it out")
    check_new_folder(config.out)
    assert config.text is not None
    text = load_text(config.text)
    _refuse_calibration_text(checkpoint, text)
    windows = text_windows(text, checkpoint.tokenizer(), window=config.window, limit=config.windows)
    with _progress(f"evaluating {len(windows.tokens)} windows", len(windows.tokens)) as advance:
        found = evaluate(checkpoint.model(), windows, batch=_batch(None), progress=advance).perplexity
    error = "" if math.isnan(found.stderr) else f" ± {found.stderr * found.value:.4f}"  # of one window there is none
    return {
        "perplexity": f"{found.value:.4f}{error}",
        "measured on": f"`{text.name}`, {len(windows.tokens)} windows of {config.window} tokens, text sha256 "
        f"`{text.sha256}`",
    }


def _generate(config: GenerateConfig) -> None:
    schemes = _parsed_scheme(config.scheme)

    from jquant.models.checkpoint import open_checkpoint
    from jquant.models.generate import Sampling, generate

    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
    checkpoint = open_checkpoint(config.model)
    if schemes is None:
        checkpoint = checkpoint.packed()
    tokenizer = checkpoint.tokenizer()
    model = checkpoint.model(dtype=config.dtype)
    _round(model, schemes)
    prompt = tokenizer.encode(config.prompt, add_eos=False)
    tokens: list[int] = []
    shown = tokenizer.decode(prompt)
    print(shown, end="", flush=True)
    # A token may be a part of a character: what is shown is always the decoding of all tokens so far.
    for token in generate(model, prompt, max_tokens=config.max_tokens, sampling=sampling, stop_ids=tokenizer.eos_ids):
        tokens.append(token)
        text = tokenizer.decode([*prompt, *tokens])
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode([*prompt, *tokens])[len(shown) :], flush=True)


def _inspect(config: InspectConfig) -> None:
    from jquant.io.inspect import inspect_file, render
    from jquant.io.locate import locate_model

    inspection = inspect_file(locate_model(config.file))
    if config.json:
        print(_json(inspection.as_json()))
    else:
        _console().print(render(inspection))


def _formats(config: FormatsConfig) -> None:
    from jquant.hardware.catalog import catalog, render

    entries = catalog()
    if config.json:
        print(_json([entry.as_json() for entry in entries]))
    else:
        _console().print(render(entries))


def _hardware(config: HardwareConfig) -> None:
    from jquant.hardware.devices import DEVICES, find_device, render
    from jquant.hardware.local import local_device, measured_device

    if config.measure:
        from jquant.recommendation_run import measure_local

        copied = None if config.copy_mb is None else config.copy_mb * 1_000_000
        local, measured = measure_local(side=config.side, copied_bytes=copied)
        device = measured_device(local, measured)
        if config.json:
            print(_json({"local": local.as_json(), "measured": dataclasses.asdict(measured)}))
            return
        _console().print(render([device]))
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in measured.tera_rates.items())
        print(f"All rates that were measured, in 1e12 operations a second: {rates}")
        return
    devices = list(DEVICES.values()) if config.device is None else [find_device(config.device)]
    if config.json:
        print(_json([device.as_json() for device in devices]))
        return
    _console().print(render(devices))
    if config.device is None:
        local = local_device()
        known = "not in the list" if local.known is None else local.known.name
        memory = "" if local.memory_bytes is None else f", {local.memory_bytes / 1e9:.1f} GB"
        said = f"Here: {local.count} × {local.description} ({local.platform}{memory}), {known}; native: "
        print(f"{said}{', '.join(local.native) or 'not known'}. Measure it: jquant hardware --measure")


def _recommend(config: RecommendConfig) -> None:
    from jquant.hardware.recommendation_table import render
    from jquant.recommendation_run import recommend_for

    found = recommend_for(config)
    if config.json:
        print(_json(found.as_json()))
    else:
        _console().print(render(found))


def _advise_by_questions() -> None:
    if not sys.stdin.isatty():
        raise InputError(
            "advise without arguments asks questions, and standard input is no terminal; give the answers as options: "
            "jquant recommend llama-3-70b --device h100-sxm, or jquant advise demo --scheme int4:g128 --ptq-loss 3"
        )
    from jquant.advice_run import advise_interactively

    advise_interactively()


def _advise(config: AdviseConfig) -> None:
    from jquant.hardware.advise_config import count
    from jquant.hardware.qat_decision import Question, decide, device_rate, measured_rate, render

    spec = _parsed_scheme(config.scheme)
    if config.tflops is not None:
        rate = measured_rate(config.tflops, memory_gb=config.memory)
    else:
        rate = device_rate(config.device or "h100-sxm", utilization=config.utilization)
    if config.parameters is not None:
        parameters = count(config.parameters, "parameters")
    else:
        from jquant.models.checkpoint import open_checkpoint
        from jquant.nn.install import tensors_of

        abstract = open_checkpoint(config.model or "").abstract()
        parameters = sum(tensor.size for tensor in tensors_of(abstract).values())
    decision = decide(
        Question(
            scheme=spec,
            requirement=config.requirement,
            parameters=parameters,
            tokens=count(config.tokens, "tokens"),
            rate=rate,
            devices=config.devices,
            ptq_loss_percent=config.ptq_loss,
            tolerance_percent=config.tolerance,
            distilled=config.distill,
            budget_hours=config.budget,
        )
    )
    print(_json(decision.as_json()) if config.json else render(decision))


COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "eval": (EvalConfig, _eval),
    "validate": (ValidateConfig, _validate),
    "diagnose": (DiagnoseConfig, _diagnose),
    "sweep": (SweepConfig, _sweep),
    "quantize": (QuantizeConfig, _quantize),
    "qat": (QATCommand, _qat),
    "export": (ExportConfig, _export),
    "convert": (ConvertConfig, _export),
    "generate": (GenerateConfig, _generate),
    "inspect": (InspectConfig, _inspect),
    "formats": (FormatsConfig, _formats),
    "hardware": (HardwareConfig, _hardware),
    "recommend": (RecommendConfig, _recommend),
    "advise": (AdviseConfig, _advise),
}


def _parsed_scheme(spec: str | None) -> Any:
    if spec is None:
        return None
    from jquant.core.scheme import scheme

    return scheme(spec)


def _round(model: Any, scheme: Any) -> None:
    if scheme is not None:
        from jquant.ptq.rtn import quantize_layers

        quantize_layers(model, scheme)


def _batch(batch: int | None) -> int:
    import jax

    return (1 if jax.default_backend() == "cpu" else 8) if batch is None else batch


def _print_evaluation(record: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in record.items():
        if value is not None and value != "":
            table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    _console().print(table)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress

    with Progress(console=_console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextlib.contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each of several stages that tell their name, how much is done, and of how much."""
    from rich.progress import Progress

    with Progress(console=_console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def listen(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield listen


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _write_json(path: Path, record: Any) -> None:
    from jquant.io.atomic import replacing

    with replacing(path) as file:
        file.write(_json(record).encode())


def _json(record: Any) -> str:
    from jquant.io.json_file import as_text

    return as_text(record)


if __name__ == "__main__":
    sys.exit(main())
