"""Validates a model: runs text and benchmarks on it and on its reference, or reads their result files, and judges.

Stands above the rooms, like the command line: it joins models and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jquant import __version__
from jquant.benchmark_run import benchmark
from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.scheme import Group, scheme
from jquant.data.blocks import Windows, text_windows
from jquant.data.overlap import refuse_seen
from jquant.data.text import load_text
from jquant.evaluation.benchmark import TaskResult
from jquant.evaluation.comparison import TextComparison, compare_records, compare_text
from jquant.evaluation.scoring import Reference, prepare_reference
from jquant.evaluation.validate import GUIDE_THRESHOLDS, Made, Thresholds, Validation, validate
from jquant.evaluation.validate_config import ValidateConfig
from jquant.evaluation.validation_report import to_html, to_markdown
from jquant.io.atomic import replacing
from jquant.io.json_file import as_text, read_json
from jquant.kernels.dispatch import on_cpu
from jquant.models.checkpoint import Checkpoint, open_checkpoint
from jquant.models.decoder import Decoder
from jquant.ptq.rtn import quantize_layers

Listen = Callable[[str, int, int], None]


class _Side(NamedTuple):
    """What result files say of one model."""

    text: dict[str, Any] | None
    tasks: dict[str, TaskResult]


def run_validation(config: ValidateConfig, listen: Listen = lambda stage, done, total: None) -> Validation:
    """Measures what the config asks for, judges, and writes reports where it names a folder.

    Raises:
        InputError: models do not compare, results are of other models or texts, or scores make no sense.
    """
    checkpoint = open_checkpoint(config.model)
    reference = None if config.reference is None else open_checkpoint(config.reference)
    if config.results:
        text, before, after = _from_files(config, checkpoint, reference)
    else:
        assert reference is not None
        text, before, after = _measured(config, checkpoint, reference, listen)
    validation = validate(
        before,
        after,
        text=text,
        required=config.require,
        thresholds=Thresholds(
            benchmarks={**GUIDE_THRESHOLDS, **config.thresholds()},
            perplexity=config.max_perplexity_increase,
            kl=config.max_kl,
            certain=config.certain,
        ),
        made=made_of(checkpoint, config.scheme),
        facts=_facts(config, checkpoint, reference),
    )
    if config.out is not None:
        write_reports(validation, config.out)
    return validation


def write_reports(validation: Validation, folder: Path) -> None:
    """validation.json, validation.md and validation.html."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "validation.json": as_text(validation.as_json()),
        "validation.md": to_markdown(validation),
        "validation.html": to_html(validation),
    }
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())


def made_of(checkpoint: Checkpoint, spec: str | None = None) -> Made:
    """How the model's weights became what they are: its recipe's first rule, or the scheme that is asked for."""
    recipe = checkpoint.provenance.get("recipe")
    rules = recipe.get("rules") if isinstance(recipe, Mapping) else None
    rule = next((rule for rule in rules or () if isinstance(rule, Mapping) and rule.get("scheme")), {})
    spec = rule.get("scheme") if spec is None else spec
    if not isinstance(spec, str):
        return Made()
    parsed = scheme(spec)
    method = rule.get("method", "rtn")
    steps = [step if isinstance(step, str) else next(iter(step)) for step in rule.get("transforms", [])]
    name = method if isinstance(method, str) else next(iter(method), "rtn")
    return Made(
        method="+".join([*steps, name] if not steps or name != "rtn" else steps),
        scheme=str(parsed),
        activation=str(rule.get("activation") or ""),
        group=parsed.granularity.size if isinstance(parsed.granularity, Group) else None,
        bits=None if parsed.block is not None else parsed.element.bits,
        symmetric=isinstance(parsed.element, Int) and parsed.zero_point == "none",
    )


