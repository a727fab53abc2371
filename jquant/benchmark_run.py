"""Benchmarks of lm-eval on a checkpoint's model. Stands above the rooms: it joins models and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from jquant.core.errors import InputError
from jquant.evaluation.benchmark import TaskResult
from jquant.evaluation.benchmark_options import BenchmarkOptions
from jquant.evaluation.lm_eval_bridge import Answerer, Progress, run_tasks
from jquant.io.tokenizer import Tokenizer
from jquant.models.decoder import Decoder
from jquant.models.generate_batch import generate_batch


def answerer(
    model: Decoder, tokenizer: Tokenizer, *, max_length: int | None = None, progress: Progress | None = None
) -> Answerer:
    """A model as a benchmark asks it. Raises InputError where `max_length` exceeds the model's context."""
    longest = model.config.max_length if max_length is None else max_length
    if not 2 <= longest <= model.config.max_length:
        raise InputError(f"max-length {longest}: it must be 2 to {model.config.max_length}, the model's context")
    return Answerer(model, tokenizer, max_length=longest, generate=partial(generate_batch, model), progress=progress)


def benchmark(
    model: Decoder, tokenizer: Tokenizer, options: BenchmarkOptions, *, progress: Progress | None = None
) -> list[TaskResult]:
    """Runs tasks of lm-eval on a model; errors as `answerer` and `run_tasks`."""
    return run_tasks(answerer(model, tokenizer, max_length=options.max_length, progress=progress), options)


def tasks_record(results: Sequence[TaskResult]) -> dict[str, Any]:
    """As result files hold them, by task."""
    return {result.task: result.as_json() for result in results}
