"""From a float checkpoint to a packed one by training: prepared, distilled from its float self, converted, saved.

Stands above the rooms, like the command line: it joins models, qat, evaluation and io.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jquant import __version__
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.data.blocks import Windows
from jquant.data.overlap import calibration_record, check_disjoint, with_earlier
from jquant.evaluation.perplexity import perplexity
from jquant.io.folder_lock import locked_folder
from jquant.io.native import check_new_folder, is_native, write_native
from jquant.io.processes import is_writer, on_writer
from jquant.kernels.dispatch import way
from jquant.models.checkpoint import Checkpoint
from jquant.models.decoder import Decoder, check_length
from jquant.models.save import describe, tokenizer_files
from jquant.nn.install import activations_of, tensors_of
from jquant.nn.mesh import make_mesh
from jquant.nn.protocol import CausalLM
from jquant.qat.batches import RowBatches
from jquant.qat.checkpoints import STATES, has_states
from jquant.qat.config import QATConfig
from jquant.qat.convert import convert
from jquant.qat.losses import distillation_loss
from jquant.qat.metrics import METRICS, TENSORBOARD, StepRecord
from jquant.qat.prepare import prepare
from jquant.qat.rules import Recipe
from jquant.qat.schedule import rounded_to_nearest
from jquant.qat.stage import calibrate
from jquant.qat.trainer import EvalFn, TrainResult, train

NUMERICS = 3  # raised when a change moves bits: an unfinished run of another value is not gone on with
_TRAINING, _FINISHED = "training", "finished"  # parts of the unfinished folder
_CALIBRATION_BATCHES = 8  # inputs that trained scales of activations start from


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The loss of a run; arguments of `distillation_loss`."""

    weight: float = 1.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    remat: bool = False


def train_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    training: Windows,
    out: Path,
    *,
    config: QATConfig,
    distillation: Distillation | None = None,
    evaluation: Windows | None = None,
    eval_batch: int = 1,
    announce: Callable[[str], None] = print,
    listen: Callable[[StepRecord], None] | None = None,
) -> TrainResult | None:
    """Trains a checkpoint into a new native one, whose weights are packed.

    Until it is done everything lies in `.NAME.unfinished` beside `out`; the same call goes on from there, to the same
    bits (on GPU with the flag that qat/trainer.py names).

    Args:
        checkpoint: of float weights; they start the training, and are its teacher.
        recipe: which layers are quantized, and how.
        training: windows of text.
        out: a folder that does not exist yet, or is empty.
        config: of the training.
        distillation: the loss; by default all of it is the teacher's.
        evaluation: windows that perplexity is measured on, every `config.eval_every` steps and at the end.
        eval_batch: of these, so many a forward pass.
        announce: hears what was prepared.
        listen: hears of every step.

    Returns:
        What the training came to; None where an earlier run had come to its end, and only the name was missing.

    Raises:
        InputError: a rule does not fit, the texts overlap, training diverges, or the folder cannot be written.
    """
    distillation = Distillation() if distillation is None else distillation
    check_length(checkpoint.config, training.window)
    if evaluation is not None:
        check_length(checkpoint.config, evaluation.window)
        check_disjoint(training, evaluation)
    check_out(out)
    unfinished = _unfinished(out)
    result = None
    with locked_folder(unfinished), _removed_if_empty(unfinished):
        if not on_writer(lambda: is_native(unfinished / _FINISHED)):
            result = _train(
                checkpoint,
                recipe,
                training,
                unfinished,
                config=config,
                distillation=distillation,
                evaluate=None if evaluation is None else _evaluator(evaluation, eval_batch),
                announce=announce,
                listen=listen,
            )
        on_writer(lambda: _publish(unfinished, out))
    return result


def _publish(unfinished: Path, out: Path) -> None:
    shutil.rmtree(unfinished / _TRAINING / STATES, ignore_errors=True)
    if out.exists():
        out.rmdir()  # empty, as was checked; a folder replaces another only where that is
    (unfinished / _FINISHED).rename(out)
    shutil.rmtree(unfinished, ignore_errors=True)


def check_out(out: Path) -> None:
    """Removes what a run leaves that was killed after giving its result the name.

    Raises:
        InputError: `out` exists and is not an empty folder.
    """
    unfinished = _unfinished(out)

    def check() -> None:
        if is_native(out) and unfinished.is_dir() and not has_states(unfinished / _TRAINING):
            shutil.rmtree(unfinished, ignore_errors=True)
        check_new_folder(out)

    on_writer(check)


