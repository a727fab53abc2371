"""jquant diagnose: from a budget to a recipe that quantizes, and from a damaged checkpoint to the layer at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jquant.cli import main
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.evaluation.diagnose_config import DiagnoseConfig
from jquant.models.save import save
from jquant.nn.surgery import module_at
from jquant.ptq.rtn import quantize_layers
from tests.jitted import quantize
from tests.tiny_checkpoint import byte_tokenizer, tiny_model, write

SMALL = ["--window", "48", "--windows", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("model") / "tiny"))


def test_a_budget_becomes_a_recipe_that_quantizes(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "mix.yaml", tmp_path / "d"
    words = ["--bits", "4.6", "--schemes", "int3:g32:fp16,int4:g32:fp16,int6:g32:fp16", "--scheme", "int4:g32:fp16"]
    assert main(["diagnose", source, *words, *SMALL, "--recipe-out", str(recipe), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Best for the budget: 4.5" in said or "Best for the budget: 4.6" in said
    record = json.loads((out / "diagnosis.json").read_text())
    assert len(record["layers"]) == len(record["outliers"]) == 14
    assert record["variants"][0]["scheme"] == "int4:g32:fp16"
    page = (out / "diagnosis.html").read_text()
    assert page.count("<rect") == 3 * 14
    assert "<script" not in page
    assert main(["quantize", source, "--recipe", str(recipe), "--out", str(tmp_path / "q")]) == 0
    coverage = json.loads((tmp_path / "q" / "coverage.json").read_text())
    chosen = {layer["path"]: layer["scheme"] for layer in coverage["layers"]}
    assert chosen == record["allocation"]["schemes"]
    sizes = {layer["path"]: layer["shape"][0] * layer["shape"][1] for layer in coverage["layers"]}
    held = sum(layer["bits_per_weight"] * sizes[layer["path"]] for layer in coverage["layers"])
    assert held / sum(sizes.values()) == pytest.approx(record["allocation"]["bits_per_weight"])
    assert record["allocation"]["bits_per_weight"] <= 4.6


def test_a_damaged_layer_of_a_checkpoint_is_named(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    quantize_layers(model, scheme("int4:g32"))
    original: Any = module_at(tiny_model(), "blocks.1.mlp.up_proj")
    layer: Any = module_at(model, "blocks.1.mlp.up_proj")
    layer.weight.set_value(quantize(4 * original.weight.get_value(), scheme("int4:g32")))
    save(model, tmp_path / "q", tokenizer=byte_tokenizer(), note="")
    assert main(["diagnose", str(tmp_path / "q"), "--reference", source, *SMALL]) == 0
    said = capsys.readouterr().out
    assert "[gibberish] blocks.1.mlp.up_proj: wrong scale" in said
    assert "blocks.0.mlp.up_proj: wrong scale" not in said
    assert "[accuracy loss] blocks.1.mlp.up_proj: one layer" in said
    assert main(["diagnose", str(tmp_path / "q"), *SMALL]) == 2
    assert "give --reference" in capsys.readouterr().err


def test_a_recipe_needs_a_budget(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="--recipe-out needs a budget"):
        DiagnoseConfig(model=source, recipe_out=Path("x.yaml"))
    with pytest.raises(InputError, match="a budget is for a float model"):
        DiagnoseConfig(model=source, bits=4.0, reference=source)
    assert main(["diagnose", source, "--bits", "2.5", "--schemes", "int3:g32", "--scheme", "int4:g32", *SMALL]) == 2
    assert "the smallest schemes take" in capsys.readouterr().err
