"""The command line as its user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jquant.cli import main
from jquant.config_file import read_config_file
from jquant.core.errors import InputError
from jquant.evaluation.benchmark_options import BenchmarkOptions
from jquant.evaluation.config import EvalConfig
from tests.tiny_checkpoint import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("model") / "tiny"))


def test_eval_quantize_generate(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plain, packed = tmp_path / "q", tmp_path / "plain.json", tmp_path / "packed.json"
    options = ["--window", "64", "--windows", "3"]
    assert main(["eval", model, "--scheme", "int4:g32", *options, "--json", str(plain)]) == 0
    assert main(["quantize", model, "--scheme", "int4:g32", "--out", str(out)]) == 0
    assert main(["eval", str(out), *options, "--reference", model, "--json", str(packed)]) == 0
    first, second = json.loads(plain.read_text()), json.loads(packed.read_text())
    assert {"perplexity", "nll", "stderr", "tokens", "windows", "window", "text_sha256", "seconds"} <= set(first)
    assert (first["window"], first["windows"]) == (64, 3)
    assert first["perplexity"] == second["perplexity"]
    assert first["model_bytes"] == second["model_bytes"]
    assert second["kl"] > 0
    assert main(["eval", model, "--window", "64", "--windows", "1", "--json", str(plain)]) == 0
    assert json.loads(plain.read_text())["stderr"] is None  # JSON has no NaN
    assert main(["generate", str(out), "--prompt", "Hello", "--max-tokens", "5"]) == 0
    assert "Hello" in capsys.readouterr().out


def test_export_and_convert(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, exported, again = tmp_path / "q", tmp_path / "gptq", tmp_path / "ct"
    options = ["--window", "64", "--windows", "3"]
    assert main(["quantize", model, "--scheme", "int4:g32:fp16", "--out", str(native)]) == 0
    assert main(["export", str(native), "--format", "gptq", "--text", "pydoc", *options, "--out", str(exported)]) == 0
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert main(["convert", str(exported), str(again), "--format", "compressed-tensors"]) == 0
    found = []
    for folder in (native, exported, again):
        assert main(["eval", str(folder), *options, "--json", str(tmp_path / "eval.json")]) == 0
        found.append(json.loads((tmp_path / "eval.json").read_text())["perplexity"])
    assert found[0] == found[1] == found[2]
    assert f"| perplexity | {found[0]:.4f} ± " in card
    assert "3 windows of 64 tokens" in card
    capsys.readouterr()
    words = ["export", model, "--format", "gguf", "--text", "pydoc", "--out", str(tmp_path / "x.gguf")]
    assert main(words) == 2
    assert "has no model card" in capsys.readouterr().err
    assert main(words[:4] + words[6:]) == 0
    assert main(["eval", str(tmp_path / "x.gguf"), *options]) == 0


def test_qat(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, packed = tmp_path / "q", tmp_path / "packed.json"
    words = ["--steps", "3", "--batch", "2", "--window", "32", "--windows", "8", "--learning-rate", "1e-3"]
    words += ["--eval-text", "pydoc", "--eval-window", "64", "--eval-windows", "3", "--eval-every", "2"]
    assert main(["qat", model, "--recipe", "nf4", *words, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "14 Linear; weights nf4:g64:dq by clipped_ste" in " ".join(said.err.split())
    assert "step 2: loss" in said.err
    assert main(["eval", str(out), "--window", "64", "--windows", "3", "--json", str(packed)]) == 0
    assert f"perplexity {json.loads(packed.read_text())['perplexity']:.6g}; " in said.out
    assert said.out.splitlines()[1].endswith(f"bits a weight in packed layers, padding included; {out}")
    assert main(["generate", str(out), "--prompt", "Hello", "--max-tokens", "5"]) == 0
    assert main(["eval", str(out), "--text", "pydoc:calibration", "--window", "32"]) == 2
    assert "was calibrated on the text" in capsys.readouterr().err


def test_config_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(
        f"model: {model}\nschemes: [int4, nf4]\ngroups: [32, 64]\nout: {out}\nwindow: 64\nwindows: 2\nreport: false\n"
    )
    assert main(["sweep", "--config", str(file), "--windows", "3"]) == 0
    result = json.loads((out / "results.json").read_text())
    assert [cell["scheme"] for cell in result["cells"]] == ["int4:g32", "int4:g64", "nf4:g32", "nf4:g64"]
    assert result["manifest"]["protocol"]["windows"] == 3
    assert (out / "results.csv").read_text().count("\n") == 6
    file.write_text("model: demo\nwindowz: 3\n")
    assert main(["sweep", "--config", str(file)]) == 2
    assert "unknown field 'windowz'" in capsys.readouterr().err
    file.write_text("model: demo\ntasks: arc_easy, hellaswag\nlimit: 7\nwindow: 64\n")
    values = read_config_file(file, EvalConfig)
    tasks = BenchmarkOptions(tasks=("arc_easy", "hellaswag"), limit=7)
    assert values == {"model": "demo", "benchmark": tasks, "window": 64}
    file.write_text("model: demo\nbenchmark: {}\n")
    with pytest.raises(InputError, match=r"unknown field 'benchmark'; there are .*tasks"):
        read_config_file(file, EvalConfig)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["eval", "no/such/model"], "no/such/model"),
        (["eval", "MODEL", "--scheme", "int4:g0"], "group size 0"),
        (["eval", "MODEL", "--text", "nonsense"], "nonsense"),
        (["eval", "MODEL", "--window", "1"], "window 1"),
        (["eval", "MODEL", "--window", "1000"], "exceeds the model's context"),
        (["sweep", "MODEL", "--schemes", "int4", "--out", "OUT", "--window", "1000"], "exceeds the model's context"),
        (["quantize", "MODEL", "--scheme", "int4:g128", "--out", "OUT"], "wider than the row"),
        (["quantize", "MODEL", "--scheme", "int4:g32", "--out", "MODEL"], "not empty"),
        (["qat", "MODEL", "--recipe", "nf4", "--out", "MODEL"], "not empty"),
        (["qat", "MODEL", "--recipe", "nf4", "--out", "OUT", "--window", "64", "--windows", "2"], "2 rows of data"),
        (["generate", "MODEL", "--prompt", ""], "prompt is empty"),
        (["inspect", "OUT"], "OUT"),
        (["eval", "--config", "OUT/x.yaml"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    words: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    words = [word.replace("MODEL", model).replace("OUT", out) for word in words]
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("jquant: error: ")
    assert message.replace("OUT", out) in lines[0]
    assert not Path(out).exists()


def test_help_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(
        command in overview for command in ("eval", "sweep", "quantize", "qat", "generate", "inspect", "formats")
    )
    assert main(["formats", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} >= {"int4", "mxfp4", "nvfp4", "bf16"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import jquant", "torch transformers datasets lm_eval plotly ray matplotlib jax"),
        ("import jquant.cli; jquant.cli.main(['--help'])", "jax flax numpy"),
    ],
)
def test_heavy_modules_stay_out(statement: str, absent: str) -> None:
    check = f"{statement}; import sys; print([name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_package_runs_as_a_module() -> None:
    run = [sys.executable, "-m", "jquant"]
    done = subprocess.run([*run, "inspect", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("jquant: error: ")
    done = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("jquant ")