def _train(
    checkpoint: Checkpoint,
    recipe: Recipe,
    training: Windows,
    unfinished: Path,
    *,
    config: QATConfig,
    distillation: Distillation,
    evaluate: EvalFn | None,
    announce: Callable[[str], None],
    listen: Callable[[StepRecord], None] | None,
) -> TrainResult:
    """Prepared, trained, packed and written; only the name is missing."""
    batches = RowBatches(training.tokens, batch=config.rows_per_step, seed=config.seed)
    loss = distillation_loss(
        weight=distillation.weight,
        temperature=distillation.temperature,
        hidden_weight=distillation.hidden_weight,
        remat=distillation.remat,
    )
    definition = _definition(checkpoint, recipe, training, distillation)
    mesh = make_mesh(config.mesh)
    model = checkpoint.model(mesh=mesh)
    packed = next((path for path, tensor in tensors_of(model).items() if isinstance(tensor, QTensor)), None)
    if packed is not None:
        raise InputError(f"{checkpoint.name}: {packed} is packed; training starts from the float model")
    teacher = nnx.clone(model)  # of the same arrays: training works on copies
    report = prepare(model, recipe, key=jax.random.key(config.seed), announce=announce)
    if report.uncalibrated:
        _calibrate(model, training, config)
        announce(f"… and start from {_CALIBRATION_BATCHES} batches of the training text")
    if evaluate is not None and not on_writer(lambda: has_states(unfinished / _TRAINING)):
        with rounded_to_nearest(model):
            of_rounded = evaluate(model)
        for name, of_float in evaluate(teacher).items():
            announce(f"{name} before training: {of_rounded[name]:.6g}, in floats {of_float:.6g}")
    announce("training: the first step is compiled before it runs, which may take a minute")
    result = train(
        model,
        loss,
        batches,
        config,
        teacher=teacher,
        folder=unfinished / _TRAINING,
        definition=definition,
        eval_fn=evaluate,
        listen=listen,
    )
    _write(convert(model), checkpoint, definition, training, config, unfinished)
    return result


def _unfinished(out: Path) -> Path:
    return out.parent / f".{out.name}.unfinished"


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """A run that was refused before it began leaves nothing behind."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _calibrate(model: Decoder, training: Windows, config: QATConfig) -> None:
    rows = RowBatches(training.tokens, batch=min(config.batch, len(training.tokens)), seed=config.seed)
    batches = islice(iter(lambda: jnp.asarray(next(rows)), None), _CALIBRATION_BATCHES)
    calibrate(model, batches)


def _evaluator(evaluation: Windows, batch: int) -> EvalFn:
    return lambda model: {"perplexity": perplexity(cast(CausalLM, model), evaluation, batch=batch).value}


def _write(
    model: Decoder,
    checkpoint: Checkpoint,
    definition: Mapping[str, Any],
    training: Windows,
    config: QATConfig,
    unfinished: Path,
) -> None:
    """The packed model, with what it learned from and how, and the figures of each step beside it."""
    provenance = {
        "source": checkpoint.path.name,
        "source_sha256": definition["source_sha256"],
        "recipe": definition["recipe"],
        # What evaluation refuses to measure on.
        "calibration": with_earlier(calibration_record(training), checkpoint.provenance.get("calibration")),
        "loss": definition["loss"],
        "training": config.as_json(),
        "kernels": definition["kernels"],
        "jquant": __version__,
        "jax": jax.__version__,
    }
    description = describe(
        checkpoint.config, note=checkpoint.note, provenance=provenance, activations=activations_of(model)
    )
    files = tokenizer_files(checkpoint.tokenizer())
    if is_writer():
        files = {**files, METRICS: (unfinished / _TRAINING / METRICS).read_bytes()}
    write_native(unfinished / _FINISHED, tensors_of(model), description, extra_files=files)
    if is_writer() and (unfinished / _TRAINING / TENSORBOARD).is_dir():
        shutil.copytree(unfinished / _TRAINING / TENSORBOARD, unfinished / _FINISHED / TENSORBOARD)


def _definition(
    checkpoint: Checkpoint, recipe: Recipe, training: Windows, distillation: Distillation
) -> dict[str, Any]:
    """What decides the bits of the result, beside the trainer's config."""
    return {
        "numerics": NUMERICS,
        "source_sha256": checkpoint.sha256(),
        "recipe": recipe.as_json(),
        "data": {
            "text": training.text_name,
            "text_sha256": training.text_sha256,
            "ids_sha256": training.sha256,
            "windows": len(training.tokens),
            "window": training.window,
        },
        "loss": {
            "weight": distillation.weight,
            "temperature": distillation.temperature,
            "hidden_weight": distillation.hidden_weight,
            "remat": distillation.remat,
        },
        "kernels": way(),
        "jquant": __version__,
    }
