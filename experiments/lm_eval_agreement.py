"""Benchmarks without a network, and whether our answers are those of lm-eval's own Hugging Face backend.

    python experiments/lm_eval_agreement.py write runs/tasks --arc-easy arc.jsonl --hellaswag hellaswag.jsonl
    jquant eval demo --tasks arc_easy,hellaswag --task-path runs/tasks --limit 100 --json runs/ours.json
    jquant convert demo runs/smollm2-hf --format hf
    HF_HUB_OFFLINE=1 lm_eval run --model hf --model_args pretrained=runs/smollm2-hf,dtype=float32 \\
        --tasks arc_easy,hellaswag --include_path runs/tasks --limit 100 --log_samples --output_path runs/theirs
    python experiments/lm_eval_agreement.py compare runs/ours.json runs/theirs

`write` takes rows of local files and makes tasks of them: lm-eval's own definitions of arc_easy and hellaswag, which
these include, with the rows in the place of the Hub's. `compare` counts the items that both sides answer alike. Both
read one tokenizer: transformers' own conversion of this GGUF leaves out that digits are split, so the folder that
`convert` writes is what the Hugging Face side opens.

Measured:  SmolLM2-135M-Instruct in float32, first 100 rows of each; lm-eval 0.4.13, transformers 5.17, torch 2.13, one
           CPU core. 2026-11-25. Ours took 144 s

    arc_easy   acc       ours 0.4600  hf 0.4600  same on 100 of 100
    arc_easy   acc_norm  ours 0.4000  hf 0.4000  same on 100 of 100
    arc_easy   choice    same on 100 of 100
    hellaswag  acc       ours 0.3200  hf 0.3200  same on 100 of 100
    hellaswag  acc_norm  ours 0.3500  hf 0.3500  same on 100 of 100
    hellaswag  choice    same on 100 of 100
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

YAML = """include: {definition}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {rows}}}}}
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


TASKS: dict[str, tuple[str, str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "arc_easy": ("arc/arc_easy.yaml", "test", arc_row),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", hellaswag_row),
}


def write_task(name: str, rows: Path, folder: Path) -> None:
    """One task's rows and definition."""
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]

    definition, split, convert = TASKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(convert(row)) + "\n" for row in _rows(rows)))
    text = YAML.format(
        definition=Path(lm_eval.tasks.__file__).parent / definition,
        split=split,
        rows=json.dumps(str(file.resolve())),
        validation="validation" if split == "validation" else "null",
        test="test" if split == "test" else "null",
    )
    (folder / f"{name}.yaml").write_text(text)


def compare(ours: Path, theirs: Path) -> None:
    """Prints, for each task and metric, both scores and on how many items they agree."""
    record = json.loads(ours.read_text())
    for name, task in record["tasks"].items():
        samples = {row["doc_id"]: row for row in _samples(theirs, name)}
        for metric, scores in task["items"].items():
            pairs = [(score, float(samples[index][metric])) for index, score in enumerate(scores)]
            same = sum(a == b for a, b in pairs)
            mine, other = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
            print(f"{name:10} {metric:9} ours {mine:.4f}  hf {other:.4f}  same on {same} of {len(pairs)}")
        choices = list(zip(task["answers"], (_choice(samples[i]) for i in sorted(samples)), strict=True))
        print(f"{name:10} choice    same on {sum(a == b for a, b in choices)} of {len(choices)}")


def _choice(sample: dict[str, Any]) -> int:
    """The alternative that the model finds most likely."""
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    return max(range(len(likelihoods)), key=likelihoods.__getitem__)


def _samples(folder: Path, task: str) -> Iterator[dict[str, Any]]:
    file = max(folder.rglob(f"samples_{task}_*.jsonl"))
    yield from map(json.loads, file.read_text().splitlines())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    yield from map(json.loads, filter(None, text.splitlines()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("folder", type=Path)
    for name in TASKS:
        writing.add_argument(f"--{name.replace('_', '-')}", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("ours", type=Path)
    comparing.add_argument("theirs", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        compare(options.ours, options.theirs)
        return
    for name in TASKS:
        if (rows := getattr(options, name)) is not None:
            write_task(name, rows, options.folder)


if __name__ == "__main__":
    main()
