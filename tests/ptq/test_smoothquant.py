"""SmoothQuant: its formula in numpy; the losses it reports are those of the block that was folded and quantized."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.models.decoder import Decoder
from jquant.nn.protocol import Equivalence, apply
from jquant.nn.w8a8 import w8a8_layer
from jquant.ptq import smoothquant, trial
from jquant.ptq.fold import fold, weight_at
from jquant.ptq.pipeline import quantize_model
from jquant.ptq.recipe import Recipe, Rule, Step
from jquant.ptq.smoothquant import Pair, SmoothQuantConfig
from tests.ptq.places import PARENTS, TOKENS, captured, loss_after_folding, model_with_outliers, place_of, quantized
from tests.ptq.test_pipeline import BATCHES
from tests.tiny_checkpoint import tiny_model

INT8 = Pair(scheme("int8:channel"), scheme("int8:token"))
SEARCH = SmoothQuantConfig(alpha="search", grid=4, search_tokens=10**6)


def _absmax(calls: list[Any]) -> np.ndarray:
    return np.max([np.abs(x).reshape(-1, x.shape[-1]).max(axis=0) for x, *_ in calls], axis=0)


def _packed(layer: Any) -> nnx.Module:
    return w8a8_layer(layer, quantized(layer.weight.get_value(), INT8.weight), activation=INT8.activation)


def _pairs(place: Equivalence) -> dict[str, Pair]:
    return dict.fromkeys(place.consumers, INT8)


def test_the_formula(model: Decoder) -> None:
    absmax = np.random.default_rng(0).uniform(0, 4, 64).astype(np.float32)
    absmax[[3, 9]] = 0, 1e-20
    place, block = place_of(model, "mlp"), model.blocks[0]
    found = smoothquant.search(
        block, place, jnp.asarray(absmax), _pairs(place), config=SmoothQuantConfig(alpha=0.7)
    ).scales
    weights = [np.asarray(weight_at(block, path)) for path in place.consumers]
    columns = np.abs(np.concatenate(weights)).max(axis=0)
    expected = np.maximum(absmax**0.7 / columns**0.3, 1e-5)
    expected[3] = 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("parent", PARENTS)
def test_losses_are_those_of_the_folded_block(model: Decoder, inputs: dict[str, list[Any]], parent: str) -> None:
    place = place_of(model, parent)
    absmax = jnp.asarray(_absmax(inputs[parent]))
    found = smoothquant.search(model.blocks[0], place, absmax, _pairs(place), inputs[parent], config=SEARCH)
    ones = jnp.ones_like(found.scales)
    for scales, reported in ((found.scales, found.after), (ones, found.before)):
        real = loss_after_folding(model, place, scales, _packed, inputs[parent])
        assert float(reported) == pytest.approx(real, rel=0.02)
    assert float(found.after) < 0.5 * float(found.before)
    fixed = smoothquant.search(model.blocks[0], place, absmax, _pairs(place), inputs[parent])
    assert float(fixed.choice) == 0.5
    assert float(found.after) <= float(fixed.after) * 1.001


def test_a_whole_model_gains_and_its_floats_stay(model: Decoder, inputs: dict[str, list[Any]]) -> None:
    block, context = nnx.clone(model.blocks[0]), model.contexts(24)[0]
    x = apply(model.embed, TOKENS[0])
    before = np.asarray(apply(block, x, context))
    for place in model.equivalences():
        absmax = jnp.asarray(_absmax(inputs[place.parent]))
        fold(block, place, smoothquant.search(block, place, absmax, _pairs(place)).scales)
    np.testing.assert_allclose(apply(block, x, context), before, rtol=0, atol=1e-4 * np.abs(before).max())


def test_experts_have_scales_of_their_own() -> None:
    model = model_with_outliers(num_experts=3, experts_per_token=2)
    inputs = captured(model)
    calls, place = inputs["mlp.down_proj"], place_of(model, "mlp.down_proj")
    absmax = np.zeros((3, 96), np.float32)
    for x, counts in calls:
        rows = np.split(np.abs(np.asarray(x)), np.cumsum(counts)[:-1])
        absmax = np.maximum(absmax, [part.max(axis=0, initial=0) for part in rows])
    found = smoothquant.search(model.blocks[0], place, jnp.asarray(absmax), _pairs(place), calls, config=SEARCH)
    assert found.scales.shape == (3, 96)
    real = loss_after_folding(model, place, found.scales, _packed, calls)
    assert float(found.after) == pytest.approx(real, rel=0.02)
    assert float(found.after) < 0.5 * float(found.before)
    shared = place_of(model, "mlp")
    calls = inputs["mlp"]
    found = smoothquant.search(
        model.blocks[0], shared, jnp.asarray(_absmax(calls)), _pairs(shared), calls, config=SEARCH
    )
    assert found.scales.shape == (64,)
    by_expert = jnp.stack([jnp.asarray(_absmax(calls)) * share for share in (0.5, 1.0, jnp.nan)])
    pairs, fixed = _pairs(shared), SmoothQuantConfig(alpha=float(found.choice))
    again = smoothquant.search(model.blocks[0], shared, by_expert, pairs, config=fixed)
    np.testing.assert_allclose(again.scales, found.scales, rtol=1e-6)
    assert float(found.after) == pytest.approx(
        loss_after_folding(model, shared, found.scales, _packed, calls), rel=0.02
    )


def test_static_activations_can_be_searched_for(model: Decoder, inputs: dict[str, list[Any]]) -> None:
    place = place_of(model, "mlp")
    pairs = dict.fromkeys(place.consumers, Pair(scheme("int8:channel"), scheme("int8:tensor")))
    absmax = jnp.asarray(_absmax(inputs["mlp"]))
    found = smoothquant.search(model.blocks[0], place, absmax, pairs, inputs["mlp"], config=SEARCH)
    assert float(found.after) < 0.5 * float(found.before)


def test_blocks_share_one_program(model: Decoder, inputs: dict[str, list[Any]]) -> None:
    place, compiled = place_of(model, "attn"), trial._output_errors  # type: ignore[attr-defined]
    absmax = jnp.asarray(_absmax(inputs["attn"]))
    smoothquant.search(model.blocks[0], place, absmax, _pairs(place), inputs["attn"], config=SEARCH)
    before = compiled._cache_size()  # type: ignore[attr-defined]
    smoothquant.search(model.blocks[1], place, absmax * 2, _pairs(place), inputs["attn"], config=SEARCH)
    assert compiled._cache_size() == before  # type: ignore[attr-defined]


def test_options_that_pass_over_all_places_are_refused() -> None:
    step = Step("smoothquant", (("places", "norms"), ("alpha", 0.5)))
    rule = Rule(layers=("down_proj",), scheme="int8:channel", activation="int8:token", transforms=(step,))
    with pytest.raises(InputError, match=r"smoothquant on blocks.0.mlp.down_proj: its options, .*'norms'.*, pass over"):
        quantize_model(tiny_model(), Recipe(rules=(rule,)), BATCHES)


def test_places_are_chosen(model: Decoder) -> None:
    found = model.equivalences()
    norms = smoothquant.smoothed_places(model.blocks[0], found, config=SmoothQuantConfig(places="norms"))
    assert [place.producer for place in norms] == ["attn_norm", "mlp_norm"]
    assert smoothquant.smoothed_places(model.blocks[0], found, config=SEARCH) == list(found)


def test_what_does_not_fit_is_refused(model: Decoder, inputs: dict[str, list[Any]]) -> None:
    place, absmax = place_of(model, "attn"), jnp.ones(64)
    with pytest.raises(InputError, match=r"alpha 1\.5"):
        SmoothQuantConfig(alpha=1.5)
    with pytest.raises(InputError, match="grid 0"):
        SmoothQuantConfig(grid=0)
    with pytest.raises(InputError, match="attn: no captured inputs"):
        smoothquant.search(model.blocks[0], place, absmax, _pairs(place), config=SEARCH)
    with pytest.raises(InputError, match="no layer behind attn_norm"):
        smoothquant.search(model.blocks[0], place, absmax, {}, inputs["attn"], config=SEARCH)
    with pytest.raises(InputError, match=r"shape \(32,\) for attn_norm: it must be \(64,\)"):
        smoothquant.search(model.blocks[0], place, jnp.ones(32), _pairs(place))
    (x, context), *_ = inputs["attn"]
    odd = [(x, context), (x[:, :10], model.contexts(10)[0])]
    with pytest.raises(InputError, match="differ in shape"):
        smoothquant.search(model.blocks[0], place, absmax, _pairs(place), odd, config=SEARCH)
