"""Commands on a mesh of eight devices find what one device finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jquant.cli import main
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.data.blocks import Windows, text_windows
from jquant.data.text import load_text
from jquant.evaluation.scoring import evaluate, prepare_reference
from jquant.io.native import open_native
from jquant.models.checkpoint import open_checkpoint
from jquant.models.generate import Sampling, generate
from jquant.nn.mesh import make_mesh
from jquant.ptq.recipe import Recipe, Rule, Step, one_rule
from jquant.quantization_run import quantize_checkpoint
from tests.tiny_checkpoint import byte_tokenizer, write


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("meshes") / "tiny")


@pytest.fixture(scope="module")
def packed(tiny: Path) -> Path:
    out = tiny.parent / "packed"
    quantize_checkpoint(open_checkpoint(tiny), one_rule("rtn", "int4:g32:asym"), out)
    return out


def _windows(count: int, window: int = 64) -> Windows:
    return text_windows(load_text("pydoc"), byte_tokenizer(), window=window, limit=count)


@pytest.mark.parametrize("mesh", [pytest.param("data=8", marks=pytest.mark.slow), "data=2,fsdp=2,tensor=2"])
def test_evaluation(mesh: str, tiny: Path, packed: Path) -> None:
    """Perplexity within 1e-5 of itself, divergence too; packed weights are compared with floats."""
    found = []
    for spec in ("", mesh):
        devices = make_mesh(spec)
        reference, _ = prepare_reference(open_checkpoint(tiny).model(mesh=devices), _windows(10), batch=8)
        model = open_checkpoint(packed).model(mesh=devices)
        found.append(evaluate(model, _windows(10), reference=reference, batch=8))
    alone, spread = found
    assert spread.perplexity.value == pytest.approx(alone.perplexity.value, rel=1e-5)
    assert spread.divergence.kl.value == pytest.approx(alone.divergence.kl.value, rel=1e-4)
    assert spread.divergence.top1.value == alone.divergence.top1.value


@pytest.mark.parametrize("mesh", [pytest.param("tensor=8", marks=pytest.mark.slow), "data=2,fsdp=2,tensor=2"])
def test_generation(mesh: str, packed: Path) -> None:
    prompt = np.arange(70) % 250
    for sampling in (Sampling(), Sampling(temperature=0.8, top_k=20, seed=3)):
        texts = []
        for spec in ("", mesh):
            model = open_checkpoint(packed).model(mesh=make_mesh(spec))
            texts.append(list(generate(model, prompt, max_tokens=12, sampling=sampling)))
        assert texts[0] == texts[1]


def test_quantization_over_rows(tiny: Path, packed: Path, tmp_path: Path) -> None:
    """Rows alone, by a method without data: bit for bit."""
    mesh = make_mesh("fsdp=2,tensor=4")
    quantize_checkpoint(open_checkpoint(tiny), one_rule("rtn", "int4:g32:asym"), tmp_path / "spread", mesh=mesh)
    assert open_native(tmp_path / "spread").sha256 == open_native(packed).sha256


@pytest.mark.slow
def test_gptq(tiny: Path, tmp_path: Path) -> None:
    """Gram matrices are summed in another order, which turns a code over where it is a tie: less than 1 in 200."""
    plain = Step("gptq", (("act_order", "none"), ("range", "minmax")))  # compiles in a third of the time
    recipe, windows = Recipe(rules=(Rule(layers=(r"^blocks\.",), scheme="int4:g32", method=plain),)), _windows(8)
    found = []
    for spec in ("", "data=2,fsdp=2,tensor=2"):
        out = tmp_path / f"gptq-{len(spec)}"
        coverage = quantize_checkpoint(
            open_checkpoint(tiny), recipe, out, calibration=windows, batch=4, mesh=make_mesh(spec), spill=bool(spec)
        )
        found.append((open_native(out), coverage))
    (alone, theirs), (spread, ours) = found
    for name in alone.names:
        one, other = alone.read(name), spread.read(name)
        if isinstance(one, QTensor):
            assert isinstance(other, QTensor)
            assert np.mean(np.asarray(one.codes()) != np.asarray(other.codes())) < 0.005
        else:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for layer, other in zip(theirs.layers, ours.layers, strict=True):
        assert other.error == pytest.approx(layer.error, rel=0.02)
    assert spread.description["provenance"]["mesh"] == "data=2,fsdp=2,tensor=2"


@pytest.mark.slow
def test_a_run_goes_on_on_its_own_mesh_alone(tiny: Path, tmp_path: Path) -> None:
    """And there to the same bits: states of eight devices are read back to where they were."""
    recipe, windows, out = one_rule("gptq", "int4:g32"), _windows(4), tmp_path / "out"

    def run(spec: str, stop_at: int | None = None, to: Path = out) -> None:
        def heard(event: object) -> None:
            if getattr(event, "done", None) == stop_at:
                raise KeyboardInterrupt

        mesh = make_mesh(spec)
        quantize_checkpoint(open_checkpoint(tiny), recipe, to, calibration=windows, batch=2, mesh=mesh, progress=heard)

    with pytest.raises(KeyboardInterrupt):
        run("data=2,tensor=4", stop_at=1)
    with pytest.raises(InputError, match=r'unfinished run whose mesh differs \("data=2,tensor=4" there, "" here\)'):
        run("")
    run("data=2,tensor=4")
    run("data=2,tensor=4", to=tmp_path / "whole")
    assert open_native(out).sha256 == open_native(tmp_path / "whole").sha256


@pytest.mark.slow
def test_commands(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for index, extra in enumerate(([], ["--mesh", "data=4,tensor=2"])):
        arguments = ["eval", str(tiny), "--window", "64", "--windows", "4", "--scheme", "int4:g32"]
        assert main([*arguments, "--json", str(tmp_path / f"{index}.json"), *extra]) == 0
        found.append(json.loads((tmp_path / f"{index}.json").read_text()))
    assert found[1]["perplexity"] == pytest.approx(found[0]["perplexity"], rel=1e-5)
    capsys.readouterr()
    for extra in ([], ["--mesh", "tensor=2"]):
        assert main(["generate", str(tiny), "--prompt", "The", "--max-tokens", "6", *extra]) == 0
    texts = capsys.readouterr().out.splitlines()
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]


def test_meshes_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["eval", str(tiny)], ["generate", str(tiny), "--prompt", "x"]):
        assert main([*command, "--mesh", "data=3,tensor=4"]) == 2
        assert "asks for 12 devices, there are 8" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "out")]
    assert main(["quantize", str(tiny), "--scheme", "int4:g32", "--mesh", "tensors=2", *out]) == 2
    assert "write axes of data, fsdp, tensor" in capsys.readouterr().err
