"""jquant validate: exit codes, reports, and result files that must be of the models named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jquant.cli import main
from tests.tiny_checkpoint import write


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    source = str(write(folder / "tiny"))
    assert main(["quantize", source, "--scheme", "int8:g32", "--out", str(folder / "int8")]) == 0
    return source, str(folder / "int8")


def test_exit_codes_and_reports(models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, packed = models
    words = ["--reference", source, "--window", "64", "--windows", "4", "--out", str(tmp_path / "v")]
    assert main(["validate", packed, *words, "--require", ""]) == 0
    assert "PASSED, 1 of 1 checks" in capsys.readouterr().out
    record = json.loads((tmp_path / "v" / "validation.json").read_text())
    assert record["passed"] is True
    assert record["model"]["scheme"] == "int8:g32"
    assert record["text"]["kl"] > 0
    assert "PASSED" in (tmp_path / "v" / "validation.html").read_text()
    assert main(["validate", packed, *words]) == 1  # the guide's benchmarks were not measured
    assert main(["validate", source, *words, "--scheme", "int2:g32", "--require", ""]) == 1
    assert "rounded without data" in (tmp_path / "v" / "validation.md").read_text()


def test_result_files(models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, packed = models
    files = {}
    for name, model in (("a", source), ("b", packed)):
        files[name] = str(tmp_path / f"{name}.json")
        words = ["eval", model, "--window", "64", "--windows", "4", "--json", files[name]]
        assert main(words if model == source else [*words, "--reference", source]) == 0
    words = ["validate", packed, "--results", files["b"], "--reference-results", files["a"], "--require", ""]
    assert main(words) == 0
    assert main([*words, "--reference", source]) == 0
    capsys.readouterr()
    assert main([*words[:3], files["a"], *words[4:]]) == 2
    assert "is of another model" in capsys.readouterr().err
    assert main([*words, "--reference", packed]) == 2
    assert "is of another model" in capsys.readouterr().err
    other = str(tmp_path / "c.json")
    assert main(["eval", source, "--window", "32", "--windows", "4", "--json", other]) == 0
    capsys.readouterr()
    assert main([*words[:5], other, "--require", ""]) == 2
    assert "different tokens_sha256" in capsys.readouterr().err


def test_a_model_with_another_tokenizer_does_not_compare(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, packed = models
    other = tmp_path / "other"
    shutil.copytree(packed, other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    assert main(["validate", str(other), "--reference", source, "--window", "64", "--windows", "2"]) == 2
    assert "different tokenizers" in capsys.readouterr().err
