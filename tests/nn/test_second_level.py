"""NVFP4's second level where layers share it: q, k and v one, gate and up another (SPEC 2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scheme import scheme
from jquant.nn.second_level import reading_together, shared_levels
from jquant.nn.surgery import module_at
from jquant.ptq.pipeline import quantize_model
from jquant.ptq.recipe import Recipe, Rule, one_rule
from tests.ptq.test_pipeline import BATCHES
from tests.tiny_checkpoint import tiny_model

NVFP4 = scheme("nvfp4")
SHARING = (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
ALONE = ("attn.o_proj", "mlp.down_proj")


def _weight(model: Any, path: str) -> Any:
    layer: Any = module_at(model, f"blocks.0.{path}")
    return layer.weight.get_value()


def _level(model: Any, path: str) -> np.ndarray:
    return _of(_weight(model, path))


def _of(q: QTensor) -> np.ndarray:
    assert q.stored.scale2 is not None
    return np.squeeze(q.stored.scale2)


@pytest.mark.parametrize("method", ["rtn", "rtn-mse", "gptq"])
def test_is_that_of_the_layers_put_together(method: str) -> None:
    floats, batches = tiny_model(), BATCHES if method == "gptq" else None
    model, _ = quantize_model(tiny_model(), one_rule(method, "nvfp4"), batches)
    for paths in (*SHARING, *((path,) for path in ALONE)):
        joined = jnp.concatenate([_weight(floats, path) for path in paths])
        expected = _of(quantize(joined, NVFP4))
        assert [_level(model, path) for path in paths] == [expected] * len(paths)
    assert _level(model, SHARING[0][0]) != _level(model, SHARING[1][0])


@pytest.mark.parametrize("through", ["layers", "recipe", "sweep"])
def test_each_rounds_as_rows_of_the_whole(through: str) -> None:
    floats, model = tiny_model(), tiny_model()
    if through == "layers":
        jquant.quantize_layers(model, NVFP4)
    elif through == "recipe":
        quantize_model(model, one_rule("rtn", "nvfp4"))
    else:
        from jquant.sweep.grid import Point
        from jquant.sweep.quantize import quantize_in_place

        paths = [f"blocks.0.{path}" for paths in SHARING for path in paths]
        quantize_in_place(model, paths, Point(scheme=NVFP4, method="rtn"), None)
    for paths in SHARING:
        whole = dequantize(quantize(jnp.concatenate([_weight(floats, path) for path in paths]), NVFP4))
        found = [_weight(model, path) for path in paths]
        rows = [dequantize(each) if isinstance(each, QTensor) else each for each in found]
        np.testing.assert_array_equal(jnp.concatenate(rows), whole)


def test_only_equal_schemes_share() -> None:
    rules = (
        Rule(layers=(r"blocks\..*k_proj",), scheme="int4:g32"),
        Rule(layers=(r"^blocks\.",), scheme="nvfp4"),
    )
    floats = tiny_model()
    model, _ = quantize_model(tiny_model(), Recipe(rules=rules))
    joined = jnp.concatenate([_weight(floats, path) for path in ("attn.q_proj", "attn.v_proj")])
    assert _level(model, "attn.q_proj") == _level(model, "attn.v_proj")
    assert _level(model, "attn.q_proj") == _of(quantize(joined, NVFP4))
    assert _weight(model, "attn.k_proj").stored.scale2 is None


def test_each_expert_has_its_own() -> None:
    gate, up = jax.random.normal(jax.random.key(0), (2, 3, 32, 64)) * jnp.arange(1.0, 4)[:, None, None]
    found = shared_levels(
        {"mlp.gate": gate, "mlp.up": up, "other.up": up}, dict.fromkeys(("mlp.gate", "mlp.up", "other.up"), NVFP4)
    )
    assert set(found) == {"mlp.gate", "mlp.up"}
    assert found["mlp.gate"].shape == (3, 1, 1)
    for expert in range(3):
        both = jnp.concatenate([gate[expert], up[expert]])
        assert found["mlp.up"][expert] == quantize(both, NVFP4).stored.scale2


def test_groups_without_data_are_those_of_the_places() -> None:
    model = tiny_model()
    paths = [path for paths in SHARING for path in paths]
    found = reading_together([*paths, *ALONE], model.equivalences())
    assert set(found) >= {*SHARING, *((path,) for path in ALONE)}
    assert sorted(path for group in found for path in group) == sorted([*paths, *ALONE])
