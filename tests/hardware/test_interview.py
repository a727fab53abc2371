"""The questions of `jquant advise`: defaults, answers that are wrong and asked again, and a terminal that is none."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jquant.cli import main
from jquant.core.errors import InputError
from jquant.hardware.interview import LOCAL, ask_constraints, ask_measurement


class Script:
    """Answers that are written down; the default where they are None."""

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.questions: list[str] = []
        self.complaints: list[str] = []

    def ask(self, question: str, default: str) -> str:
        self.questions.append(question)
        answer = self.answers.pop(0) if self.answers else None
        return default if answer is None else answer

    def say(self, line: str) -> None:
        self.complaints.append(line)


def check(model: str) -> None:
    if model == "nothing":
        raise InputError("model 'nothing' is not known")


def test_defaults_throughout() -> None:
    script = Script()
    config = ask_constraints(script.ask, script.say, check, device="h100-sxm")
    assert (config.model, config.device, config.devices) == ("llama-3-8b", "h100-sxm", 1)
    assert (config.first, config.max_loss, config.results) == ("latency", 5.0, None)
    assert len(script.questions) == 9
    assert not script.complaints


def test_wrong_answers_are_told_and_asked_again(tmp_path: Path) -> None:
    script = Script(
        "nothing", "qwen3-8b", "h1000", "H200", "none", "0", "2", "1.5", "100", None, "4", "x", "t",
        "nan", "-1", "2.5 %", str(tmp_path / "missing"), str(tmp_path),
    )  # fmt: skip
    config = ask_constraints(script.ask, script.say, check, device=LOCAL)
    assert (config.model, config.device, config.devices) == ("qwen3-8b", "h200", 2)
    assert (config.prompt, config.output, config.batch) == (100, 256, 4)
    assert (config.first, config.max_loss, config.results) == ("throughput", 2.5, tmp_path)
    expected = [
        "not known",
        "known are",
        "'none'",
        "'0'",
        "'1.5'",
        "latency or throughput",
        "NaN",
        "'-1'",
        "no such folder",
    ]
    assert len(script.complaints) == len(expected)
    for said, words in zip(script.complaints, expected, strict=True):
        assert words in said


def test_the_memory_of_a_cpu_is_asked_for() -> None:
    script = Script(None, "xeon-8480", "0", "512")
    config = ask_constraints(script.ask, script.say, check, device=LOCAL)
    assert (config.device, config.memory) == ("xeon-8480", 512)
    assert len(script.complaints) == 1


def test_the_local_device_may_be_the_answer() -> None:
    script = Script(None, LOCAL)
    assert ask_constraints(script.ask, script.say, check, device="h100-sxm").device is None


def test_what_was_measured() -> None:
    script = Script("int5:z9", "int3:g64", "many", "41.3")
    found = ask_measurement(script.ask, script.say, default="int4:g64")
    assert (found.scheme, found.loss_percent) == ("int3:g64", 41.3)
    assert len(script.complaints) == 2
    script = Script()
    assert ask_measurement(script.ask, script.say, default="int4:g64").loss_percent is None


def test_no_terminal_no_questions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("llama-3-8b\n"))
    assert main(["advise"]) == 2
    said = capsys.readouterr()
    assert "standard input is no terminal" in said.err
    assert "jquant recommend" in said.err
    assert not said.out


def talk(answers: list[str]) -> tuple[str, int]:
    """Runs `jquant advise` on a terminal of its own, answers each prompt, and returns what it showed and its code."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jquant.cli", "advise"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown, seen, deadline = b"", 0, time.monotonic() + 100
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.2)[0]:
                if process.poll() is not None:
                    break
                continue
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other side has closed
                break
            if answers and shown[seen:].endswith(b"): "):
                seen = len(shown)
                os.write(ours, answers.pop(0).encode())
        return shown.decode(), process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_on_a_terminal_it_recommends_and_decides() -> None:
    answers = ["llama-3-70b", "h100-sxm", "1", "2048", "256", "1", "latency", "5", "none", "int3:g64", "40"]
    shown, code = talk([f"{answer}\n" for answer in answers])
    assert code == 0, shown
    for words in ("Take int4:", "int3:g64 loses 40 %, more than the 5 %", "Try better PTQ first"):
        assert words in " ".join(shown.split())


def test_a_terminal_that_closes() -> None:
    shown, code = talk(["llama-3-70b\n", "\x04"])
    assert code == 2
    assert "the answers ended before the last question" in shown
