"""Ranges of static inputs: what is clipped, what that costs, and how a recipe asks for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.qtensor import dequantize
from jquant.core.scheme import scheme
from jquant.nn.surgery import module_at
from jquant.nn.w8a8 import quantize_input
from jquant.ptq.pipeline import quantize_model
from jquant.ptq.recipe import Recipe, Rule, Step
from jquant.ptq.static_ranges import RANGES, parameters
from tests.ptq.test_pipeline import BATCHES
from tests.tiny_checkpoint import tiny_model

X = jax.random.normal(jax.random.key(0), (4, 64, 32)).at[0, 3, 5].set(-40.0)
WAYS: dict[str, dict[str, Any]] = {"minmax": {}, "percentile": {"percent": 99.9}, "mse": {}}


def _scale(way: str, calls: Any, spec: str = "int4:tensor") -> jax.Array:
    config = type(RANGES[way].config)(**WAYS[way])
    return parameters(calls, scheme(spec), way, config)[0]


def _error(scale: jax.Array) -> float:
    rows = X.reshape(-1, 32)
    return float(jnp.mean((dequantize(quantize_input(rows, scheme("int4:tensor"), scale)) - rows) ** 2))


def test_outliers_set_only_the_whole_range() -> None:
    scales = {way: _scale(way, [(x, None) for x in X]) for way in WAYS}
    magnitudes = np.sort(np.abs(np.asarray(X)).ravel())
    assert scales["minmax"] == np.float32(40) / np.float32(7.5)
    rank = magnitudes[int(np.ceil(0.999 * magnitudes.size)) - 1]
    assert rank / 7.5 <= scales["percentile"] <= (rank + 2 * 40 / 2048) / 7.5
    assert max(_error(scales["mse"]), _error(scales["percentile"])) < _error(scales["minmax"]) / 2
    finer = [_error(jnp.float32(40 / 7.5 * (1 - i / 100))) for i in range(100)]
    assert _error(scales["mse"]) == pytest.approx(min(finer), rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_masked_counts_for_nothing(way: str) -> None:
    mask = jnp.arange(64) != 3
    kept = jnp.concatenate([X[:, :3], X[:, 4:]], axis=1)
    assert _scale(way, [(x, mask) for x in X]) == _scale(way, [(x, None) for x in kept])


def test_a_rule_says_which() -> None:
    def scale(way: str) -> float:
        model, _ = quantize_model(tiny_model(), _recipe(Step(way, tuple(WAYS[way].items()))), BATCHES)
        return float(module_at(model, "blocks.0.mlp.down_proj").input_scale.get_value())  # type: ignore[attr-defined]

    scales = {way: scale(way) for way in WAYS}
    assert scales["percentile"] < scales["minmax"]
    assert scales["mse"] < scales["minmax"]
    assert scales["mse"] != scales["percentile"]


def _recipe(way: Step, activation: str | None = "int8:tensor") -> Recipe:
    return Recipe(
        rules=(Rule(layers=(r"^blocks\.",), scheme="int8:channel", activation=activation, activation_range=way),)
    )


@pytest.mark.parametrize("way", [Step("minmax"), Step("mse"), Step("percentile", (("percent", 99.5),))])
def test_recipes_go_to_json_and_back(way: Step) -> None:
    recipe = _recipe(way)
    assert Recipe.from_json(recipe.as_json(), "here") == recipe
    assert ("activation_range" in recipe.as_json()["rules"][0]) == (way != Step("minmax"))


@pytest.mark.parametrize(
    ("way", "activation", "message"),
    [
        (Step("mean"), "int8:tensor", "activation_range 'mean': unknown; there are minmax, percentile, mse"),
        (Step("mse"), "int8:token", "static activations, as int8:tensor; they are in int8:token"),
        (Step("mse"), None, "they are none"),
        (Step("mse"), "int8:tensor:asym", "without zero points; use minmax"),
        (Step("percentile", (("percent", 0.0),)), "int8:tensor", r"percent 0.0: it must be in \(0, 100\]"),
        (Step("percentile", (("percentage", 99.0),)), "int8:tensor", "unknown option 'percentage'; there are percent"),
    ],
)
def test_refused(way: Step, activation: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _recipe(way, activation)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_are_nan_are_named(way: str) -> None:
    with pytest.raises(InputError, match="its input: activations hold a NaN"):
        _scale(way, [(X[0].at[0, 0].set(jnp.nan), None)])
