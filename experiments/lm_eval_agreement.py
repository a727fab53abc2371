"""Benchmarks without a network, and whether our answers are those of lm-eval's own Hugging Face backend.

    python experiments/lm_eval_agreement.py write runs/tasks --arc-easy arc.jsonl --hellaswag hellaswag.jsonl \\
        --mmlu-astronomy mmlu_test.jsonl --mmlu-dev mmlu_dev.jsonl --ifeval ifeval.jsonl --humaneval humaneval.jsonl
    jquant eval demo --tasks arc_easy,hellaswag --task-path runs/tasks --limit 100 --json runs/ours.json
    jquant convert demo runs/smollm2-hf --format hf
    HF_HUB_OFFLINE=1 lm_eval run --model hf --model_args pretrained=runs/smollm2-hf,dtype=float32 \\
        --tasks arc_easy,hellaswag --include_path runs/tasks --limit 100 --log_samples --output_path runs/theirs
    python experiments/lm_eval_agreement.py compare runs/ours.json runs/theirs

`write` takes rows of local files and makes tasks of them: lm-eval's own definitions, which these include, with the rows
in the place of the Hub's. HumanEval's asks the Hub for its scorer, so here it has one of its own, which runs a solution
in another process and no sandbox; it takes --allow-code, or --confirm_run_unsafe_code of lm_eval. `compare` counts the
items that both sides answer alike; of two texts, one cut at fewer tokens may be the other's beginning. Both read one
tokenizer: transformers' own conversion of this GGUF leaves out that digits are split, so the folder that `convert`
writes is what the Hugging Face side opens.

Measured:  SmolLM2-135M-Instruct in float32, first 100 rows of each; lm-eval 0.4.13, transformers 5.17, torch 2.13, one
           CPU core. 2026-11-25. Ours took 144 s

    arc_easy       acc                ours 0.4600  hf 0.4600  same on 100 of 100
    arc_easy       acc_norm           ours 0.4000  hf 0.4000  same on 100 of 100
    arc_easy       answers            same on 100 of 100
    hellaswag      acc                ours 0.3200  hf 0.3200  same on 100 of 100
    hellaswag      acc_norm           ours 0.3500  hf 0.3500  same on 100 of 100
    hellaswag      answers            same on 100 of 100

           Prompts and answers are the same, with and without the chat template, of 12 rows of MMLU's astronomy with
           three solved examples (24 of 24 choices), and of two rows of IFEval, up to 160 tokens, of HumanEval, and of
           humaneval_instruct in the template alone (10 of 10 texts). 2026-11-26
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

YAML = """dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {rows}}}
training_split: null
validation_split: {validation}
test_split: {test}
"""


def arc_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as allenai/ai2_arc has it; from there, or from llm-foundry's {query, choices, gold}."""
    if "answerKey" in row:
        return {name: row[name] for name in ("question", "choices", "answerKey")}
    labels = "ABCDE"[: len(row["choices"])]
    question = row["query"].removeprefix("Question: ")
    return {
        "question": question,
        "choices": {"text": row["choices"], "label": list(labels)},
        "answerKey": labels[row["gold"]],
    }