def _measured(
    config: ValidateConfig, checkpoint: Checkpoint, reference: Checkpoint, listen: Listen
) -> tuple[TextComparison | None, dict[str, TaskResult], dict[str, TaskResult]]:
    """One model after the other, so that memory holds one and the reference's head."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer.sha256 != reference.tokenizer().sha256:
        raise InputError(
            f"{config.model} and {config.reference} have different tokenizers: their predictions do not compare; "
            "is the reference the model that this one was made from?"
        )
    windows = None if config.text is None else _windows(config, checkpoint)
    model = reference.model(dtype=config.dtype)
    prepared: Reference | None = None
    if windows is not None:
        prepared, _ = prepare_reference(
            model, windows, batch=_batch(config), progress=_heard(listen, "reference", windows)
        )
    before = _asked(config, model, reference, listen, "reference")
    del model
    model = checkpoint.model(dtype=config.dtype)
    if config.scheme is not None:
        quantize_layers(model, scheme(config.scheme))
    text = None
    if windows is not None and prepared is not None:
        text = compare_text(model, windows, prepared, progress=_heard(listen, "model", windows))
    return text, before, _asked(config, model, checkpoint, listen, "model")


def _windows(config: ValidateConfig, checkpoint: Checkpoint) -> Windows:
    text = load_text(config.text or "")
    found = text_windows(text, checkpoint.tokenizer(), window=config.window, limit=config.windows)
    refuse_seen(checkpoint.provenance.get("calibration"), found, config.model)
    return found


def _asked(
    config: ValidateConfig, model: Decoder, checkpoint: Checkpoint, listen: Listen, whose: str
) -> dict[str, TaskResult]:
    if not config.benchmark.tasks:
        return {}
    results = benchmark(
        model,
        checkpoint.tokenizer(),
        config.benchmark,
        progress=lambda stage, done, total: listen(f"{whose}: {stage}", done, total),
    )
    return {result.task: result for result in results}


def _heard(listen: Listen, whose: str, windows: Windows) -> Callable[[int], None]:
    return lambda done: listen(f"{whose}: windows", done, len(windows.tokens))


def _from_files(
    config: ValidateConfig, checkpoint: Checkpoint, reference: Checkpoint | None
) -> tuple[TextComparison | None, dict[str, TaskResult], dict[str, TaskResult]]:
    after = _read(config.results, checkpoint, None if config.scheme is None else str(scheme(config.scheme)))
    before = _read(config.reference_results, reference, None)
    if (before.text is None) != (after.text is None):
        whose = "the reference" if before.text is None else "the model"
        raise InputError(f"a perplexity was measured on one side alone: none of {whose}'s result files has one")
    text = None
    if before.text is not None and after.text is not None:
        text = compare_records(before.text, after.text, " and ".join((*config.reference_results, *config.results)))
    return text, before.tasks, after.tasks


def _read(paths: Sequence[str], checkpoint: Checkpoint | None, spec: str | None) -> _Side:
    """Result files of one model. Raises InputError where one is of another model, or two say the same thing twice."""
    text, tasks, first = None, {}, None
    for path in paths:
        record = read_json(Path(path))
        found = record.get("model_sha256")
        if not isinstance(found, str):
            raise InputError(f"{path}: does not say of which model it is: write it by `jquant eval --json`")
        if checkpoint is not None and found != checkpoint.sha256():
            raise InputError(
                f"{path}: is of another model ({record.get('model')}, {found[:12]}…) than {checkpoint.name} "
                f"({checkpoint.sha256()[:12]}…)"
            )
        if checkpoint is not None and record.get("scheme") != spec:
            raise InputError(
                f"{path}: was measured with --scheme {record.get('scheme')}, asked for is {spec}: name the same here"
            )
        if first is not None and (found, record.get("scheme")) != first:
            raise InputError(f"{path}: is of another model or scheme than {paths[0]}")
        first = found, record.get("scheme")
        if "nll" in record:
            if text is not None:
                raise InputError(f"{path}: a second perplexity of the same model; give one")
            text = record
        for name, each in (record.get("tasks") or {}).items():
            if name in tasks:
                raise InputError(f"{path}: a second result of {name}; give one")
            tasks[name] = TaskResult.from_json(each, path)
        if "nll" not in record and not record.get("tasks"):
            raise InputError(f"{path}: holds neither a perplexity nor tasks: write it by `jquant eval --json`")
    return _Side(text, tasks)


def _facts(config: ValidateConfig, checkpoint: Checkpoint, reference: Checkpoint | None) -> dict[str, Any]:
    made = made_of(checkpoint, config.scheme)
    return {
        "model": {
            "name": checkpoint.name,
            "sha256": checkpoint.sha256(),
            "scheme": made.scheme,
            "method": made.method,
            "inputs": made.activation,
        },
        "reference": {}
        if reference is None
        else {"name": reference.name, "sha256": reference.sha256(), "note": reference.note},
        "jquant": __version__,
        "jax": jax.__version__,
    }


def _batch(config: ValidateConfig) -> int:
    return (1 if on_cpu() else 8) if config.batch is None else config.batch
