"""lm-eval's benchmarks on our models: float or packed, from any checkpoint that `load_model` reads.

    answerer = Answerer(model, tokenizer, max_length=…, generate=…)      what a harness asks; runs without lm-eval
    run_tasks(answerer, BenchmarkOptions(tasks=("arc_easy",)))            lm-eval's tasks, prompts, filters and scores

Contexts and continuations are cut into tokens as lm-eval's Hugging Face backend cuts them: spaces at the end of a
context belong to the continuation, both are encoded as one text, and an empty context is BOS, or EOS without one.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from jquant.core.errors import InputError
from jquant.evaluation.benchmark import TaskResult, items_hash
from jquant.evaluation.benchmark_options import BenchmarkOptions
from jquant.evaluation.chat_template import render_chat
from jquant.evaluation.likelihood import Continuation, Likelihood, likelihoods
from jquant.nn.protocol import CausalLM

MISSING = "benchmarks need the package 'lm-eval': pip install 'jquant[eval]'"
_MAX_TOKENS = 256  # of a generation whose task does not say; lm-eval's default
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GREEDY = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "seed",
}  # without a meaning where nothing is drawn

Stop = Callable[[int, Sequence[int]], bool]  # of a prompt's index and its new tokens so far: has it ended?
Progress = Callable[[str, int, int], None]  # of a stage: what is asked, how many are done, of how many


class Request(Protocol):
    """Of lm_eval.api.instance.Instance what is read here."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class AnswerTokenizer(Protocol):
    """What of a tokenizer is needed here; io/tokenizer.py has one."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def chat_template(self) -> str | None: ...
    def encode(self, text: str, *, add_bos: bool | None = None, add_eos: bool | None = None) -> Any: ...
    def decode(self, ids: Any, *, skip_special: bool = True) -> str: ...


class Generate(Protocol):
    """Greedy new tokens of each prompt, the one that ended it included."""

    def __call__(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Stop) -> list[list[int]]: ...


class Answerer:
    """A model and its tokenizer as a harness asks them."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: AnswerTokenizer,
        *,
        max_length: int,
        generate: Generate,
        pass_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            model: any decoder in three parts.
            tokenizer: of the model.
            max_length: tokens that the model reads at most; longer contexts lose their start.
            generate: as `models.generate_batch.generate_batch` with a model.
            pass_tokens: of a forward pass; see `likelihoods`.
            progress: hears what was done.
        """
        if tokenizer.bos_id is None and not tokenizer.eos_ids:
            raise InputError("the tokenizer has neither BOS nor EOS: nothing can stand before a text's first token")
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.generate, self.pass_tokens, self.progress = generate, pass_tokens, progress
        self.prefix = tokenizer.eos_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Of each (context, continuation) log p(continuation | context) in nats, and whether it is the greedy one."""
        found = self._likelihoods([self._pair(*request.args) for request in requests])
        return [(each.log_probability, each.is_greedy) for each in found]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Of each (text,): its log-probability; long ones in stretches, each token once and with the most context."""
        pieces: list[Continuation] = []
        counts = []
        for request in requests:
            found = list(rolling_pieces(self._encode(request.args[0]), self.prefix, self.max_length))
            pieces += found
            counts.append(len(found))
        values = iter(self._likelihoods(pieces))
        return [float(sum(next(values).log_probability for _ in range(count))) for count in counts]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Of each (context, options) the greedy continuation, cut before the first of the strings in `until`."""
        asked = [_generation(request.args[1]) for request in requests]
        texts: dict[int, str] = {}
        for max_tokens in sorted({length for length, _ in asked}):
            if max_tokens >= self.max_length:
                raise InputError(
                    f"a task asks for {max_tokens} new tokens, the model reads {self.max_length}: no prompt fits"
                )
            chosen = [index for index, (length, _) in enumerate(asked) if length == max_tokens]
            room = self.max_length - max_tokens
            prompts = [self._encode(requests[index].args[0])[-room:] or [self.prefix] for index in chosen]
            ended: set[int] = set()

            def stop(row: int, new: Sequence[int], chosen: list[int] = chosen, ended: set[int] = ended) -> bool:
                over = new[-1] in self.tokenizer.eos_ids
                if not over and (until := asked[chosen[row]][1]):
                    text = self.tokenizer.decode(new)
                    over = any(word in text for word in until)
                if over and self.progress is not None:
                    ended.add(row)
                    self.progress("generations", len(texts) + len(ended), len(requests))
                return over

            for index, new in zip(chosen, self.generate(prompts, max_tokens=max_tokens, stop=stop), strict=True):
                kept = new[:-1] if new and new[-1] in self.tokenizer.eos_ids else new
                texts[index] = _before_any(self.tokenizer.decode(kept), asked[index][1])
        return [texts[index] for index in range(len(requests))]

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the model's own chat template; without `add_generation_prompt` the last one is left open.

        Where a template refuses a system message, that is left out, as lm-eval's own backend does.

        Raises:
            InputError: the model has no chat template, or it refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            raise InputError("the model has no chat template: leave --chat out")
        render = partial(
            render_chat,
            self.tokenizer.chat_template,
            to_answer=add_generation_prompt,
            bos_token=self._special(self.tokenizer.bos_id),
            eos_token=self._special(self.tokenizer.eos_ids[0] if self.tokenizer.eos_ids else None),
        )
        others = [message for message in messages if message["role"] != "system"]
        try:
            return render(messages)
        except ImportError as error:
            raise InputError(MISSING) from error
        except InputError:
            if len(others) == len(messages):
                raise
            return render(others)

    def _special(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.decode([token], skip_special=False)

    def _likelihoods(self, requests: Sequence[Continuation]) -> list[Likelihood]:
        heard = self.progress
        progress = None if heard is None else lambda done: heard("likelihoods", done, len(requests))
        return likelihoods(
            self.model, requests, max_length=self.max_length, pass_tokens=self.pass_tokens, progress=progress
        )

    def _pair(self, context: str, continuation: str) -> Continuation:
        if not context:
            tokens = self._encode(continuation, add_bos=False)
            return Continuation(*((tokens[:1], tokens[1:]) if tokens[:1] == [self.prefix] else ([self.prefix], tokens)))
        stripped = context.rstrip()
        if stripped:
            continuation, context = context[len(stripped) :] + continuation, stripped
        whole, first = self._encode(context + continuation), self._encode(context)
        return Continuation(whole[: len(first)], whole[len(first) :])

    def _encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        ids = [int(token) for token in self.tokenizer.encode(text, add_bos=add_bos, add_eos=False)]
        doubled = add_bos is None and self.tokenizer.add_bos and ids[:2] == 2 * [self.tokenizer.bos_id]
        return ids[1:] if doubled else ids  # a chat template may write BOS itself


def rolling_pieces(tokens: Sequence[int], prefix: int, longest: int) -> Iterator[Continuation]:
    """Each token of a text predicted once: a first stretch from `prefix` on, later ones with all that fits before."""
    tokens = list(tokens)
    if tokens:
        yield Continuation([prefix], tokens[:longest])
    for start in range(longest, len(tokens), longest):
        end = min(start + longest, len(tokens))
        yield Continuation(tokens[end - longest - 1 : start], tokens[start:end])


def run_tasks(answerer: Answerer, options: BenchmarkOptions) -> list[TaskResult]:
    """Runs tasks of lm-eval.

    Raises:
        InputError: lm-eval is missing, a task is unknown, runs code without leave, its data cannot be had, or lm-eval
            fails at scoring the answers.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(MISSING) from error
    tasks, task_path = options.tasks, options.task_path
    if task_path is not None and not any(task_path.rglob("*.yaml")):
        raise InputError(f"{task_path}: holds no task definition (.yaml)")
    with _quiet():
        manager = TaskManager(include_path=None if task_path is None else str(task_path))
    unknown = [task for task in tasks if task not in set(manager.all_tasks)]
    if unknown:
        near = [task for task in manager.all_tasks if unknown[0].split("_")[0] in task][:8]
        raise InputError(
            f"unknown task {unknown[0]!r}"
            + (f"; near are {', '.join(near)}" if near else "; lm-eval ls tasks lists them")
        )
    lm = as_lm(answerer)
    try:
        with _quiet(), _code_allowed(options.allow_code):
            found: Any = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                num_fewshot=options.few_shot,
                limit=options.limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=manager,
                apply_chat_template=options.chat,
                confirm_run_unsafe_code=options.allow_code,
            )
    except InputError:
        raise
    except Exception as error:  # of lm-eval and of what loads data, which raise anything
        if lm.is_answering:
            raise
        raise InputError(_failure(tasks, error, lm.was_asked)) from error
    return [_task_result(task, found) for task in tasks]


def _failure(tasks: Sequence[str], error: Exception, was_asked: bool) -> str:
    """What to say of lm-eval's failure before the model was asked, or after."""
    names, said = ", ".join(tasks), " ".join(str(error).split())
    if was_asked:
        return f"tasks {names}: the model has answered, lm-eval fails at scoring: {type(error).__name__}: {said[:300]}"
    if any(word in said for word in ("marked as unsafe", "HF_ALLOW_CODE_EVAL")):
        return (
            f"tasks {names}: one of them runs what the model writes as a program, on this machine and without a "
            "sandbox: give --allow-code where that is acceptable"
        )
    return (
        f"tasks {names}: cannot be loaded: {said[:300]}; without a network give definitions that read local files, by "
        "--task-path"
    )


def as_lm(answerer: Answerer) -> Any:
    """The answerer as an lm_eval.api.model.LM. Raises InputError where lm-eval is missing."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(MISSING) from error

    class JquantLM(LM):  # pyright: ignore[reportUntypedBaseClass]
        tokenizer_name = "jquant"
        was_asked = is_answering = False

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self._answers(answerer.loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return self._answers(answerer.loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return self._answers(answerer.generate_until, requests)

        def _answers(self, answer: Callable[[list[Any]], Any], requests: list[Any]) -> Any:
            self.was_asked = self.is_answering = True
            answers = answer(requests)
            self.is_answering = False
            return answers

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return answerer.chat(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return answerer.tokenizer.chat_template or ""

    return JquantLM()


def _generation(options: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """How many tokens at most, and the strings that end a generation."""
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    lengths = [options[name] for name in _LENGTH_NAMES if options.get(name) is not None]
    unknown = sorted(set(options) - {"until", *_LENGTH_NAMES, *_GREEDY})
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise InputError("a task asks for sampled text (do_sample): only greedy generation is compared here")
    if unknown:
        raise InputError(
            f"a task asks for generation with {unknown[0]}={options[unknown[0]]!r}, which is not supported"
        )
    return int(lengths[0] if lengths else _MAX_TOKENS), tuple(word for word in until if word)


def _before_any(text: str, words: Sequence[str]) -> str:
    for word in words:
        text = text.split(word)[0]
    return text


def _task_result(task: str, found: Mapping[str, Any]) -> TaskResult:
    """Of a task, or of a group: the items of all tasks below it."""
    leaves = _leaves(task, found.get("group_subtasks", {}))
    samples = [sample for leaf in leaves for sample in found["samples"][leaf]]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    by_filter = {name: [sample for sample in samples if sample["filter"] == name] for name in filters}
    items: dict[str, tuple[float, ...]] = {}
    for name, rows in by_filter.items():
        for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
            if all(isinstance(row.get(metric), bool | int | float) for row in rows):
                items[_metric_name(metric, name)] = tuple(float(row[metric]) for row in rows)
    scores, stderr = {}, {}
    for key, value in found["results"][task].items():
        metric, _, name = key.partition(",")
        if name and isinstance(value, int | float):
            if metric.endswith("_stderr"):
                stderr[_metric_name(metric.removesuffix("_stderr"), name)] = float(value)
            else:
                scores[_metric_name(metric, name)] = float(value)
    first = by_filter[filters[0]] if filters else []
    counts = found.get("n-shot", {})
    return TaskResult(
        task=task,
        version=str(found.get("versions", {}).get(task, "")),
        few_shot=int(counts.get(task, counts.get(leaves[0], 0)) or 0),
        scores=scores or {name: sum(values) / len(values) for name, values in items.items()},
        stderr={name: _stderr(values) for name, values in items.items()} | stderr,
        items=items,
        answers=tuple(_answer(sample) for sample in first),
        items_sha256=items_hash([sample["arguments"] for sample in first]),
    )


def _stderr(values: Sequence[float]) -> float:
    """Of the mean of independent items; NaN for one, which says nothing about spread."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def _leaves(task: str, below: Mapping[str, Sequence[str]]) -> list[str]:
    return [leaf for child in below[task] for leaf in _leaves(child, below)] if below.get(task) else [task]


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _answer(sample: Mapping[str, Any]) -> Any:
    """The index of the likeliest choice, or what was generated, before filters take an answer out of it."""
    responses = sample["filtered_resps"]
    if responses and isinstance(responses[0], tuple | list) and len(responses[0]) == 2:
        logs = [float(response[0]) for response in responses]
        return max(range(len(logs)), key=logs.__getitem__)
    generated = [text for texts in sample["resps"] for text in texts]
    return generated[0] if len(generated) == 1 else generated


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Hugging Face's scorer of programs reads its leave from the environment: given here, and taken back after."""
    name = "HF_ALLOW_CODE_EVAL"
    before = os.environ.get(name)
    if allowed:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ[name]
        elif allowed and before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' log of every step, bars and look for a git repository; errors still come."""
    from unittest import mock

    from datasets.utils import (  # pyright: ignore[reportMissingImports]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with contextlib.ExitStack() as replaced:
            for place, name, instead in (
                ("lm_eval.api.task", "tqdm", lambda items, **_: items),
                ("lm_eval.evaluator", "get_git_commit_hash", lambda: None),
                ("lm_eval.evaluator", "add_env_info", lambda results: None),
            ):
                module = importlib.import_module(place)
                if hasattr(module, name):
                    replaced.enter_context(mock.patch.object(module, name, instead))
            yield
    finally:
        if had_bars:
            enable_progress_bars()
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
