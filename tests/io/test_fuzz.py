"""Damaged files by the hundred (slow: by the ten thousand): every one ends in a result or a typed error.

fuzz.py says what is tried and when a case fails, and how to repeat one. It runs in processes of its own, since what
this looks for may end a process, never return, or take all memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READERS = (  # seeds, and their share of the cases
    ("llama_b.gguf", 4),
    ("blocks.gguf", 4),
    ("bpe.gguf", 4),
    ("llama.gguf", 2),
    ("gemma.gguf", 2),
    ("plain.gguf", 2),
    ("llama_b.safetensors", 3),
    ("family_gpt2.safetensors", 2),
    ("dtypes.safetensors", 4),
    ("tokenizer.json", 3),
)
FOLDERS = ("llama_a", "llama_b", *(f"family_{name}" for name in ("mixtral", "gpt2", "gemma3_text", "opt", "phi3")))
FAMILIES = ("llama", "qwen2", "qwen3moe", "gemma2", "gemma3", "phi3", "gpt2")  # as GGUF calls them
PACKED = (  # exports
    *("packed compressed-tensors int4:g32:asym", "packed compressed-tensors fp8_e4m3:channel"),
    *("packed compressed-tensors nvfp4", "packed gptq int4:g32:fp16", "packed awq int4:g32:asym:fp16"),
    "packed bitsandbytes nf4:g32:dq",
)
CHECKPOINTS = tuple(f"checkpoint {name}" for name in (*FOLDERS, "llama_b.gguf", *FAMILIES))


def run(batch: Iterable[str]) -> list[list]:
    """Runs SEED:FIRST:COUNT …; the records of the cases: [seed, number, mutator, outcome, bytes, seconds]."""
    # Of a program that another worker is writing at that moment jax warns, and compiles it.
    strict = ["-W", "error", "-W", "default:Error reading persistent compilation cache"]
    command = [sys.executable, *strict, "-m", "tests.io.fuzz", *batch]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        output, errors = process.communicate(timeout=240)
        ended = f"status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        ended = "no end in 240 s"
    lines = output.splitlines()
    records = [json.loads(line) for line in lines if line.startswith('["')]
    if process.returncode != 0:
        failed = [index for index, line in enumerate(lines) if line.startswith("FAILED")]
        shown = lines[failed[0] : failed[0] + 40] if failed else errors.splitlines()[-40:]
        pytest.fail(
            f"{ended}, last {lines[-1:]}, {len(failed)} cases failed; to repeat one: python -W error -m tests.io.fuzz "
            + "SEED:NUMBER:1\n"
            + "\n".join([*(lines[index] for index in failed), "", *shown])
        )
    return records


def halves(cases: dict[str, int]) -> list[list]:
    """The cases of each seed, half of them in each of two processes."""
    parts = [[f"{name}:{part * (count // 2)}:{count // 2}" for name, count in cases.items()] for part in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return [record for records in pool.map(run, parts) for record in records]


def table(records: list[list]) -> str:
    """How many cases of each seed, and of each mutator, came to which end; the slowest."""
    lines = [f"{len(records)} cases, the slowest {max(record[-1] for record in records)} s"]
    for title, column in (("seed", 0), ("mutator", 2)):
        names = sorted({record[column] for record in records})
        for name in names:
            ends = Counter(record[3] for record in records if record[column] == name)
            lines.append(
                f"  {title} {name}: {ends.total()} cases, " + ", ".join(f"{v} {k}" for k, v in sorted(ends.items()))
            )
    return "\n".join(lines)


def both_ends(records: list[list]) -> None:
    """A seed whose cases all fail, or none, tests little; headers of families alone are no model."""
    for name in {record[0] for record in records} - {f"checkpoint {family}" for family in FAMILIES}:
        outcomes = {record[3] for record in records if record[0] == name}
        assert len(outcomes) > 1, f"{name}: all {outcomes}"


def test_damaged_files_give_a_result_or_a_typed_error():
    records = run(f"{name}:0:{10 * share}" for name, share in READERS)
    assert len(records) == 300
    both_ends(records)


def test_damaged_checkpoints_give_a_model_or_a_typed_error():
    records = run(f"{name}:0:7" for name in CHECKPOINTS)
    assert len(records) == 105


def test_damaged_exports_give_a_model_or_a_typed_error():
    records = run(f"{name}:0:12" for name in PACKED)
    assert len(records) == 72
    assert {record[3] for record in records} == {"model", "error"}


@pytest.mark.slow
def test_twenty_thousand_damaged_files(capsys):
    cases = {name: 620 * share for name, share in READERS} | dict.fromkeys(CHECKPOINTS, 100) | {"demo.gguf": 100}
    cases |= dict.fromkeys(PACKED, 100)
    records = halves(cases)
    assert len(records) == sum(cases.values()) >= 20_000
    both_ends(records)
    with capsys.disabled():
        print(f"\n{table(records)}")
