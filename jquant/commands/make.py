"""Commands that write a model: quantize, qat, export, convert."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from jquant.commands.options import calibration_batch, default_batch
from jquant.commands.terminal import new_console, progress_bar, told_progress
from jquant.core.errors import InputError
from jquant.models.export_config import ConvertConfig, ExportConfig
from jquant.ptq.config import WINDOW, WINDOWS, QuantizeConfig
from jquant.qat.command import QATCommand

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jquant.models.checkpoint import Checkpoint


def quantize_command(config: QuantizeConfig) -> None:
    from jquant.io.native import check_new_folder
    from jquant.models.checkpoint import open_checkpoint
    from jquant.nn.matrices import layer_shapes
    from jquant.nn.mesh import make_mesh
    from jquant.ptq.coverage import layer_lines, render
    from jquant.ptq.pipeline import Event
    from jquant.ptq.presets import calibrated, find_recipe
    from jquant.ptq.recipe import one_rule
    from jquant.quantization_run import quantize_checkpoint

    check_new_folder(config.out)
    mesh = make_mesh(config.mesh)
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
    blocks = checkpoint.config.num_layers
    with told_progress(f"quantizing {blocks} blocks", blocks + 1) as advance:

        def heard(event: Event) -> None:
            lines = [] if event.found else layer_lines(event.reports)
            advance(event.done, () if config.verbose else lines)
            if lines and config.verbose:
                said = "\n".join([*lines, f"{event.part}: {event.seconds:.1f} s"])
                new_console(stderr=True).print(said, highlight=False, markup=False, soft_wrap=True)

        coverage = quantize_checkpoint(
            checkpoint,
            recipe,
            config.out,
            calibration=windows,
            batch=1 if windows is None else calibration_batch(config.batch, len(windows.tokens), mesh),
            dtype=config.dtype,
            products=config.products,
            spill=config.spill,
            mesh=mesh,
            on_estimate=lambda estimate: new_console(stderr=True).print(f"[dim]{estimate}[/dim]", highlight=False),
            on_resume=lambda parts: new_console(stderr=True).print(
                f"going on behind {parts} of {blocks + 1} parts that an earlier run finished",
                highlight=False,
            ),
            progress=heard,
        )
    if config.coverage:
        new_console().print(render(coverage))
    weights = sum(math.prod(layer.shape) for layer in coverage.layers)
    bits = sum(layer.bits_per_weight * math.prod(layer.shape) for layer in coverage.layers) / weights
    print(f"{coverage.summary()}\n{bits:.3f} bits a weight, padding included; {coverage.seconds:.1f} s; {config.out}")


def _calibration(config: QuantizeConfig, tokenizer: Any, recipe: Any) -> Any:
    """The windows that the recipe learns from."""
    from jquant.data.blocks import text_windows
    from jquant.data.text import load_calibration
    from jquant.ptq.presets import Calibration, recommended

    advised = config.calibration == "recommended"
    advice = recommended(recipe) if advised else Calibration(text=config.calibration, windows=WINDOWS, window=WINDOW)
    source = advice.text
    count = advice.windows if config.calibration_windows is None else config.calibration_windows
    window = advice.window if config.window is None else config.window
    if advised and (count, window) != (advice.windows, advice.window):
        new_console(stderr=True).print(
            f"calibrating on {count} windows of {window} tokens of {source}, as asked for; recommended are "
            f"{advice.windows} of {advice.window}",
            highlight=False,
        )
    windows = text_windows(load_calibration(source), tokenizer, window=window, limit=count)
    if len(windows.tokens) < count:
        raise InputError(
            f"calibration text {source!r} has {windows.total_tokens} tokens, {count} windows of {window} need "
            f"{count * window}: give a longer text, or --calibration-windows {len(windows.tokens)}"
        )
    return windows


def qat_command(config: QATCommand) -> None:
    from jquant.data.blocks import text_windows
    from jquant.data.text import load_calibration, load_text
    from jquant.models.checkpoint import open_checkpoint
    from jquant.models.save import packed_bits
    from jquant.nn.mesh import make_mesh
    from jquant.qat.progress import shown_progress
    from jquant.qat.rules import find_recipe
    from jquant.qat_run import Distillation, check_out, train_checkpoint

    check_out(config.out)
    recipe = find_recipe(config.recipe)
    checkpoint = open_checkpoint(config.model)
    tokenizer = checkpoint.tokenizer()
    training = text_windows(load_calibration(config.data), tokenizer, window=config.window, limit=config.windows)
    evaluation = None
    if config.eval_text is not None:
        text = load_text(config.eval_text)
        evaluation = text_windows(text, tokenizer, window=config.eval_window, limit=config.eval_windows)
    console = new_console(stderr=True)
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
            eval_batch=default_batch(None, make_mesh(config.mesh)),
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


def export_command(config: ExportConfig | ConvertConfig) -> None:
    from jquant.models.checkpoint import open_checkpoint
    from jquant.models.export import export

    started = time.perf_counter()
    limit = int(config.max_shard_gb * 1e9)
    checkpoint = open_checkpoint(config.model).packed()
    evaluation = None if config.text is None else _perplexity_measure(checkpoint, config)
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


def _perplexity_measure(
    checkpoint: Checkpoint, config: ExportConfig | ConvertConfig
) -> Callable[[], Mapping[str, str]]:
    """What measures the rows of a model card; what cannot be measured is refused here, before anything is written."""
    from jquant.data.blocks import text_windows
    from jquant.data.overlap import refuse_seen
    from jquant.data.text import load_text
    from jquant.evaluation.scoring import evaluate
    from jquant.io.native import check_new_folder

    if config.format == "gguf":
        raise InputError("--text with a gguf, which has no model card to say a perplexity in: leave it out")
    check_new_folder(config.out)
    assert config.text is not None
    windows = text_windows(load_text(config.text), checkpoint.tokenizer(), window=config.window, limit=config.windows)
    refuse_seen(checkpoint.provenance.get("calibration"), windows, checkpoint.name)

    def measure() -> Mapping[str, str]:
        with progress_bar(f"evaluating {len(windows.tokens)} windows", len(windows.tokens)) as advance:
            found = evaluate(checkpoint.model(), windows, batch=default_batch(None), progress=advance).perplexity
        error = (
            "" if math.isnan(found.stderr) else f" ± {found.stderr * found.value:.4f}"
        )  # of one window there is none
        return {
            "perplexity": f"{found.value:.4f}{error}",
            "measured on": f"`{windows.text_name}`, {len(windows.tokens)} windows of {config.window} tokens, text "
            f"sha256 `{windows.text_sha256}`",
        }

    return measure
