"""AWQ: its formulas in numpy; the losses it reports are those of the block that was folded and quantized."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.calib import gram
from jquant.calib.gram import Gram
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.models.decoder import Decoder
from jquant.ptq import awq, gptq, trial
from jquant.ptq.awq import AWQConfig
from jquant.ptq.fold import weight_at
from tests.jitted import dequantize
from tests.ptq.places import PARENTS, captured, loss_after_folding, model_with_outliers, place_of, quantized, rounded

SCHEME = scheme("int4:g16:asym")
CONFIG = AWQConfig(grid=8, search_tokens=10**6)
RNG = np.random.default_rng(0)
X = (RNG.standard_normal((500, 80)) * np.exp(RNG.standard_normal(80)) @ RNG.standard_normal((80, 80))).astype(
    np.float32
)
W = RNG.standard_normal((24, 80)).astype(np.float32)


def _rows(calls: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x, *_ in calls])


def _gram(rows: np.ndarray) -> Gram:
    return gram.finalize(gram.update(gram.init(rows.shape[-1]), jnp.asarray(rows)))


def _packed(layer: Any) -> nnx.Module:
    return layer.packed(quantized(layer.weight.get_value(), SCHEME))


def _search(model: Decoder, parent: str, calls: list[Any], config: AWQConfig = CONFIG) -> Any:
    place, rows = place_of(model, parent), _rows(calls)
    absmean = jnp.asarray(np.abs(rows).mean(axis=0))
    schemes = dict.fromkeys(place.consumers, SCHEME)
    given: Any = {"gram": _gram(rows)} if parent in place.consumers else {"inputs": calls}
    return awq.search(model.blocks[0], place, absmean, schemes, config=config, **given)


@pytest.mark.parametrize("duo", [True, False])
def test_the_formula(duo: bool) -> None:
    """As in AutoAWQ, with scales of 1 before."""
    mean = np.abs(X).mean(axis=0)
    relative = np.abs(W).reshape(24, 5, 16)
    relative = (relative / (relative.max(axis=2, keepdims=True) + 1e-6)).reshape(24, 80).mean(axis=0)
    scales = awq._candidates(
        jnp.asarray(mean), (jnp.asarray(W[:9]), jnp.asarray(W[9:])), (SCHEME, SCHEME), AWQConfig(duo_scaling=duo)
    )
    np.testing.assert_array_equal(scales[0], 1)
    for index in range(20):
        ratio = index / 20
        expected = mean**ratio / (relative ** (1 - ratio) + 1e-4) if duo else mean**ratio
        expected = np.maximum(expected, 1e-4)
        expected /= np.sqrt(expected.max() * expected.min())
        np.testing.assert_allclose(scales[index + 1], expected, rtol=1e-4)


def test_channels_without_data_keep_their_scale() -> None:
    mean = jnp.asarray(np.where(np.arange(80) < 70, 1 + np.arange(80.0), 0))
    scales = np.asarray(awq.awq_scales(mean, None, 0.5))
    np.testing.assert_array_equal(scales[70:], 1)
    np.testing.assert_allclose(scales[:70], np.asarray(awq.awq_scales(mean[:70], None, 0.5)), rtol=1e-6)
    np.testing.assert_array_equal(awq.awq_scales(jnp.zeros(80), None, 0.5), 1)


@pytest.mark.parametrize("parent", PARENTS)
def test_losses_are_those_of_the_folded_block(model: Decoder, inputs: dict[str, list[Any]], parent: str) -> None:
    """With the Gram matrix where the parent is the layer, on captured inputs elsewhere."""
    found, place = _search(model, parent, inputs[parent]), place_of(model, parent)
    for scales, reported in ((found.scales, found.after), (jnp.ones_like(found.scales), found.before)):
        real = loss_after_folding(model, place, scales, _packed, inputs[parent])
        assert float(reported) == pytest.approx(real, rel=0.02)
    assert float(found.after) < 0.8 * float(found.before)
    assert 0 <= float(found.choice) < 1


def test_before_gptq_the_scales_are_those_with_which_it_loses_least(
    model: Decoder, inputs: dict[str, list[Any]]
) -> None:
    """Of all layers that read the input together; found again from codes and inputs."""
    place = place_of(model, "attn")
    rows = _rows(inputs["attn"])
    gram, schemes = _gram(rows), dict.fromkeys(place.consumers, SCHEME)
    absmean = jnp.asarray(np.abs(rows).mean(axis=0))
    config = AWQConfig(solved_grid=3)
    found = awq.search(model.blocks[0], place, absmean, schemes, gram=gram, solved=True, config=config)
    weights = [np.asarray(weight_at(model.blocks[0], path)) for path in place.consumers]

    def real(scales: np.ndarray) -> float:
        folded = _gram(rows / scales)
        values = [
            dequantize(gptq.solve(jnp.asarray(w * scales), folded, SCHEME).qtensor, jnp.float32) / scales
            for w in weights
        ]
        lost = sum(np.linalg.norm(rows @ (np.asarray(v) - w).T) ** 2 for v, w in zip(values, weights, strict=True))
        return float(lost / sum(np.linalg.norm(rows @ w.T) ** 2 for w in weights))

    assert float(found.before) == pytest.approx(real(np.ones(rows.shape[1])), rel=0.02)
    assert float(found.after) == pytest.approx(real(np.asarray(found.scales)), rel=0.02)
    assert float(found.after) <= float(found.before)
    assert round(3 * float(found.choice), 3) in (0, 1, 2) or np.isnan(float(found.choice))


def test_each_expert_has_a_ratio_of_its_own() -> None:
    model = model_with_outliers(num_experts=4, experts_per_token=2)
    block, place = model.blocks[0], place_of(model, "mlp.down_proj")
    calls = captured(model)["mlp.down_proj"]
    rows = [
        np.concatenate([np.split(np.asarray(x), np.cumsum(counts)[:-1])[e] for x, counts in calls]) for e in range(3)
    ]
    rows.append(np.zeros((1, 96), np.float32))  # an expert that saw nothing
    grams = [_gram(each) for each in rows]
    stacked = Gram(jnp.stack([each.matrix for each in grams]), jnp.stack([each.rows for each in grams]))
    stacked = stacked._replace(matrix=stacked.matrix.at[3].set(jnp.nan))
    absmean = jnp.asarray(np.stack([np.abs(each).mean(axis=0) for each in rows]))
    found = awq.search(block, place, absmean, {"mlp.down_proj": SCHEME}, gram=stacked, config=CONFIG)
    assert found.scales.shape == (4, 96)
    np.testing.assert_array_equal(found.scales[3], 1)
    assert np.isnan(found.choice[3])
    assert np.all(found.after[:3] < found.before[:3])
    weight = np.asarray(block.mlp.down_proj.weight.get_value())
    for expert in range(3):
        scales = np.asarray(found.scales[expert])
        values = np.asarray(rounded(jnp.asarray(weight[expert] * scales), SCHEME)) / scales
        error = np.linalg.norm(rows[expert] @ (values - weight[expert]).T) ** 2
        expected = error / np.linalg.norm(rows[expert] @ weight[expert].T) ** 2
        assert float(found.after[expert]) == pytest.approx(expected, rel=0.01)


def _group_errors(values: np.ndarray, group: int) -> np.ndarray:
    """Σ over tokens of the squared contribution of each group's error, [out, groups]."""
    starts = range(0, 80, group)
    return np.stack([np.mean(((values - W)[:, s : s + group] @ X[:, s : s + group].T) ** 2, axis=1) for s in starts], 1)


