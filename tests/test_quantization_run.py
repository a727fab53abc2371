"""jquant quantize: killed at any point it goes on to the same bits; what it leaves behind, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jquant.cli import main
from jquant.commands.options import calibration_batch
from jquant.core.errors import InputError
from jquant.data.blocks import text_windows
from jquant.data.text import load_text
from jquant.io import native
from jquant.models.checkpoint import open_checkpoint
from jquant.ptq import workdir
from jquant.ptq.activations import OnDisk
from jquant.ptq.coverage import Coverage
from jquant.ptq.preflight import Estimate
from jquant.ptq.presets import Calibration
from jquant.ptq.recipe import Recipe, Rule, Step
from jquant.quantization_run import in_batches, quantize_checkpoint
from tests.io.test_system_errors import files_up_to
from tests.tiny_checkpoint import tiny_model, write

RECIPE = Recipe(
    rules=(
        Rule(layers=("down_proj",), scheme="int4:g32", method=Step("gptq", (("act_order", "dynamic"),))),
        Rule(layers=(r"^blocks\.",), scheme="int4:g32:asym", method=Step("gptq", (("range", "minmax"),))),
        Rule(layers=("lm_head",), scheme="int8:g32"),
    )
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "tiny")


def _run(source: Path, out: Path, *, count: int = 4, **options: Any) -> Coverage:
    checkpoint = open_checkpoint(source)
    windows = text_windows(load_text("pydoc:calibration"), checkpoint.tokenizer(), window=64, limit=count)
    return quantize_checkpoint(checkpoint, RECIPE, out, calibration=windows, **options)


def test_the_folder_loads_back_to_what_was_quantized(source: Path, tmp_path: Path) -> None:
    coverage = _run(source, tmp_path / "q", batch=2)
    opened = open_checkpoint(tmp_path / "q")
    model = opened.model()
    tokens = jnp.arange(32)[None]
    assert np.isfinite(np.asarray(model(tokens))).all()
    assert model.blocks[0].mlp.down_proj.weight.get_value().groups is not None
    said = json.loads((tmp_path / "q" / "coverage.json").read_text())
    assert [row["path"] for row in said["layers"]] == [layer.path for layer in coverage.layers]
    provenance = json.loads((tmp_path / "q" / native.DESCRIPTION).read_text())["provenance"]
    assert Recipe.from_json(provenance["recipe"], "") == RECIPE
    assert provenance["calibration"]["text"] == "pydoc:calibration"
    assert provenance["products"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    assert np.asarray(model(tokens) - tiny_model()(tokens)).std() > 0


def test_a_model_is_not_evaluated_on_what_it_learned_from(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(source, tmp_path / "q")
    assert main(["eval", str(tmp_path / "q"), "--text", "pydoc:calibration", "--window", "32"]) == 2
    assert "was calibrated on the text pydoc:calibration" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["eval"], ["validate", "--reference", "SOURCE"], ["diagnose", "--reference", "SOURCE"]]
)
def test_nor_on_a_text_that_holds_a_part_of_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    _run(source, tmp_path / "q")
    other = tmp_path / "other.txt"
    other.write_text("Something else. " * 20 + load_text("pydoc:calibration").content[:400])
    words = [command[0], str(tmp_path / "q"), *(str(source) if word == "SOURCE" else word for word in command[1:])]
    assert main([*words, "--text", str(other), "--window", "128"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was calibrated on a part of the text" in said
    assert "32 tokens of its calibration text pydoc:calibration" in said


def test_blocks_that_stream_give_what_one_model_gives(source: Path, tmp_path: Path) -> None:
    from jquant.ptq.pipeline import quantize_model

    _run(source, tmp_path / "q")
    checkpoint = open_checkpoint(source)
    windows = text_windows(load_text("pydoc:calibration"), checkpoint.tokenizer(), window=64, limit=4)
    model, _ = quantize_model(checkpoint.model(), RECIPE, in_batches(windows.tokens, 1))
    tokens = jnp.arange(32)[None]
    np.testing.assert_array_equal(
        np.asarray(open_checkpoint(tmp_path / "q").model()(tokens)), np.asarray(model(tokens))
    )


def test_activations_on_disk_change_no_bit(source: Path, tmp_path: Path) -> None:
    _run(source, tmp_path / "a")
    _run(source, tmp_path / "b", spill=True)
    assert native.open_native(tmp_path / "a").sha256 == native.open_native(tmp_path / "b").sha256


def test_progress_says_loss_and_time_of_every_layer(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line each where asked for; else those of the block last done stand under the bar."""
    words = ["quantize", str(source), "--scheme", "int4:g32", "--method", "gptq", "--calibration-windows", "4"]
    words += ["--window", "64", "--out"]
    assert main([*words, str(tmp_path / "said"), "--verbose"]) == 0
    layers = json.loads((tmp_path / "said" / "coverage.json").read_text())["layers"]
    assert len(layers) == 14
    expected = [[layer["path"], "loss", f"{layer['error']:.2e}", f"{layer['seconds']:.2f}", "s"] for layer in layers]
    said = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert [line for line in said if line[:1] and line[0].startswith("blocks.")] == expected
    assert [line[0] for line in said if line[:1] and line[0].startswith("block-")] == ["block-0000:", "block-0001:"]

    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr("jquant.commands.terminal.new_console", lambda stderr=False: terminal)
    monkeypatch.setattr("rich.progress.Progress.update", lambda self, *_, **__: self.refresh())
    assert main([*words, str(tmp_path / "bar")]) == 0
    for layer in layers:
        assert f"{layer['path']:<22}  loss {layer['error']:.2e}  " in shown.getvalue()


