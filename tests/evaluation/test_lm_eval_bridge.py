"""What a harness asks, by definition: sums of log-softmax over one whole sequence, and greedy text.

lm-eval is no part of the lock, so the answerer is driven by requests of its shape; the last test runs a task of two
rows through it, in an environment that has it (scripts/test slow). experiments/lm_eval_agreement.py holds the
comparison with its own backend.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.benchmark_run import answerer, benchmark
from jquant.cli import main
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.evaluation import likelihood
from jquant.evaluation.benchmark import TaskResult
from jquant.evaluation.benchmark_options import BenchmarkOptions
from jquant.evaluation.likelihood import Continuation, bucket_lengths, likelihoods
from jquant.evaluation.lm_eval_bridge import Answerer, _failure, rolling_pieces
from jquant.models.decoder import Decoder
from jquant.models.generate import generate
from jquant.models.generate_batch import generate_batch
from jquant.nn import protocol
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import byte_tokenizer, tiny_model, write


def _requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def _log_p(model: Decoder, ids: Sequence[int]) -> np.ndarray:
    """[i, v]: log p(v | ids[: i + 1]), of one sequence in the whole model; one length, so that it compiles once."""
    padded = np.pad(np.asarray(ids, np.int32), (0, 128 - len(ids)))
    logits = np.asarray(protocol.apply(model, jnp.asarray(padded)[None]), np.float64)[0, : len(ids)]
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def _likelihood(model: Decoder, context: Sequence[int], tokens: Sequence[int]) -> float:
    rows = _log_p(model, [*context, *tokens][:-1])[len(context) - 1 :]
    return float(sum(row[token] for row, token in zip(rows, tokens, strict=True)))


@pytest.fixture(scope="module", params=["float", "packed"])
def model(request: pytest.FixtureRequest) -> Decoder:
    made = tiny_model()
    if request.param == "packed":
        quantize_layers(made, scheme("int4:g32"))
    return made


def test_likelihoods_by_definition(model: Decoder) -> None:
    generator = np.random.default_rng(0)
    lengths = [(1, 1), (3, 7), (40, 2), (31, 1), (90, 9), (60, 30)]
    asked = [Continuation(*(generator.integers(0, 257, n).tolist() for n in pair)) for pair in lengths]
    found = likelihoods(model, asked, max_length=512, pass_tokens=128)
    for request, answer in zip(asked, found, strict=True):
        assert answer.log_probability == pytest.approx(_likelihood(model, request.context, request.tokens), rel=2e-5)
    greedy = int(_log_p(model, asked[2].context)[-1].argmax())
    right, wrong = (Continuation(asked[2].context, [token]) for token in (greedy, (greedy + 1) % 257))
    assert [each.is_greedy for each in likelihoods(model, [right, wrong], max_length=512)] == [True, False]


def test_what_is_too_long_loses_its_start() -> None:
    model, ids = tiny_model(), np.random.default_rng(1).integers(0, 257, 80).tolist()
    (found,) = likelihoods(model, [Continuation(ids[:70], ids[70:])], max_length=48)
    assert found.log_probability == pytest.approx(_likelihood(model, ids[31:70], ids[70:]), rel=2e-5)
    assert likelihoods(model, [Continuation(ids, [])], max_length=48)[0] == (0.0, True)
    with pytest.raises(InputError, match="80 tokens exceeds the model's context of 48"):
        likelihoods(model, [Continuation([1], ids)], max_length=48)
    with pytest.raises(InputError, match="request 0: its context is empty"):
        likelihoods(model, [Continuation([], [1])], max_length=48)


def test_programs_are_bounded_by_buckets_not_by_requests() -> None:
    model = tiny_model(3)
    ask = partial(likelihoods, model, max_length=200, pass_tokens=256)
    lengths = np.random.default_rng(2).integers(1, 190, 60)
    requests = [Continuation([1] * int(length), [2, 3]) for length in lengths]
    counters = (protocol._apply, likelihood._score_rows, likelihood._rows)

    def sizes() -> list[int]:
        return [counter._cache_size() for counter in counters]  # type: ignore[attr-defined]

    before = sizes()
    ask(requests)
    after = sizes()
    buckets = len(bucket_lengths(200))
    assert buckets == 7
    assert after[0] - before[0] <= 2 * buckets  # embedding and block
    assert after[1] - before[1] <= 1
    ask([Continuation([5] * int(length), [7] * 9) for length in np.random.default_rng(3).integers(1, 190, 70)])
    assert sizes()[:2] == after[:2]


def test_buckets() -> None:
    assert bucket_lengths(8192)[:6] == (32, 48, 64, 96, 128, 192)
    assert bucket_lengths(8192)[-1] == 8192
    assert bucket_lengths(20) == (20,)
    assert all(b <= 1.5 * a for a, b in zip(bucket_lengths(5000), bucket_lengths(5000)[1:], strict=False))


def test_loglikelihood_splits_texts_as_a_harness_expects(model: Decoder) -> None:
    ask = answerer(model, byte_tokenizer())
    texts = [("The sky is", " blue"), ("The sky is ", "blue"), ("", "blue")]
    found = ask.loglikelihood(_requests(*texts))
    assert found[0] == pytest.approx(found[1])  # the space belongs to the continuation either way
    encode = byte_tokenizer().encode
    whole = encode("The sky is blue").tolist()
    assert found[0][0] == pytest.approx(_likelihood(model, whole[:10], whole[10:]), rel=2e-5)
    assert found[2][0] == pytest.approx(_likelihood(model, [256], encode("blue").tolist()), rel=2e-5)  # EOS: no BOS


def test_rolling_counts_each_token_once() -> None:
    model, text = tiny_model(), "Every token of this text is predicted exactly once, whatever the window."
    ids = byte_tokenizer().encode(text).tolist()
    (whole,) = answerer(model, byte_tokenizer()).loglikelihood_rolling(_requests((text,)))
    assert whole == pytest.approx(_likelihood(model, [256], ids), rel=2e-5)
    pieces = list(rolling_pieces(ids, 256, 20))
    assert [token for piece in pieces for token in piece.tokens] == ids
    assert all(len(piece.context) + len(piece.tokens) - 1 == 20 for piece in pieces)
    (short, empty) = answerer(model, byte_tokenizer(), max_length=20).loglikelihood_rolling(_requests((text,), ("",)))
    parts = sum(_likelihood(model, piece.context, piece.tokens) for piece in pieces)
    assert (short, empty) == (pytest.approx(parts, rel=2e-5), 0.0)


def test_generation_is_greedy_and_ends_where_it_is_told(model: Decoder) -> None:
    tokenizer = byte_tokenizer()
    ask = answerer(model, tokenizer)
    prompt = "Once upon a time"
    alone = list(generate(model, tokenizer.encode(prompt), max_tokens=24, stop_ids=tokenizer.eos_ids))
    text = tokenizer.decode(alone)
    plain, cut, other = ask.generate_until(
        _requests(
            (prompt, {"until": [], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}),
            (prompt, {"until": [text[5:7]], "max_gen_toks": 24}),
            ("Another, and a longer one: " * 4, {"until": "\n", "max_gen_toks": 8}),
        )
    )
    assert plain == text
    assert cut == text.split(text[5:7])[0]
    assert "\n" not in other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "asks for sampled text"),
        ({"max_gen_toks": 512}, "512 new tokens, the model reads 512"),
        ({"penalty": 2}, "penalty=2"),
    ],
)
def test_generation_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        answerer(tiny_model(), byte_tokenizer()).generate_until(_requests(("Hello", options)))


def test_a_chat_template_is_rendered_and_its_absence_said() -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match="no chat template"):
        answerer(tiny_model(), tokenizer).chat(messages)


def test_bos_is_not_doubled_where_the_text_has_it() -> None:
    class WithBos:
        bos_id, eos_ids, add_bos, chat_template = 1, (2,), True, None

        def encode(self, text: str, *, add_bos: bool | None = None, add_eos: bool | None = None) -> list[int]:
            first = [] if add_bos is False else [1]
            return first + [1 if letter == "^" else ord(letter) for letter in text]

        def decode(self, ids: Any, *, skip_special: bool = True) -> str:
            return "".join(map(chr, ids))

    ask = Answerer(tiny_model(), WithBos(), max_length=64, generate=partial(generate_batch, tiny_model()))
    assert ask._pair("^ab", "c") == ask._pair("ab", "c") == Continuation([1, 97, 98], [99])
    assert ask._pair("", "c") == Continuation([1], [99])


def test_results_survive_json_and_damage_is_said() -> None:
    result = TaskResult(
        task="t",
        version="1",
        few_shot=0,
        scores={"acc": 0.5, "acc_norm": 1.0},
        stderr={"acc": float("nan")},
        items={"acc": (0.0, 1.0), "acc_norm": (1.0, 1.0)},
        answers=(2, 0),
        items_sha256="0",
    )
    assert result.primary == "acc_norm"
    record = {**result.as_json(), "stderr": {"acc": None}}
    back = TaskResult.from_json(json.loads(json.dumps(record)), "x.json")
    assert (back.items, back.answers, np.isnan(back.stderr["acc"])) == (result.items, result.answers, True)
    with pytest.raises(InputError, match=r"x\.json: t: 3 scores of acc for 2 answers"):
        TaskResult.from_json({**record, "items": {"acc": [0, 1, 1]}}, "x.json")
    with pytest.raises(InputError, match="no 'version'"):
        TaskResult.from_json({"task": "t"}, "x.json")


def test_without_lm_eval_the_command_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert main(["eval", str(write(tmp_path / "tiny")), "--tasks", "arc_easy"]) == 2
    assert "pip install 'jquant[eval]'" in capsys.readouterr().err
    with pytest.raises(InputError, match="limit is for benchmarks"):
        BenchmarkOptions(limit=3)


def test_failures_say_what_to_do() -> None:
    loading = _failure(("hellaswag",), OSError("no route"), was_asked=False)
    assert "cannot be loaded: no route" in loading
    assert "--task-path" in loading
    for said in ("Attempted to run task: t which is marked as unsafe.", 'Set the "HF_ALLOW_CODE_EVAL" variable'):
        refused = _failure(("humaneval",), ValueError(said), was_asked=False)
        assert "--allow-code" in refused
        assert "--task-path" not in refused
    assert "fails at scoring: LookupError: punkt" in _failure(("ifeval",), LookupError("punkt"), was_asked=True)


@pytest.mark.slow
@pytest.mark.lm_eval
@pytest.mark.filterwarnings("default")
def test_a_task_through_lm_eval(tmp_path: Path) -> None:
    """A task of local rows; which choice is the likeliest is computed here too."""
    rows = [
        {"question": "The sky is", "choices": [" blue", " made of cheese"], "gold": 0},
        {"question": "Two and two are", "choices": [" four", " five"], "gold": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{tmp_path / 'rows.jsonl'}'}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    model = tiny_model()
    (found,) = benchmark(model, byte_tokenizer(), BenchmarkOptions(tasks=("tiny_choice",), task_path=tmp_path))

    def encode(text: str) -> list[int]:
        return byte_tokenizer().encode(text).tolist()

    expected = [
        int(np.argmax([_likelihood(model, encode(row["question"]), encode(choice)) for choice in row["choices"]]))
        for row in rows
    ]
    assert list(found.answers) == expected
    assert found.items["acc"] == tuple(float(answer == 0) for answer in expected)
    assert found.scores["acc"] == pytest.approx(np.mean(found.items["acc"]))
    with pytest.raises(InputError, match="unknown task 'tiny_chess'"):
        benchmark(model, byte_tokenizer(), BenchmarkOptions(tasks=("tiny_chess",), task_path=tmp_path))


@pytest.mark.slow
@pytest.mark.lm_eval
@pytest.mark.filterwarnings("default")
def test_a_task_that_runs_code_needs_leave(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its scorer is called with leave alone, and what it raises is told; nothing else reaches the terminal."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "def one():"}) + "\n")
    (tmp_path / "scorer.py").write_text(
        "import os\n\ndef score(references, predictions):\n    return float(os.environ['HF_ALLOW_CODE_EVAL'])\n\n"
        "def broken(references, predictions):\n    raise LookupError('no interpreter')\n"
    )
    for name, scorer in (("tiny_code", "score"), ("tiny_broken", "broken")):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\nunsafe_code: true\n"
            f"dataset_kwargs: {{data_files: {{test: '{tmp_path / 'rows.jsonl'}'}}}}\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: ''\n"
            "generation_kwargs: {until: ['\\n'], max_gen_toks: 8, do_sample: false}\n"
            f"metric_list: [{{metric: !function scorer.{scorer}, aggregation: mean, higher_is_better: true}}]\n"
        )
    run = partial(benchmark, tiny_model(), byte_tokenizer())

    def options(task: str, *, allow_code: bool) -> BenchmarkOptions:
        return BenchmarkOptions(tasks=(task,), task_path=tmp_path, allow_code=allow_code)

    with pytest.raises(InputError, match=r"tasks tiny_code: .* give --allow-code"):
        run(options("tiny_code", allow_code=False))
    (found,) = run(options("tiny_code", allow_code=True))
    assert list(found.scores.values()) == [1.0]
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    with pytest.raises(InputError, match=r"tiny_broken: the model has answered, .* LookupError: no interpreter"):
        run(options("tiny_broken", allow_code=True))
    told = "".join(capfd.readouterr())
    assert [noise for noise in ("fatal:", "it/s", "examples/s") if noise in told] == []