@pytest.mark.parametrize(("spec", "group"), [("int4:g16:asym", 16), ("int3:g48", 48), ("int4:channel", 80)])
def test_clipping_tries_every_range_of_every_group(spec: str, group: int) -> None:
    found = awq.clip_search(jnp.asarray(W), _gram(X), scheme(spec))
    tried, bounded = [], []
    for index in range(10):
        bounds = [np.abs(W[:, s : s + group]).max(axis=1, keepdims=True) for s in range(0, 80, group)]
        bound = np.concatenate([np.broadcast_to(b, (24, group)) for b in bounds], axis=1)[:, :80]
        bounded.append(np.clip(W, -bound * np.float32(1 - index / 20), bound * np.float32(1 - index / 20)))
        tried.append(_group_errors(np.asarray(rounded(jnp.asarray(bounded[-1]), scheme(spec))), group))
    values = np.asarray(rounded(found.weight, scheme(spec)))
    least = np.min(tried, axis=0)
    np.testing.assert_allclose(_group_errors(values, group), least, rtol=0.02, atol=1e-3 * least.max())
    assert float(found.after / found.before) == pytest.approx(least.sum() / tried[0].sum(), rel=0.02)
    assert least.sum() < 0.95 * tried[0].sum()


@pytest.mark.parametrize(
    ("rounded", "clip", "clipped"),
    [
        ((), "rounded", False),
        (("mlp.down_proj",), "rounded", True),
        ((), "all", True),
        (("mlp.down_proj",), "none", False),
    ],
)
def test_only_layers_that_are_then_rounded_are_clipped(
    model: Decoder, inputs: dict[str, list[Any]], rounded: tuple[str, ...], clip: Any, clipped: bool
) -> None:
    path, block = "mlp.down_proj", nnx.clone(model.blocks[0])
    rows, before = _rows(inputs[path]), weight_at(block, path)
    seen = awq.Seen({path: jnp.asarray(np.abs(rows).mean(axis=0))}, {path: _gram(rows)}, {})
    config = dataclasses.replace(CONFIG, clip=clip)
    (found,), grams = awq.rewrite(block, [place_of(model, path)], {path: SCHEME}, seen, rounded=rounded, config=config)
    same = np.allclose(weight_at(block, path), before * found.scales, rtol=1e-5)
    assert same != clipped
    np.testing.assert_allclose(grams[path].matrix, _gram(rows / np.asarray(found.scales)).matrix, rtol=1e-3, atol=1e-4)