def test_a_run_that_goes_on_says_nothing_of_what_was_done_before(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantize", str(source), "--scheme", "int4:g32", "--out", str(tmp_path / "q"), "--verbose"]
    finish = workdir.Workdir.finish

    def stopped(self: Any, part: str, *arguments: Any) -> None:
        if part == "block-0001":
            raise KeyboardInterrupt
        finish(self, part, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workdir.Workdir, "finish", stopped)
        assert main(words) == 130
    assert "blocks.0.mlp.down_proj  loss" in capsys.readouterr().err
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "going on behind 1 of 3 parts" in said
    assert "blocks.0." not in said
    assert "blocks.1.mlp.down_proj  loss" in said


def test_too_few_tokens_are_refused_before_the_work(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jquant.calib.gram._INPUTS_PER_ROW", 32)
    words = ["quantize", str(source), "--window", "2", "--calibration-windows", "1", "--out", str(tmp_path / "q")]
    assert main([*words, "--method", "awq", "--scheme", "int4:g32"]) == 2
    assert "calibration data of 2 tokens for 96 inputs: too few" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
    assert main([*words, "--scheme", "int4:g32"]) == 0  # which learns from none


@pytest.mark.filterwarnings("default::jquant.core.errors.InputWarning")
def test_fewer_tokens_than_inputs_are_warned_of(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(source), "--method", "gptq", "--scheme", "int4:g32", "--window", "48"]
    for count in ("1", "2"):
        assert main([*words, "--calibration-windows", count, "--out", str(tmp_path / count)]) == 0
        said = " ".join(capsys.readouterr().err.split())
        expected = "jquant: warning: calibration data of 48 tokens for the 96 inputs of layer blocks.0.mlp.down_proj: "
        assert (expected in said) == (count == "1")


def test_products_of_bfloat16_are_another_result_and_the_folder_says_so(source: Path, tmp_path: Path) -> None:
    words = ["--scheme", "int4:g32", "--method", "gptq", "--calibration-windows", "2", "--window", "64"]
    for products in ("float32", "bfloat16"):
        out = tmp_path / products
        assert main(["quantize", str(source), *words, "--products", products, "--out", str(out)]) == 0
        assert json.loads((out / native.DESCRIPTION).read_text())["provenance"]["products"] == products
    wide, narrow = (json.loads((tmp_path / name / "coverage.json").read_text()) for name in ("float32", "bfloat16"))
    assert [layer["error"] for layer in wide["layers"]] != [layer["error"] for layer in narrow["layers"]]


def test_schemes_of_inputs_come_back(source: Path, tmp_path: Path) -> None:
    """W8A8 with static scales: they are tensors of the checkpoint, and their scheme stands in its description."""
    out = tmp_path / "w8a8"
    recipe = Recipe(rules=(Rule(layers=(r"^blocks\.",), scheme="int8:channel", activation="int8:tensor:asym"),))
    checkpoint = open_checkpoint(source)
    windows = text_windows(load_text("pydoc:calibration"), checkpoint.tokenizer(), window=64, limit=2)
    quantize_checkpoint(checkpoint, recipe, out, calibration=windows)
    layer: Any = open_checkpoint(out).model().blocks[1].mlp.up_proj
    assert str(layer.activation) == "int8:tensor:asym"
    assert float(layer.input_scale.get_value()) > 0
    assert main(["eval", str(out), "--window", "32", "--windows", "2"]) == 0


def test_a_full_disk_leaves_nothing_under_the_name_and_can_be_gone_on_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(source, tmp_path / "whole")

    def full(folder: Path, part: str, tensors: Any) -> Any:
        if part == "block-0001":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return native.write_part(folder, part, tensors)

    monkeypatch.setattr(workdir, "write_part", full)
    with pytest.raises(InputError, match="No space left on device; once it can be, start the same command again"):
        _run(source, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    monkeypatch.undo()
    resumed: list[int] = []
    _run(source, tmp_path / "q", on_resume=resumed.append)
    assert resumed == [1]
    assert native.open_native(tmp_path / "q").sha256 == native.open_native(tmp_path / "whole").sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "whole"]


@pytest.mark.parametrize(
    ("holder", "name", "options"),
    [(workdir, "write_part", {}), (workdir.Workdir, "_save_parts", {}), (OnDisk, "put", {"spill": True})],
)
def test_what_the_system_says_of_a_failed_write_is_told_and_the_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, options: dict[str, Any]
) -> None:
    _run(source, tmp_path / "whole")
    written = getattr(holder, name)

    def limited(*arguments: Any) -> Any:
        with files_up_to(10_000):
            return written(*arguments)

    monkeypatch.setattr(holder, name, limited)
    with pytest.raises(InputError, match=f"{os.strerror(errno.EFBIG)}; once .* start the same command again"):
        _run(source, tmp_path / "q", **options)
    monkeypatch.undo()
    _run(source, tmp_path / "q", **options)
    assert native.open_native(tmp_path / "q").sha256 == native.open_native(tmp_path / "whole").sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "whole"]


