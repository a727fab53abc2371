"""Sensitivities and outliers by definition, without a program for every layer."""

from __future__ import annotations

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.data.blocks import text_windows, windows
from jquant.data.text import load_text
from jquant.evaluation import sensitivity
from jquant.evaluation.allocate import allocate
from jquant.evaluation.divergence import divergence
from jquant.evaluation.outliers import outliers
from jquant.evaluation.perplexity import perplexity
from jquant.evaluation.sensitivity import block_layers, by_scheme, float_pass, mixed, sensitivities, uniform
from jquant.models.checkpoint import load_model, load_tokenizer
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


@pytest.mark.slow
def test_mixed_precision_beats_uniform_at_equal_size_on_text_it_did_not_see() -> None:
    """SmolLM2, its down_proj, where the loss sits. The sum of single losses is near what all cost at once."""
    model, tokenizer = load_model("demo"), load_tokenizer("demo")
    seen, unseen = (
        text_windows(load_text(name), tokenizer, window=64, limit=2) for name in ("pydoc:calibration", "pydoc")
    )
    passed, held_out = float_pass(model, seen), float_pass(model, unseen)
    layers = [path for path in block_layers(model) if path.endswith("down_proj")]
    specs = [scheme(f"int{bits}:g64:fp16") for bits in (3, 4, 5)]
    chosen = allocate(list(sensitivities(model, passed, specs, layers=layers)), 4.25)
    assert 4.24 < chosen.bits_per_weight <= 4.25
    assert len(set(chosen.schemes.values())) > 1
    schemes = {path: scheme(spec) for path, spec in chosen.schemes.items()}
    mixture, even = (mixed(model, held_out, each)[0] for each in (schemes, dict.fromkeys(layers, specs[1])))
    assert mixture < 0.85 * even
    assert mixed(model, passed, schemes)[0] == pytest.approx(chosen.predicted, rel=0.3)