def test_clipping_experts_is_clipping_each() -> None:
    stack, other = (
        jnp.asarray(np.stack([W, W[::-1] * 2])),
        X[::-1] @ np.diag(np.linspace(0.1, 2, 80).astype(np.float32)),
    )
    grams = [_gram(X), _gram(other)]
    both = Gram(jnp.stack([each.matrix for each in grams]), jnp.stack([each.rows for each in grams]))
    found = awq.clip_search(stack, both, SCHEME)
    for expert, weight in enumerate(stack):
        alone = awq.clip_search(weight, grams[expert], SCHEME)
        np.testing.assert_allclose(found.weight[expert], alone.weight, rtol=1e-6)
        assert float(found.after[expert]) == pytest.approx(float(alone.after), rel=1e-4)


def test_blocks_share_one_program(model: Decoder, inputs: dict[str, list[Any]]) -> None:
    compiled: Any = trial._output_errors
    _search(model, "mlp", inputs["mlp"])
    before = compiled._cache_size()
    place = place_of(model, "mlp")
    schemes = dict.fromkeys(place.consumers, SCHEME)
    awq.search(model.blocks[1], place, jnp.ones(64), schemes, inputs=inputs["mlp"], config=CONFIG)
    assert compiled._cache_size() == before


def test_layers_that_stay_float_take_no_part(model: Decoder, inputs: dict[str, list[Any]]) -> None:
    place, rows = place_of(model, "mlp"), _rows(inputs["mlp"])
    absmean = jnp.asarray(np.abs(rows).mean(axis=0))
    only = awq.search(model.blocks[0], place, absmean, {"mlp.up_proj": SCHEME}, inputs=inputs["mlp"], config=CONFIG)
    both = _search(model, "mlp", inputs["mlp"])
    assert float(only.before) < float(both.before)


def test_what_does_not_fit_is_refused(model: Decoder) -> None:
    block, ones = model.blocks[0], jnp.ones(64)
    with pytest.raises(InputError, match="grid 0"):
        AWQConfig(grid=0)
    with pytest.raises(InputError, match="clip 'yes'"):
        AWQConfig(clip="yes")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_shrink 0"):
        AWQConfig(max_shrink=0)
    with pytest.raises(InputError, match="no layer behind attn_norm"):
        awq.search(block, place_of(model, "attn"), ones, {}, config=CONFIG)
    with pytest.raises(InputError, match="attn: no captured inputs"):
        awq.search(block, place_of(model, "attn"), ones, {"attn.q_proj": SCHEME}, config=CONFIG)
    with pytest.raises(InputError, match=r"attn\.o_proj: its scales are searched with the Gram matrix"):
        awq.search(block, place_of(model, "attn.o_proj"), ones, {"attn.o_proj": SCHEME}, config=CONFIG)
