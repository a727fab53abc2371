"""Sensitivities and outliers by definition, without a program for every layer."""

from __future__ import annotations

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.data.blocks import windows
from jquant.evaluation import sensitivity
from jquant.evaluation.divergence import divergence
from jquant.evaluation.outliers import outliers
from jquant.evaluation.perplexity import perplexity
from jquant.evaluation.sensitivity import by_scheme, float_pass, mixed, sensitivities, uniform
from jquant.nn import protocol
from jquant.nn.surgery import module_at
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import tiny_model

CUT = windows(np.random.default_rng(0).integers(0, 257, 200).astype(np.int32), window=48, stride=40)
SPEC = scheme("int3:g32")


def test_each_layer_alone_by_definition() -> None:
    reference = tiny_model()
    found = list(sensitivities(reference, float_pass(reference, CUT), [SPEC]))
    assert len(found) == 14
    for each in found[3::7]:
        model = tiny_model()
        quantize_layers(model, SPEC, layers=[f"^{each.path}$"])
        assert each.kl == pytest.approx(divergence(model, reference, CUT).kl.value, rel=1e-3, abs=1e-7)
        increase = perplexity(model, CUT).nll - perplexity(reference, CUT).nll
        assert each.nll_increase == pytest.approx(increase, abs=2e-5)
        layer = module_at(model, each.path)
        assert each.bits == 8 * layer.weight.get_value().nbytes  # type: ignore[attr-defined]
    now, then = (model.blocks[0].attn.q_proj.weight.get_value() for model in (reference, tiny_model()))
    np.testing.assert_array_equal(now, then)


def test_all_layers_at_once_by_definition() -> None:
    reference, model = tiny_model(), tiny_model()
    passed = float_pass(reference, CUT)
    quantize_layers(model, SPEC)
    expected = divergence(model, reference, CUT).kl.value
    assert uniform(reference, passed, SPEC)[0] == pytest.approx(expected, rel=1e-3)
    only = {"blocks.1.mlp.down_proj": SPEC}
    alone = by_scheme(list(sensitivities(reference, passed, [SPEC], layers=list(only))))
    assert mixed(reference, passed, only)[0] == pytest.approx(alone["int3:g32"]["blocks.1.mlp.down_proj"].kl, rel=1e-5)


def test_nothing_compiles_for_a_further_layer() -> None:
    model = tiny_model()
    passed = float_pass(model, CUT)
    list(sensitivities(model, passed, [SPEC]))
    counters = (protocol._apply, sensitivity._change, sensitivity._round_trip)
    sizes = [counter._cache_size() for counter in counters]  # type: ignore[attr-defined]
    again = tiny_model(1)
    list(sensitivities(again, float_pass(again, CUT), [SPEC]))
    assert [counter._cache_size() for counter in counters] == sizes  # type: ignore[attr-defined]


def test_outliers_are_found_where_they_were_put() -> None:
    model = tiny_model()
    norm = model.blocks[1].mlp_norm.weight
    norm.set_value(norm.get_value().at[17].mul(300.0))
    weight = model.blocks[0].attn.o_proj.weight
    weight.set_value(weight.get_value().at[3, 5].set(50.0))
    found = {each.path: each for each in outliers(model, float_pass(model, CUT))}
    for path in ("blocks.1.mlp.up_proj", "blocks.1.mlp.gate_proj"):
        assert found[path].channel == 17
        assert found[path].input_ratio > 100
    assert found["blocks.0.mlp.up_proj"].input_ratio < 10
    assert max(found, key=lambda path: found[path].weight_ratio) == "blocks.0.attn.o_proj"


def test_what_cannot_be_measured_is_said() -> None:
    model = tiny_model()
    quantize_layers(model, SPEC)
    with pytest.raises(InputError, match="quantized already"):
        list(sensitivities(model, float_pass(model, CUT), [SPEC]))
    float_model = tiny_model()
    with pytest.raises(InputError, match=r"layer blocks\.0\.attn\.k_proj: "):
        list(sensitivities(float_model, float_pass(float_model, CUT), [scheme("int4:g128")]))
