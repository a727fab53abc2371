"""Recipes: round trips through YAML and JSON, which rule decides, presets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jquant.core.errors import InputError
from jquant.ptq.presets import PRESETS, calibrated, find_recipe, preset, recommended
from jquant.ptq.recipe import Recipe, Rule, Step, assign, one_rule, read_recipe, to_yaml

LAYERS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHAPES = {f"blocks.{i}.{layer}": (512, 512) for i in range(16) for layer in LAYERS} | {"embed": (1000, 512)}
PATHS = list(SHAPES)

MIXED = Recipe(
    rules=(
        Rule(layers=(r"blocks\.0\.",), scheme=None),
        Rule(layers=(r"down_proj$",), scheme="int8:channel", activation="int8:token"),
        Rule(
            layers=(r"^blocks\.",),
            scheme="int4:g128:asym",
            method=Step("gptq", (("damping", 0.02), ("act_order", "none"))),
            transforms=(Step("awq", (("grid", 10),)),),
        ),
    )
)


@pytest.mark.parametrize(
    "recipe", [MIXED, one_rule("awq+gptq", "int4:g64:asym"), *(preset(n, SHAPES) for n in PRESETS)]
)
def test_recipes_come_back_from_files(recipe: Recipe, tmp_path: Path) -> None:
    assert Recipe.from_json(json.loads(json.dumps(recipe.as_json())), "x") == recipe
    for name, text in (("r.yaml", to_yaml(recipe)), ("r.json", json.dumps(recipe.as_json()))):
        (tmp_path / name).write_text(text)
        assert read_recipe(tmp_path / name) == recipe
        assert find_recipe(str(tmp_path / name), SHAPES) == recipe


def test_the_first_rule_that_matches_decides() -> None:
    chosen = assign(MIXED, PATHS)
    assert not any(path.startswith("blocks.0.") or path == "embed" for path in chosen)
    assert chosen["blocks.3.mlp.down_proj"] is MIXED.rules[1]
    assert chosen["blocks.3.attn.q_proj"] is MIXED.rules[2]
    assert list(chosen) == [path for path in PATHS if path in chosen]


def test_short_recipes() -> None:
    assert one_rule("gptq", "int4:g64").rules[0].method == Step("gptq")
    awq = one_rule("awq", "int4:g64").rules[0]
    assert (awq.method, awq.transforms) == (Step("rtn"), (Step("awq"),))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"rules": []}, "has no rules"),
        ({"rule": []}, "one field, rules"),
        ({"rules": [{"layers": ["x"]}]}, "rule 1: field scheme is missing"),
        ({"rules": [{"layers": ["x"], "scheme": "int4", "methode": "rtn"}]}, "unknown field 'methode'"),
        ({"rules": [{"layers": ["x"], "methode": "rtn", "bits": 4}]}, "unknown field 'methode', 'bits'; there are"),
        ({"rules": [{"layers": ["x"], "scheme": "int99"}]}, "rule x: .*int99"),
        ({"rules": [{"layers": ["x"], "scheme": "int4", "method": "gtpq"}]}, "unknown; there are rtn"),
        (
            {"rules": [{"layers": ["x"], "scheme": "int4", "method": {"gptq": {"dumping": 1}}}]},
            "unknown option 'dumping'",
        ),
        ({"rules": [{"layers": ["x"], "scheme": "int4", "method": {"gptq": {"damping": -1}}}]}, "must be positive"),
        (
            {"rules": [{"layers": ["x"], "scheme": "int4", "method": {"gptq": {"block": 1.5}}}]},
            "GPTQ block 1.5: it must be an integer",
        ),
        ({"rules": [{"layers": ["x"], "scheme": "int4", "transforms": ["awk"]}]}, "unknown; there are awq"),
        ({"rules": [{"layers": [], "scheme": "int4"}]}, "names no layers"),
        ({"rules": [{"layers": ["x"], "scheme": None, "method": "gptq"}]}, "has no scheme"),
        ({"rules": [{"layers": ["x"], "scheme": 4}]}, "scheme is 4"),
    ],
)
def test_bad_recipes_say_what_is_wrong(record: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.from_json(record, "file.yaml")


def test_rules_that_do_nothing_are_errors() -> None:
    with pytest.raises(InputError, match="matches nothing"):
        assign(one_rule("rtn", "int4:g64", layers=("blokcs",)), PATHS)
    shadowed = Recipe(
        rules=(Rule(layers=("^blocks",), scheme="int4:g64"), Rule(layers=("down_proj",), scheme="int8:channel"))
    )
    with pytest.raises(InputError, match="rule down_proj: earlier rules take all 16"):
        assign(shadowed, PATHS)
    with pytest.raises(InputError, match="leaves every layer alone"):
        assign(Recipe(rules=(Rule(layers=(".",), scheme=None),)), PATHS)


def test_the_medium_mix_is_llama_cpp_s() -> None:
    """use_more_bits(i, 16): the first and last two blocks and every third between, as llama.cpp gives them."""
    chosen = assign(preset("q4_k_m", SHAPES), PATHS)
    more = [i for i in range(16) if chosen[f"blocks.{i}.attn.v_proj"].scheme == "q6_k"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert [i for i in range(16) if chosen[f"blocks.{i}.mlp.down_proj"].scheme == "q6_k"] == more
    assert chosen["blocks.0.attn.q_proj"].scheme == "q4_k"
    assert chosen["embed"].scheme == "q6_k"  # tied: it is the output projection
    narrow = assign(preset("q4_k_m", dict.fromkeys(PATHS, (576, 576))), PATHS)
    assert {rule.scheme for rule in narrow.values()} == {"q5_0", "q8_0"}
    untied = SHAPES | {"head.lm_head": (1000, 512)}
    chosen = assign(preset("q4_k_m", untied), list(untied))
    assert (chosen["head.lm_head"].scheme, chosen["embed"].scheme) == ("q6_k", "q4_k")


def test_presets_and_their_calibration() -> None:
    with pytest.raises(InputError, match="neither a file nor a preset of quantize, which are gptq-int4-g128"):
        find_recipe("gptq-int5", SHAPES)
    assert {name for name in PRESETS if calibrated(preset(name, SHAPES))} == {
        "gptq-int4-g128",
        "gptq-int3-g64",
        "awq-int4-g128",
        "awq-gptq-int4-g128",
        "smoothquant-w8a8",
    }
    assert recommended(preset("smoothquant-w8a8", SHAPES)).text == "pile"
    assert recommended(preset("awq-gptq-int4-g128", SHAPES)).text == "openplatypus"
