"""jquant qat: what is saved is what was trained; killed at any point it goes on to the same bits; what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jquant.cli import main
from jquant.core.errors import InputError
from jquant.data.blocks import Windows, text_windows
from jquant.data.text import load_text
from jquant.evaluation.perplexity import perplexity
from jquant.io.native import DESCRIPTION, open_native
from jquant.models.checkpoint import open_checkpoint
from jquant.nn.install import tensors_of
from jquant.qat.batches import RowBatches
from jquant.qat.config import QATConfig
from jquant.qat.convert import convert
from jquant.qat.losses import distillation_loss
from jquant.qat.metrics import METRICS
from jquant.qat.prepare import prepare
from jquant.qat.rules import Recipe, one_rule
from jquant.qat.trainer import TrainResult, train
from jquant.qat_run import check_out, train_checkpoint
from tests.tiny_checkpoint import write

CONFIG = QATConfig(steps=3, batch=2, learning_rate=1e-3, warmup_steps=1)
RECIPES = {
    "int4, a range": one_rule("int4:g32:fp16"),
    "int3, trained": one_rule("int3:g32", gradient="lsq"),
    "nf4": one_rule("nf4:g32:dq"),
    "int4, stochastic": one_rule("int4:g32", rounding="stochastic"),
    "int8 by int8": one_rule("int8:channel", activation="int8:token"),
    "int4 by int8": one_rule("int4:g32", activation="int8:token"),
    "int8 by trained int8": one_rule(
        "int8:channel", gradient="lsq", activation="int8:tensor", activation_gradient="lsq"
    ),
}
QUICK = ("int3, trained", "int4 by int8")  # to compile


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "tiny", layers=1)


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "deeper")


def _windows(source: Path, text: str, limit: int) -> Windows:
    return text_windows(load_text(text), open_checkpoint(source).tokenizer(), window=32, limit=limit)


def _run(source: Path, out: Path, recipe: Recipe, config: QATConfig = CONFIG, **options: Any) -> TrainResult:
    training = _windows(source, "pydoc:calibration", 16)
    options.setdefault("announce", lambda said: None)
    result = train_checkpoint(open_checkpoint(source), recipe, training, out, config=config, **options)
    assert result is not None
    return result


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_what_is_loaded_is_what_was_trained(name: str, source: Path, tmp_path: Path) -> None:
    """Its perplexity to the last bit; and what is evaluated on the way changes nothing."""
    evaluation = _windows(source, "pydoc", 4)
    config = QATConfig(**{**CONFIG.as_json(), "eval_every": 2})
    result = _run(source, tmp_path / "q", RECIPES[name], config, evaluation=evaluation)
    loaded = open_checkpoint(tmp_path / "q").model()
    assert perplexity(loaded, evaluation).value == result.evaluation["perplexity"]
    _run(source, tmp_path / "again", RECIPES[name])
    assert open_native(tmp_path / "again").sha256 == open_native(tmp_path / "q").sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "q"]


def test_it_is_prepare_train_and_convert(deeper: Path, tmp_path: Path) -> None:
    recipe = RECIPES["int3, trained"]
    _run(deeper, tmp_path / "q", recipe)
    model = open_checkpoint(deeper).model()
    teacher = nnx.clone(model)
    prepare(model, recipe, announce=lambda said: None)
    batches = RowBatches(_windows(deeper, "pydoc:calibration", 16).tokens, batch=2, seed=0)
    train(model, distillation_loss(), batches, CONFIG, teacher=teacher)
    ours, theirs = tensors_of(convert(model)), tensors_of(open_checkpoint(tmp_path / "q").model())
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)  # schemes too
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    said = json.loads((tmp_path / "q" / DESCRIPTION).read_text())["provenance"]
    assert Recipe.from_json(said["recipe"], "") == recipe
    assert (said["training"]["steps"], said["calibration"]["text"]) == (3, "pydoc:calibration")
    assert len((tmp_path / "q" / METRICS).read_text().splitlines()) == 3


def test_the_best_is_what_is_saved(source: Path, tmp_path: Path) -> None:
    evaluation, recipe = _windows(source, "pydoc", 4), RECIPES["int3, trained"]
    config = QATConfig(**{**CONFIG.as_json(), "steps": 6, "warmup_steps": 5, "learning_rate": 5.0})
    config = QATConfig(**{**config.as_json(), "eval_every": 1, "best": "perplexity"})
    result = _run(source, tmp_path / "q", recipe, config, evaluation=evaluation)
    lines = [json.loads(line) for line in (tmp_path / "q" / METRICS).read_text().splitlines()]
    figures = {line["step"]: line["eval_perplexity"] for line in lines}
    assert (result.best_step, result.best) == min(figures.items(), key=lambda item: item[1])
    assert result.best_step != 6
    assert perplexity(open_checkpoint(tmp_path / "q").model(), evaluation).value == result.best


def test_perplexity_before_is_told(source: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    evaluation = _windows(source, "pydoc", 4)
    _run(source, tmp_path / "q", RECIPES["nf4"], evaluation=evaluation, announce=heard.append)
    of_float = perplexity(open_checkpoint(source).model(), evaluation).value
    assert heard[1].startswith("perplexity before training: ")
    assert heard[1].endswith(f"in floats {of_float:.6g}")


def test_texts_that_overlap_are_refused(source: Path, tmp_path: Path) -> None:
    evaluation = _windows(source, "pydoc:calibration", 4)
    with pytest.raises(InputError, match="both on the text pydoc:calibration"):
        _run(source, tmp_path / "q", RECIPES["nf4"], evaluation=evaluation)


def test_a_run_that_diverges_names_the_step_and_can_be_started_anew(source: Path, tmp_path: Path) -> None:
    config = QATConfig(**{**CONFIG.as_json(), "learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(InputError, match=r"step \d: loss .* training has diverged; .* lower learning_rate"):
        _run(source, tmp_path / "q", RECIPES["int3, trained"], config)
    assert not (tmp_path / "q").exists()
    _run(source, tmp_path / "q", RECIPES["int3, trained"])  # no state was kept: nothing is lost
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_an_unfinished_run_of_another_recipe_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        if record.step == 3:
            raise Stop

    config = QATConfig(**{**CONFIG.as_json(), "checkpoint_every": 1})
    with pytest.raises(Stop):
        _run(source, tmp_path / "q", RECIPES["nf4"], config, listen=stop)
    with pytest.raises(InputError, match=r'another recipe.rules.0.scheme \("nf4:g32:dq" there, "int4:g32:fp16" here'):
        _run(source, tmp_path / "q", RECIPES["int4, a range"], config)


def test_what_is_packed_is_not_trained(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert main(["quantize", str(source), "--scheme", "int4:g32", "--out", str(packed)]) == 0
    with pytest.raises(InputError, match=r"packed: blocks.0.attn.k_proj.weight is packed; training starts from the fl"):
        _run(packed, tmp_path / "q", RECIPES["nf4"])


def test_what_a_run_killed_on_its_last_step_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / DESCRIPTION).touch()
    state = tmp_path / ".q.unfinished" / "training" / "states" / "4"
    state.mkdir(parents=True)
    with pytest.raises(InputError, match="exists and is not empty"):
        check_out(tmp_path / "q")
    assert state.exists()  # of a run that has not ended
    state.rmdir()
    with pytest.raises(InputError, match="exists and is not empty"):
        check_out(tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "int5-g7"], "neither a file nor a preset of qat, which are int4-g128"),
        (["--recipe", "FILE"], "pattern 'nothing' matches nothing"),
        (["--recipe", "int4-g128"], "wider than the row"),
        (["--recipe", "fp8", "--best", "perplexity"], "need a text to evaluate on: give --eval-text"),
        (["--recipe", "fp8", "--eval-text", "pydoc:calibration"], "both on the text pydoc:calibration"),
        (["--recipe", "fp8", "--steps", "10", "--warmup-steps", "10"], "warmup_steps reaches to step 10 of 10"),
        (["--recipe", "fp8", "--distillation-weight", "2"], "distillation weight 2.0"),
        (["--recipe", "fp8", "--mesh", "data=64"], "asks for 64 devices"),
        (["--recipe", "fp8", "--windows", "4"], "a batch of 8 from 4 rows of data"),
        (["--recipe", "fp8", "--learning-rate", "0"], "learning_rate is 0.0; it must be above 0"),
        (["--recipe", "fp8", "--window", "1000"], "exceeds the model's context"),
        (["--recipe", "fp8", "--gradual-bits", "2", "8"], "no weight of the model is an integer"),
        (["--recipe", "fp8", "--frozen", "third"], "'third' matches nothing"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("rules:\n- {layers: ['^blocks'], scheme: int8:channel}\n- {layers: [nothing], scheme: int4:g32}\n")
    words = [str(file) if word == "FILE" else word for word in words]
    try:
        code = main(["qat", str(source), "--window", "32", "--out", str(tmp_path / "q"), *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(("package", "words"), [("grain", []), ("tensorboardX", ["--tensorboard"])])
def test_a_missing_package_names_the_extra(
    package: str,
    words: list[str],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--recipe", "fp8", "--window", "32", "--windows", "16", "--steps", "2", *words]
    assert main(["qat", str(source), "--out", str(tmp_path / "q"), *options]) == 2
    error = capsys.readouterr().err
    assert f"'{package}'" in error
    assert "pip install 'jquant[qat]'" in error


_KILLER = """
import os, pathlib, shutil, signal, sys
left = int(sys.argv[1])
def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
import jquant.io.native as native
from jquant.cli import main
from jquant.qat.metrics import MetricsLog
os.replace, os.rename = counted(os.replace), counted(os.rename)
pathlib.Path.replace, pathlib.Path.rename = counted(pathlib.Path.replace), counted(pathlib.Path.rename)
shutil.rmtree, native._save, MetricsLog.write = map(counted, (shutil.rmtree, native._save, MetricsLog.write))
code = main(sys.argv[2:])
print("calls", -left)
sys.exit(code)
"""


@pytest.mark.slow
def test_killed_at_many_points_it_ends_with_the_same_bits(source: Path, tmp_path: Path) -> None:
    """Kill −9 before the n-th step, rename or removal: each run goes on from what the ones before it left."""
    recipe = tmp_path / "recipe.yaml"
    layers = one_rule("int4:g32", gradient="lsq", activation="int8:tensor", activation_gradient="lsq")
    recipe.write_text(json.dumps(layers.as_json()))
    words = ["qat", str(source), "--recipe", str(recipe), "--window", "32", "--windows", "16", "--batch", "2"]
    words += ["--steps", "8", "--learning-rate", "1e-3", "--checkpoint-every", "2", "--gradual-bits", "3", "8"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run(limit: int, out: Path) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", _KILLER, str(limit), *words, "--out", str(out)]
        return subprocess.run(call, env=environment, capture_output=True, text=True, check=False, timeout=300)

    whole = run(0, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout.split()[-1])
    killed = 0
    for limit in (1, 2, 3, 5, 8, 13, 21, calls // 3):
        if run(limit, tmp_path / "q").returncode == -signal.SIGKILL:
            killed += 1
    assert killed >= 6, calls
    if not (tmp_path / "q").exists():
        assert run(0, tmp_path / "q").returncode == 0
    assert open_native(tmp_path / "q").sha256 == open_native(tmp_path / "whole").sha256
    assert _curve(tmp_path / "q") == _curve(tmp_path / "whole")


def _curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
