"""Two processes with a real coordinator: they find what one finds, end together, and go on where they stood."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jquant.cli import main
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.io.native import open_native
from jquant.io.process_options import ProcessOptions
from jquant.models.decoder import Decoder
from jquant.models.save import save
from tests.processes import ended, free_port, started
from tests.tiny_checkpoint import CONFIG, byte_tokenizer, write

MESH = ["--mesh", "data=2,tensor=2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("processes") / "tiny")


@pytest.mark.parametrize("slurm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_evaluation_over_two_processes(slurm: bool, tiny: Path, tmp_path: Path) -> None:
    """The same figures; process 0 alone tells and writes them. SLURM's variables say as much as the options."""
    arguments = ["eval", str(tiny), "--window", "64", "--windows", "6", "--batch", "2"]
    assert main([*arguments, "--json", str(tmp_path / "one.json")]) == 0
    command = [*arguments, *MESH, "--json", str(tmp_path / "two.json")]
    with started(command, command, slurm=slurm) as processes:
        results = ended(processes)
    assert [code for code, _, _ in results] == [0, 0], results
    assert "perplexity" in results[0][1]
    assert "Rank" not in results[0][1]  # what Gloo says
    assert "perplexity" not in results[1][1]
    found = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    assert found[1]["perplexity"] == pytest.approx(found[0]["perplexity"], rel=1e-5)
    for name in ("model_sha256", "tokens_sha256", "model_bytes"):
        assert found[1][name] == found[0][name]


def test_unequal_versions_are_named_in_all(tiny: Path) -> None:
    command = ["eval", str(tiny), *MESH]
    with started(command, command, before=("", "import jquant; jquant.__version__ = '9.9';")) as processes:
        results = ended(processes)
    for code, _, error in results:
        assert code == 2
        assert "process 1 on" in error
        assert "has jquant 9.9, process 0 on" in error
        assert "install the same versions on all hosts" in error


