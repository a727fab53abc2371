"""Recipes of quantization-aware training: read, written, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jquant import qat
from jquant.core.errors import InputError
from jquant.qat.rules import PRESETS, Recipe, Rule, assign, find_recipe, one_rule, read_recipe

PATHS = ("blocks.0.mlp.up_proj", "blocks.0.mlp.down_proj", "head.lm_head")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_json(name: str) -> None:
    assert Recipe.from_json(PRESETS[name].as_json(), name) == PRESETS[name]


def test_a_file_of_rules(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "rules:\n"
        "  - {layers: [down_proj$], scheme: null}\n"
        "  - {layers: ['^blocks'], scheme: 'int3:g64', gradient: lsq, activation: 'int8:token'}\n"
    )
    recipe = find_recipe(str(path))
    assert recipe.rules[1].gradient == "lsq"
    assert list(assign(recipe, PATHS)) == ["blocks.0.mlp.up_proj"]


def test_the_first_rule_that_matches_decides() -> None:
    recipe = Recipe(
        rules=(Rule(layers=("up_proj",), scheme="int8:channel"), Rule(layers=("blocks",), scheme="nf4:g64"))
    )
    assert {path: rule.scheme for path, rule in assign(recipe, PATHS).items()} == {
        "blocks.0.mlp.up_proj": "int8:channel",
        "blocks.0.mlp.down_proj": "nf4:g64",
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule(layers=("attn",), scheme="int4"),), "'attn' matches nothing; there are 3 layers: blocks.0.mlp.up_proj"),
        ((Rule(layers=("blocks",), scheme="int4"), Rule(layers=("up_proj",), scheme="nf4")), "put it before them"),
        ((Rule(layers=("blocks",), scheme=None),), "leaves every layer alone"),
        ((Rule(layers=("(",), scheme="int4"),), "is no regular expression"),
    ],
)
def test_rules_that_do_nothing_are_refused(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        assign(Recipe(rules=rules), PATHS)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "a recipe is a mapping with one field, rules"),
        ({"rules": [{"layers": ["a"]}]}, "r.yaml: rule 1: field scheme is missing"),
        ({"rules": [{"layers": ["a"], "scheme": "int4", "bits": 4}]}, "unknown field 'bits'; there are layers, scheme"),
        ({"rules": [{"layers": ["a"], "bits": 4, "group": 8}]}, "unknown field 'bits', 'group'; there are layers"),
        ({"rules": [{"layers": 3, "scheme": "int4"}]}, "layers is 3; it must be a list of patterns"),
        ({"rules": [{"layers": ["a"], "scheme": 4}]}, "scheme is 4; it must be a spec string"),
        ({"rules": ["int4"]}, "is 'int4'; it must be a mapping"),
        ({"rules": []}, "the recipe has no rules"),
    ],
)
def test_records_that_are_no_recipe(record: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.from_json(record, "r.yaml")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"gradient": "adam"}, "gradient is 'adam'; there are clipped_ste, ste, lsq"),
        ({"scheme": "int9"}, "int9"),
        ({"activation": "int8:b8x8"}, "their scales are per token or group"),
        ({"scheme": None, "activation": "int8:token"}, "leaves layers alone, and yet one for their input"),
        ({"layers": ()}, "names no layers"),
    ],
)
def test_rules_that_do_not_go_together(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Rule(**{"layers": ("blocks",), "scheme": "int4:g32", **choices})


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a file nor a preset of qat, which are int4-g128"):
        find_recipe("int5")
    with pytest.raises(InputError, match=r"none.yaml: cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("rules: [")
    with pytest.raises(InputError, match=r"bad.yaml: is no YAML"):
        read_recipe(tmp_path / "bad.yaml")


def test_one_rule_is_of_the_blocks() -> None:
    assert list(assign(one_rule("int4:g32"), PATHS)) == list(PATHS[:2])
    assert qat.one_rule is one_rule
