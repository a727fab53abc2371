"""From words to a recommendation: models by file, name and size, the user's own sweep, and results of another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jquant.cli import main
from jquant.core.errors import InputError
from jquant.hardware.recommend_config import RecommendConfig
from jquant.models.hf_config import config_to_hf
from jquant.recommendation_run import describe_model, read_sweep, recommend_for
from jquant.sweep.config import SweepConfig
from jquant.sweep.run import run_sweep
from tests.tiny_checkpoint import CONFIG, tiny_model, write

PARAMETERS = 2 * (64 * 16 * 12 + 3 * 64 * 96) + 2 * 257 * 64 + 5 * 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def results(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "sweep"
    run_sweep(
        SweepConfig(model=model, schemes=("int8:channel", "int4:g32"), out=out, window=64, windows=2, report=False)
    )
    return out


def config(model: str, **changes: Any) -> RecommendConfig:
    values = {"model": model, "device": "h100-sxm", "prompt": 64, "output": 8}
    return RecommendConfig(**{**values, **changes})


def test_models_by_folder_config_name_and_size(model: str, tmp_path: Path) -> None:
    assert describe_model(model).shape.parameters == PARAMETERS
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_to_hf(CONFIG, dtype="float32")))
    for words in (str(file), str(tmp_path)):
        assert describe_model(words).shape.parameters == PARAMETERS
    for words in ("llama-3-8b", "8B"):
        assert describe_model(words).shape.name == "llama-3-8b"
    with pytest.raises(InputError, match=r"'llama-3-7b' is no file.*did you mean .*llama-3-70b.*Known are"):
        describe_model("llama-3-7b")
    with pytest.raises(InputError, match="family 'x' is unknown"):
        describe_model("8B", family="x")


def test_the_users_own_losses_are_taken(model: str, results: Path) -> None:
    found = recommend_for(config(model, results=results, max_loss=1e6))
    sweep = read_sweep(results)
    expected = {cell.scheme: 100 * (cell.perplexity / sweep.reference.perplexity - 1) for cell in sweep.cells}
    assert set(expected) == {"int8:channel", "int4:g32"}
    for option in found.options:
        if option.candidate.scheme != "float":
            assert option.loss.percent == pytest.approx(expected[option.candidate.scheme])
            assert f"measured in {results}" in option.loss.source
    assert len(found.options) == 3
    why = {each.candidate.scheme: each.reasons for each in found.rejections}
    assert why["nf4:g64:dq"] == ("its loss is not known",)  # the prior is not mixed with the user's own


def test_results_of_another_model_are_refused(results: Path, tmp_path: Path) -> None:
    from jquant.models.save import save
    from tests.tiny_checkpoint import byte_tokenizer

    other = tmp_path / "other"
    save(tiny_model(seed=1), other, tokenizer=byte_tokenizer(), note="other weights")
    with pytest.raises(InputError, match="is a sweep of another model: tiny"):
        recommend_for(config(str(other), results=results))
    with pytest.raises(InputError, match="is a sweep of tiny, and llama-3-8b is asked about"):
        recommend_for(config("llama-3-8b", results=results))


def test_results_that_are_none(model: str, results: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder of a sweep: there is no sweep\.json"):
        recommend_for(config(model, results=tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(results, broken)
    files = {json.loads(file.read_text())["scheme"]: file for file in (broken / "cells").glob("*.json")}
    record = json.loads(files["int4:g32"].read_text())
    for value in (-1.0, 0.0, float("nan")):
        files["int4:g32"].write_text(json.dumps({**record, "perplexity": value}))
        with pytest.raises(InputError, match="of int4:g32 is no measurement"):
            read_sweep(broken)
    files["int4:g32"].unlink()
    assert len(read_sweep(broken).cells) == 1
    files["float"].unlink()
    with pytest.raises(InputError, match="the float reference has not been measured yet"):
        read_sweep(broken)
    (broken / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match="is not a sweep of this version"):
        read_sweep(broken)


def test_the_command(model: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recommend", "70B", "--device", "h100-sxm", "--devices", "2", "--json"]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["model"]["name"], record["devices"]) == ("llama-3-70b", 2)
    assert record["options"][0]["prefill_seconds"] > 0
    options = ["--schemes", "fp8_e4m3:channel by rtn@fp8_e4m3:token,int8:channel by smoothquant@int8:token"]
    assert main(["recommend", "llama-3-8b", "--device", "a100-80gb", *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Take int8:channel by smoothquant@int8:token" in said
    assert "a100-80gb does not multiply fp8 but int8, int4" in said
    # without --device this machine is measured; the tiny model fits anywhere
    assert main(["recommend", model, "--results", str(results), "--prompt", "64", "--output", "8"]) == 0
    assert "on 1 × local" in " ".join(capsys.readouterr().out.split())
    for words, message in [
        (["llama-3-8b", "--device", "h100"], "did you mean h100-sxm or h100-pcie"),
        (["llama-3-8b", "--device", "xeon-8480"], "say how much with --memory"),
        (["llama-3-8b", "--device", "h200", "--schemes", "int4:z"], "scheme 'int4:z'"),
        (["llama-3-8b", "--device", "h200", "--cache", "int9"], "unknown element 'int9'"),
        ([model, "--device", "h200", "--prompt", "600"], "exceed the 512"),
    ]:
        assert main(["recommend", *words]) == 2
        assert message in capsys.readouterr().err