def test_a_coordinator_that_is_not_there_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the time given, by a process that looks for it; a coordinator that waits for others says so too."""
    address = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    words = ["--coordinator", address, "--processes", "2", "--process", "1", "--startup-timeout", "1"]
    assert main(["eval", str(tiny), *MESH, *words]) == 2
    assert time.monotonic() - began < 10
    assert f"coordinator {address} is not reached within" in capsys.readouterr().err
    with started(["eval", str(tiny), *MESH], timeouts=(2, 10), count=2) as processes:
        ((code, _, error),) = ended(processes, seconds=60)
    assert code == 2
    assert "did not all reach the coordinator" in error.splitlines()[-1]


def test_a_folder_that_not_all_see_is_named(tiny: Path, tmp_path: Path) -> None:
    """Each process stands in a folder of its own, and --out is relative."""
    before = []
    for name in "ab":
        (tmp_path / name).mkdir()
        place = f"os.chdir({str(tmp_path / name)!r})"
        before.append(f"import os; import jquant.io.folder_lock as lock; {place}; lock.SHOWN_WITHIN_S = 1;")
    command = ["quantize", str(tiny), "--scheme", "int4:g32", "--out", "out", *MESH]
    with started(command, command, before=before) as processes:
        results = ended(processes, seconds=60)
    for code, _, error in results:
        assert code == 2, error
        assert "out.unfinished: " in error
        assert "does not see there what process 0 wrote 1 s ago: choose an --out in a folder that all hosts" in error


def test_options_that_do_not_belong_together_are_refused() -> None:
    for options, message in (
        ({"coordinator": "host:1"}, "belong together"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "write HOST:PORT"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "process 2 of 2: they are counted from 0"),
        ({"distributed": "auto", "coordinator": "h:1", "processes": 2, "process": 0}, "leave --coordinator out"),
        ({"heartbeat_timeout": 0}, "at least 1 second"),
    ):
        with pytest.raises(InputError, match=message):
            ProcessOptions(**options)  # pyright: ignore[reportArgumentType]
    assert not ProcessOptions().asked_for


@pytest.mark.slow
def test_quantization_over_two_processes_outlives_a_kill(tmp_path: Path) -> None:
    """One is killed: the other ends with an error within a minute. The same command goes on, to the same bits."""
    deep = dataclasses.replace(CONFIG, num_layers=4)
    save(Decoder(deep, rngs=nnx.Rngs(0)), tmp_path / "deep", tokenizer=byte_tokenizer())
    options = ["--scheme", "int4:g32", "--method", "gptq", "--calibration-windows", "4", "--window", "64"]
    options = [*options, "--batch", "2", "--spill"]

    def command(out: str) -> list[str]:
        return ["quantize", str(tmp_path / "deep"), "--out", str(tmp_path / out), *options]

    with started(*[[*command("whole"), *MESH]] * 2) as processes:
        results = ended(processes, seconds=600)
    assert [code for code, _, _ in results] == [0, 0], results
    assert main(command("alone")) == 0
    whole, alone = open_native(tmp_path / "whole"), open_native(tmp_path / "alone")
    assert set(whole.names) == set(alone.names)
    for name in whole.names:
        one, other = whole.read(name), alone.read(name)
        if isinstance(one, QTensor):
            assert isinstance(other, QTensor)
            assert np.mean(np.asarray(one.codes()) != np.asarray(other.codes())) < 0.005
    for victim in (1, 0):
        out = f"killed-{victim}"
        with started(*[[*command(out), *MESH]] * 2) as processes:
            first_part = tmp_path / f".{out}.unfinished" / "parts" / "block-0000.json"
            deadline = time.monotonic() + 300
            while not first_part.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            processes[victim].kill()
            began = time.monotonic()
            _, error = processes[1 - victim].communicate(timeout=60)
            assert processes[1 - victim].returncode == 2
            assert "contact with another process of this run was lost" in error.splitlines()[-1]
            assert time.monotonic() - began < 60
        assert first_part.exists()
        assert not (tmp_path / out).exists()
        with started(*[[*command(out), *MESH]] * 2) as processes:
            results = ended(processes, seconds=600)
        assert [code for code, _, _ in results] == [0, 0], results
        assert open_native(tmp_path / out).sha256 == whole.sha256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scheme"), [("awq", "int4:g32"), ("smoothquant@int8:token", "int8:channel"), ("hqq", "int4:g32:asym")]
)
def test_other_methods_over_two_processes(method: str, scheme: str, tiny: Path, tmp_path: Path) -> None:
    """Scales that are searched on data in two places, and a solver without data: as one process finds them."""
    options = ["--scheme", scheme, "--method", method, "--calibration-windows", "4", "--window", "64", "--batch", "2"]
    command = ["quantize", str(tiny), *options, "--out"]
    with started(*[[*command, str(tmp_path / "two"), *MESH]] * 2) as processes:
        results = ended(processes)
    assert [code for code, _, _ in results] == [0, 0], results
    assert main([*command, str(tmp_path / "one")]) == 0
    two, one = open_native(tmp_path / "two"), open_native(tmp_path / "one")
    assert set(two.names) == set(one.names)
    found, expected = (json.loads((tmp_path / name / "coverage.json").read_text())["layers"] for name in ("two", "one"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["path"] == theirs["path"]
        # Of scales that are as good as each other another may be found best; inputs in 8 bits turn ties over.
        assert ours["error"] == pytest.approx(theirs["error"], rel=0.15 if method == "awq" else 0.05)
    for name in one.names if method == "hqq" else ():
        for each, other in zip(jax.tree.leaves(two.read(name)), jax.tree.leaves(one.read(name)), strict=True):
            one_part, two_part = np.asarray(other), np.asarray(each)
            if one_part.dtype == np.uint8:
                assert np.mean(one_part != two_part) < 0.005
            else:
                np.testing.assert_allclose(two_part, one_part, rtol=1e-5)


@pytest.mark.slow
def test_training_over_two_processes(tiny: Path, tmp_path: Path) -> None:
    """Masters, moments and states in parts on both; the model that comes of it predicts as one process's does."""
    options = ["--recipe", "int3-g64-lsq", "--window", "32", "--windows", "16", "--steps", "4", "--batch", "4"]
    options = [
        *options,
        "--checkpoint-every",
        "2",
        "--eval-text",
        "pydoc",
        "--eval-window",
        "32",
        "--eval-windows",
        "4",
    ]
    command = ["qat", str(tiny), *options, "--mesh", "data=2,fsdp=2", "--out", str(tmp_path / "two")]
    with started(command, command) as processes:
        results = ended(processes, seconds=600)
    assert [code for code, _, _ in results] == [0, 0], results
    assert main(["qat", str(tiny), *options, "--out", str(tmp_path / "one")]) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 4
    for one, two in zip(*[[json.loads(line) for line in each] for each in lines], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