def hellaswag_row(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of Rowan/hellaswag that its definition reads."""
    return {name: row[name] for name in ("activity_label", "ctx_a", "ctx_b", "endings", "label")}


def mmlu_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of cais/mmlu, of one subject."""
    return {name: row[name] for name in ("question", "choices", "answer")} if row["subject"] == "astronomy" else None


def as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    """A row that has the fields already."""
    return row


class Local(NamedTuple):
    """A task of lm-eval on rows of a file."""

    definition: str  # below lm-eval's tasks
    split: str  # that the definition asks
    convert: Callable[[dict[str, Any]], dict[str, Any] | None]


TASKS = {
    "arc_easy": Local("arc/arc_easy.yaml", "test", arc_row),
    "hellaswag": Local("hellaswag/hellaswag.yaml", "validation", hellaswag_row),
    "mmlu_astronomy": Local("mmlu/default/mmlu_astronomy.yaml", "test", mmlu_row),
    "ifeval": Local("ifeval/ifeval.yaml", "train", as_it_is),
    "humaneval": Local("", "test", as_it_is),
}
HUMANEVAL = r"""task: humaneval
unsafe_code: true
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}\ncheck({{entry_point}})"
metric_list: [{metric: !function humaneval_scorer.pass_at_1, aggregation: mean, higher_is_better: true}]
generation_kwargs: {until: ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], max_gen_toks: 1024, do_sample: false}
num_fewshot: 0
filter_list: [{name: create_test, filter: [{function: custom, filter_fn: !function humaneval_scorer.programs}]}]
metadata: {version: 1.0}
"""
SCORER = """import subprocess
import sys


def programs(resps, docs):
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs)]


def pass_at_1(references, predictions):
    command = [sys.executable, "-c", predictions[0][0] + "\\n" + references[0]]
    try:
        code = subprocess.run(command, timeout=20, capture_output=True).returncode
    except subprocess.TimeoutExpired:
        code = 1
    return {"pass@1": float(code == 0)}
"""


def write_task(name: str, rows: Path, folder: Path, dev: Path | None = None) -> None:
    """One task's rows and definition; `dev` are rows of solved examples, where the task takes them from their own."""
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]

    task = TASKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, source in ((task.split, rows), ("dev", dev)):
        if source is not None:
            file = folder / f"{name}_{split}.jsonl"
            lines = [json.dumps(row) + "\n" for row in map(task.convert, _rows(source)) if row is not None]
            file.write_text("".join(lines))
            files[split] = str(file.resolve())
    start = f"include: {Path(lm_eval.tasks.__file__).parent / task.definition}\n" if task.definition else HUMANEVAL
    if not task.definition:
        (folder / "humaneval_scorer.py").write_text(SCORER)
    is_validation = task.split == "validation"
    text = YAML.format(
        rows=json.dumps(files),
        validation="validation" if is_validation else "null",
        test="null" if is_validation else task.split,
    )
    (folder / f"{name}.yaml").write_text(start + text)


def compare(ours: Path, theirs: Path) -> None:
    """Prints, for each task and metric, both scores and on how many items they agree."""
    record = json.loads(ours.read_text())
    for name, task in record["tasks"].items():
        samples = list(_samples(theirs, name))
        for metric, scores in task["items"].items():
            of, _, filtered = metric.partition(",")
            rows = {row["doc_id"]: row for row in samples if row["filter"] == (filtered or "none")}
            pairs = [(score, float(rows[index][of])) for index, score in enumerate(scores)]
            same = sum(a == b for a, b in pairs)
            mine, other = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            print(f"{name:14} {metric:18} ours {mine:.4f}  hf {other:.4f}  same on {same} of {len(pairs)}")
        answers = {row["doc_id"]: _answer(row) for row in samples}
        pairs = list(zip(task["answers"], (answers[index] for index in sorted(answers)), strict=True))
        print(f"{name:14} answers            same on {sum(_same(a, b) for a, b in pairs)} of {len(pairs)}")


def _answer(sample: dict[str, Any]) -> int | str:
    """The alternative that the model finds most likely, or the text that it wrote."""
    first = sample["resps"][0][0]
    if isinstance(first, str):
        return first
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    return max(range(len(likelihoods)), key=likelihoods.__getitem__)


def _same(ours: int | str, theirs: int | str) -> bool:
    if isinstance(ours, str) and isinstance(theirs, str) and ours and theirs:
        return ours.startswith(theirs) or theirs.startswith(ours)
    return ours == theirs


def _samples(folder: Path, task: str) -> Iterator[dict[str, Any]]:
    file = max(folder.rglob(f"samples_{task}_*.jsonl"))
    yield from map(json.loads, file.read_text().strip().split("\n"))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    yield from map(json.loads, filter(None, text.split("\n")))  # a text may hold other line ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("folder", type=Path)
    for name in TASKS:
        writing.add_argument(f"--{name.replace('_', '-')}", type=Path)
    writing.add_argument("--mmlu-dev", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("ours", type=Path)
    comparing.add_argument("theirs", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        compare(options.ours, options.theirs)
        return
    for name in TASKS:
        if (rows := getattr(options, name)) is not None:
            write_task(name, rows, options.folder, options.mmlu_dev if name.startswith("mmlu") else None)


if __name__ == "__main__":
    main()