def test_an_unfinished_run_of_another_recipe_is_not_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, part: str, tensors: Any) -> Any:
        if part == "block-0001":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return native.write_part(folder, part, tensors)

    monkeypatch.setattr(workdir, "write_part", full)
    with pytest.raises(InputError):
        _run(source, tmp_path / "q")
    monkeypatch.undo()
    with pytest.raises(
        InputError, match=r"unfinished: holds an unfinished run whose batch differs \(1 there, 2 here\)"
    ):
        _run(source, tmp_path / "q", batch=2)
    with pytest.raises(InputError, match=r'whose products differs \("float32" there, "bfloat16" here\)'):
        _run(source, tmp_path / "q", products="bfloat16")
    with pytest.raises(InputError, match=r"whose calibration\.\w+ differs \(4 there, 2 here\)"):
        _run(source, tmp_path / "q", count=2)


def test_a_refused_run_does_not_stand_in_the_way_of_the_corrected_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had finished nothing; nor does what a killed one kept of activations stay."""
    monkeypatch.setattr("jquant.ptq.preflight._available", lambda devices: 1 << 16)
    with pytest.raises(InputError, match="the run needs"):
        _run(source, tmp_path / "q")
    monkeypatch.undo()
    unfinished = tmp_path / ".q.unfinished"
    assert unfinished.exists()
    (unfinished / "activations-abc").mkdir()
    (unfinished / "states-0-0.npy").write_bytes(b"of the other run")
    _run(source, tmp_path / "q", batch=2)
    _run(source, tmp_path / "whole", batch=2)
    assert native.open_native(tmp_path / "q").sha256 == native.open_native(tmp_path / "whole").sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "whole"]


def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jquant.ptq.preflight._available", lambda devices: 1 << 16)
    heard: list[Estimate] = []
    with pytest.raises(InputError, match=r"the run needs .* of activations.*--spill"):
        _run(source, tmp_path / "q", on_estimate=heard.append)
    assert heard[0].operations > 0
    assert not (tmp_path / "q").exists()


def test_a_run_that_cannot_fit_on_disk_is_refused_and_one_that_goes_on_needs_less(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Estimate] = []
    monkeypatch.setattr("jquant.ptq.preflight._free_disk", lambda target: 1 << 12)
    with pytest.raises(InputError, match=r"q: the run writes .* on that disk: make room, or choose another --out"):
        _run(source, tmp_path / "q", on_estimate=heard.append)
    assert not (tmp_path / "q").exists()

    def full(folder: Path, part: str, tensors: Any) -> Any:
        if part == "block-0001":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return native.write_part(folder, part, tensors)

    monkeypatch.setattr("jquant.ptq.preflight._free_disk", lambda target: heard[0].disk_bytes)
    monkeypatch.setattr(workdir, "write_part", full)
    with pytest.raises(InputError, match="No space left on device"):
        _run(source, tmp_path / "q")
    monkeypatch.setattr(workdir, "write_part", native.write_part)
    monkeypatch.setattr("jquant.ptq.preflight._free_disk", lambda target: heard[0].disk_bytes - 1)
    _run(source, tmp_path / "q", on_estimate=heard.append)
    assert heard[1].disk_bytes < heard[0].disk_bytes
    held = sum(file.stat().st_size for file in (tmp_path / "q" / native.ARRAYS).rglob("*") if file.is_file())
    assert heard[0].written_bytes > 0.5 * held


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheme", "int4:g32", "--recipe", "nf4"], "give either --recipe"),
        ([], "give either --recipe"),
        (["--recipe", "gtpq"], "neither a file nor a preset"),
        (["--method", "gptq", "--scheme", "int4:g32", "--calibration-windows", "100000"], "calibration text"),
        (["--method", "hqq", "--scheme", "int4:g32"], "int4:g32:asym"),
        (["--scheme", "int4:g32", "--layers", "nothing"], "matches nothing"),
        (["--method", "gptq", "--scheme", "int4:g32", "--window", "4096"], "512"),
        (["--scheme", "int4:g32", "--products", "bfloat16"], "no method of the recipe learns from data"),
        (["--recipe", "int2-g64-lsq"], "neither a file nor a preset of quantize"),
        (["--method", "smoothquant", "--scheme", "int8:channel"], "quantizes no activations; say in which scheme"),
        (["--method", "rtn@int4:token", "--scheme", "int4:g32"], "layer blocks.0.attn.k_proj: weights in int4:g32"),
        (["--method", "smoothquant@int8:token", "--scheme", "int8:channel:asym"], "weights must be symmetric"),
        (
            ["--method", "awq", "--scheme", "int4:g32", "--layers", "q_proj"],
            "awq on blocks.0.attn.q_proj: no norm or layer before it can take the scales up; let the rule, or "
            "--layers, name all layers that read the same input (attn.q_proj, attn.k_proj, attn.v_proj)",
        ),
        (["--method", "awq", "--scheme", "int4:g32", "--layers", "lm_head"], "awq on head.lm_head: no norm"),
        (["--method", "gptq", "--scheme", "int4:g32", "--batch", "3"], "batch 3 for 32 calibration windows"),
        (["--method", "gptq", "--scheme", "int4:g32", "--batch", "64"], "batch 64 for 32 calibration windows"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["quantize", str(source), "--out", str(tmp_path / "q"), *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert " ".join(message.split()) in " ".join(said.split())
    assert "beyond compiling" not in said, "it was told what the run takes, and then refused"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "inputs"), [("rtn", ""), ("rtn@int8:token", ", its inputs to int8:token")])
def test_a_quantized_model_is_not_quantized_again(
    method: str, inputs: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scheme", "int8:channel", "--method", method, "--layers", "attn"]
    assert main(["quantize", str(source), *words, "--out", str(tmp_path / "q")]) == 0
    capsys.readouterr()
    assert main(["quantize", str(tmp_path / "q"), "--scheme", "int4:g32", "--out", str(tmp_path / "r")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"layer blocks.0.attn.k_proj is quantized already{inputs}: start from the float model" in said
    assert "beyond compiling" not in said
    words = ["--scheme", "int4:g32", "--layers", "mlp"]  # what is still float may be
    assert main(["quantize", str(tmp_path / "q"), *words, "--out", str(tmp_path / "s")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "s"]


def test_a_checkpoint_without_tokenizer_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    import dataclasses

    def missing() -> Any:
        raise InputError("no tokenizer")

    checkpoint = dataclasses.replace(open_checkpoint(source), tokenizer_reader=missing)
    recipe = Recipe(rules=(Rule(layers=(r"^blocks\.",), scheme="int4:g32"),))
    with pytest.raises(InputError, match="no tokenizer"):
        quantize_checkpoint(checkpoint, recipe, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("windows", "devices", "least", "wanted"),
    [
        (32, 1, 8, 8),
        (4, 1, 8, 4),
        (12, 1, 8, 6),
        (7, 1, 8, 7),
        (11, 1, 8, 1),
        (32, 1, 1, 1),
        (16, 8, 1, 8),
        (6, 2, 8, 6),
    ],
)
def test_a_default_batch_divides_the_windows(
    windows: int, devices: int, least: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jquant.kernels.dispatch.on_cpu", lambda: least == 1)
    mesh = None if devices == 1 else jax.sharding.AbstractMesh((devices,), ("data",))
    assert calibration_batch(None, windows, mesh) == wanted  # type: ignore[arg-type]
    assert calibration_batch(3, windows, mesh) == 3  # type: ignore[arg-type]


def test_windows_that_do_not_divide_over_the_mesh_are_refused_with_numbers_that_do(source: Path) -> None:
    eight = jax.sharding.AbstractMesh((8,), ("data",))
    with pytest.raises(InputError, match=r"12 calibration windows over data=8: .*--calibration-windows 8 or 16, or"):
        calibration_batch(None, 12, eight)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--calibration-windows 8, or"):
        calibration_batch(None, 4, eight)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"batch 4 over data=8: it must be a multiple of 8"):
        in_batches(np.zeros((8, 4), np.int32), 4, eight)  # type: ignore[arg-type]


def test_figures_asked_for_win_over_recommended_ones(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = Calibration(text="pydoc:calibration", windows=3, window=48)
    monkeypatch.setattr("jquant.ptq.presets.RECOMMENDED", {"gptq": advice})
    words = ["quantize", str(source), "--method", "gptq", "--scheme", "int4:g32", "--layers", "o_proj"]

    def learned(out: str, *more: str) -> tuple[int, int]:
        assert main([*words, "--out", str(tmp_path / out), *more]) == 0
        text = json.loads((tmp_path / out / native.DESCRIPTION).read_text())["provenance"]["calibration"]
        return text["windows"], text["window"]

    assert learned("a", "--calibration", "recommended") == (3, 48)
    assert "recommended" not in capsys.readouterr().err
    assert learned("b", "--calibration", "recommended", "--calibration-windows", "2") == (2, 48)
    said = " ".join(capsys.readouterr().err.split())
    assert "on 2 windows of 48 tokens of pydoc:calibration, as asked for; recommended are 3 of 48" in said
    assert learned("c", "--calibration", "recommended", "--window", "32", "--calibration-windows", "3") == (3, 32)
    assert learned("d", "--calibration-windows", "2") == (2, 512)


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
import jquant.io.native as native, jquant.ptq.workdir as workdir
from jquant.cli import main
os.replace, os.rename, os.unlink = map(counted, (os.replace, os.rename, os.unlink))
pathlib.Path.replace, pathlib.Path.rename = counted(pathlib.Path.replace), counted(pathlib.Path.rename)
pathlib.Path.unlink, shutil.rmtree = counted(pathlib.Path.unlink), counted(shutil.rmtree)
native._save, native._describe = counted(native._save), counted(native._describe)
workdir.Workdir.save_states = counted(workdir.Workdir.save_states)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_at_ten_points_it_ends_with_the_same_bits(source: Path, tmp_path: Path) -> None:
    """Kill −9 before the n-th write, rename or removal: each run goes on from what the ones before it left."""
    words = ["quantize", str(source), "--method", "gptq", "--scheme", "int4:g32"]
    words += ["--calibration-windows", "4", "--window", "64", "--batch", "2", "--out"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run(limit: int, out: Path) -> int:
        call = [sys.executable, "-c", _KILLER, str(limit), *words, str(out)]
        return subprocess.run(call, env=environment, capture_output=True, check=False, timeout=300).returncode

    assert run(0, tmp_path / "whole") == 0
    killed = 0
    for limit in (1, 2, 3, 5, 8, 13, 21, 20, 30, 44):
        if run(limit, tmp_path / "q") == -signal.SIGKILL:
            killed += 1
            assert not (tmp_path / "q").exists()
    assert killed == 10
    assert run(0, tmp_path / "q") == 0
    assert native.open_native(tmp_path / "q").sha256 == native.open_native(tmp_path / "whole").sha256
    tables = [json.loads((tmp_path / name / native.DESCRIPTION).read_text())["tensors"] for name in ("q", "whole")]
    assert tables[0] == tables[1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cache", "q", "whole"]
