"""The pipeline on tiny models: what it learns from, what it leaves behind, and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.calib import gram
from jquant.core.errors import InputError, InputWarning
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme
from jquant.nn.capture import capture
from jquant.nn.linear import QuantizedLinear
from jquant.nn.protocol import apply
from jquant.nn.surgery import module_at
from jquant.nn.w8a8 import W8A8Linear
from jquant.ptq import gptq
from jquant.ptq.activations import OnDisk
from jquant.ptq.coverage import Coverage
from jquant.ptq.pipeline import Event, quantize_model
from jquant.ptq.recipe import Recipe, Rule, Step, one_rule
from jquant.ptq.rule_check import check_rules
from tests.jitted import dequantize
from tests.ptq.places import model_with_outliers
from tests.tiny_checkpoint import tiny_model

RNG = np.random.default_rng(0)
BATCHES = [RNG.integers(0, 257, (2, 64)).astype(np.int32) for _ in range(4)]
GROUPS = (
    ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    ("attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PLAIN = Step("gptq", (("act_order", "none"), ("range", "minmax")))


def _plain(spec: str = "int4:g32") -> Recipe:
    return Recipe(rules=(Rule(layers=(r"^blocks\.",), scheme=spec, method=PLAIN),))


@pytest.fixture(scope="module")
def quantized() -> tuple[Any, Coverage]:
    return quantize_model(tiny_model(), _plain(), BATCHES)


def test_every_layer_is_solved_on_what_the_quantized_model_gives_it(quantized: tuple[Any, Coverage]) -> None:
    """True-sequential: the statistics of each layer are those of its input in the finished model."""
    model, floats = quantized[0], tiny_model()
    tokens = [jnp.asarray(batch) for batch in BATCHES]
    states, context = [apply(model.embed, each) for each in tokens], model.contexts(64)
    for index, block in enumerate(model.blocks):
        for group in GROUPS:
            inputs = [capture(block, group[:1], (x, context[index]))[group[0]][0][0] for x in states]
            found = gram.init(inputs[0].shape[-1])
            for x in inputs:
                found = gram.update(found, x)
            for path in group:
                weight = module_at(floats.blocks[index], path).weight.get_value()  # type: ignore[attr-defined]
                config = gptq.GPTQConfig(act_order="none", range="minmax")
                expected = gptq.solve(weight, gram.finalize(found), scheme("int4:g32"), config=config).qtensor
                packed = module_at(block, path).weight.get_value()  # type: ignore[attr-defined]
                # Sums in another order may turn a code over, here and there.
                assert np.mean(np.asarray(packed.codes() == expected.codes())) > 0.999
        states = [apply(block, x, context[index]) for x in states]


def test_products_of_bfloat16_cost_next_to_nothing(quantized: tuple[Any, Coverage]) -> None:
    """Every layer loses as much of its output as with products of float32."""
    found = quantize_model(tiny_model(), _plain(), BATCHES, products="bfloat16")[1]
    for mine, its in zip(found.layers, quantized[1].layers, strict=True):
        assert mine.error == pytest.approx(its.error, rel=0.15)  # codes turn over, either way
        assert mine.error != its.error
    mean, expected = (np.mean([layer.error for layer in each.layers]) for each in (found, quantized[1]))
    assert mean == pytest.approx(expected, rel=0.03)
    unknown: Any = "float16"
    with pytest.raises(InputError, match=r"float16.*float32, bfloat16"):
        quantize_model(tiny_model(), _plain(), BATCHES, products=unknown)
    with pytest.raises(InputError, match="bfloat16: only layers of a decoder"):
        quantize_model(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), _plain(), BATCHES, products="bfloat16")


def test_coverage_says_what_was_done(quantized: tuple[Any, Coverage]) -> None:
    model, coverage = quantized
    assert [layer.path for layer in coverage.layers] == [f"blocks.{i}.{p}" for i in range(2) for g in GROUPS for p in g]
    assert coverage.left_alone == ("head.lm_head", "embed")
    for layer in coverage.layers:
        assert layer.on_data
        assert layer.error < layer.rounding_error
        assert (layer.method, layer.scheme, layer.damping) == ("gptq", "int4:g32", pytest.approx(0.01))
        packed = module_at(model, layer.path)
        assert isinstance(packed, QuantizedLinear)
        assert layer.bits_per_weight == packed.weight.get_value().bits_per_weight
    assert "14 by gptq to int4:g32; 2 left alone" in coverage.summary()
    assert coverage.fallbacks == ()


def test_output_error_in_the_report_is_that_of_the_output() -> None:
    model = tiny_model()
    states, context = [model.embed(jnp.asarray(batch)) for batch in BATCHES], model.contexts(64)
    found, coverage = quantize_model(tiny_model(), _plain("int3:g32"), BATCHES)
    report = coverage.layers[0]
    x = jnp.concatenate([model.blocks[0].attn_norm(s).reshape(-1, 64) for s in states])
    weight = model.blocks[0].attn.q_proj.weight.get_value()
    value = dequantize(found.blocks[0].attn.q_proj.weight.get_value())
    expected = jnp.sum((x @ (value - weight).T) ** 2) / jnp.sum((x @ weight.T) ** 2)
    assert report.error == pytest.approx(float(expected), rel=1e-4)
    assert len(context) == 2


def test_blocks_of_equal_structure_share_their_programs() -> None:
    heard: list[Event] = []
    quantize_model(tiny_model(), _plain(), BATCHES)
    with jax.log_compiles(False):
        before = gptq._solve._cache_size()  # type: ignore[attr-defined]
        quantize_model(tiny_model(1), _plain(), BATCHES, progress=heard.append)
        assert gptq._solve._cache_size() == before  # type: ignore[attr-defined]
    assert [event.part for event in heard] == ["block-0000", "block-0001", "outer"]
    assert [event.done for event in heard] == [1, 2, 3]


def test_padding_counts_for_nothing() -> None:
    """Masked positions at the end of a causal model's windows leave the result as it is without them."""
    expected, _ = quantize_model(tiny_model(), _plain(), BATCHES)
    padded = [np.pad(batch, ((0, 0), (0, 16)), constant_values=7) for batch in BATCHES]
    masks = [np.arange(80)[None].repeat(2, 0) < 64 for _ in BATCHES]
    found, _ = quantize_model(tiny_model(), _plain(), padded, masks=masks)
    for path in ("blocks.0.attn.q_proj", "blocks.1.mlp.down_proj"):
        ours, theirs = (module_at(model, path).weight.get_value().codes() for model in (found, expected))  # type: ignore[attr-defined]
        assert np.mean(np.asarray(ours == theirs)) > 0.999


def test_padding_is_not_in_the_range_of_static_inputs() -> None:
    recipe = Recipe(rules=(Rule(layers=(r"^blocks\.",), scheme="int8:channel", activation="int8:tensor"),))
    expected, _ = quantize_model(tiny_model(), recipe, BATCHES)
    padded = [np.pad(batch, ((0, 0), (0, 16)), constant_values=7) for batch in BATCHES]
    masks = [np.arange(80)[None].repeat(2, 0) < 64 for _ in BATCHES]
    found, _ = quantize_model(tiny_model(), recipe, padded, masks=masks)
    with_padding, _ = quantize_model(tiny_model(), recipe, padded)

    def scales(model: Any) -> list[float]:
        paths = ("blocks.0.attn.q_proj", "blocks.0.mlp.down_proj", "blocks.1.mlp.down_proj")
        return [float(module_at(model, path).input_scale.get_value()) for path in paths]  # type: ignore[attr-defined]

    np.testing.assert_allclose(scales(found), scales(expected), rtol=1e-5)
    assert not np.allclose(scales(with_padding), scales(expected), rtol=1e-2)


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("awq", "int4:g32:asym"),
        ("awq", "int3:g32"),
        ("awq+gptq", "int3:g32"),
        ("smoothquant@int8:token", "int8:channel"),
        ("smoothquant@int4:tensor", "int8:channel"),
    ],
)
def test_padding_is_not_in_the_searches_of_transforms(method: str, spec: str) -> None:
    """Not in the statistics, nor in the errors, whatever the padding's embedding is."""
    padding = 7

    def transforms(batches: Any, masks: Any) -> list[tuple[float, float, float]]:
        model = tiny_model()
        table = model.embed.weight.get_value()
        model.embed.weight.set_value(table.at[padding].set(0).at[padding, 0].set(1000.0))
        _, coverage = quantize_model(model, one_rule(method, spec), batches, masks=masks)
        return [(each.choice, each.before, each.after) for each in coverage.transforms]

    real = [np.where(batch == padding, padding + 1, batch) for batch in BATCHES]
    padded = [np.pad(batch, ((0, 0), (0, 16)), constant_values=padding) for batch in real]
    masks = [np.arange(80)[None].repeat(2, 0) < 64 for _ in real]
    expected, found = transforms(real, None), transforms(padded, masks)
    np.testing.assert_array_equal(np.asarray(found)[:, 0], np.asarray(expected)[:, 0])
    np.testing.assert_allclose(np.asarray(found)[:, 1:], np.asarray(expected)[:, 1:], rtol=2e-3)
    without_masks = transforms(padded, None)
    assert not np.allclose(np.asarray(without_masks)[:, 1:], np.asarray(expected)[:, 1:], rtol=2e-2)


def test_activations_on_disk_change_nothing(tmp_path: Any, quantized: tuple[Any, Coverage]) -> None:
    store = OnDisk(tmp_path)
    found, _ = quantize_model(tiny_model(), _plain(), BATCHES, store=store)
    store.close()
    assert list(tmp_path.iterdir()) == []
    _assert_equal(found, quantized[0])


def test_methods_without_data_need_none() -> None:
    model, coverage = quantize_model(tiny_model(), one_rule("hqq", "int4:g32:asym"))
    assert not any(layer.on_data for layer in coverage.layers)
    assert isinstance(model.blocks[0].attn.q_proj, QuantizedLinear)


def test_embedding_and_head_are_quantized_where_a_rule_names_them() -> None:
    recipe = Recipe(
        rules=(
            Rule(layers=(r"^blocks\.", "lm_head"), scheme="int8:g32", method=PLAIN),
            Rule(layers=("^embed$",), scheme="q8_0"),
        )
    )
    model, coverage = quantize_model(tiny_model(), recipe, BATCHES)
    assert coverage.left_alone == ()
    assert coverage.layers[-2].path == "head.lm_head"
    assert isinstance(model.embed.weight.get_value(), QTensor)
    expected = apply(tiny_model(), jnp.asarray(BATCHES[0]))
    assert float(jnp.max(jnp.abs(apply(model, jnp.asarray(BATCHES[0])) - expected))) < 0.1 * float(
        jnp.max(jnp.abs(expected))
    )


@pytest.mark.parametrize("activation", ["int8:token", "int8:tensor", "int8:tensor:asym"])
def test_activations_are_quantized_where_a_rule_says_so(activation: str) -> None:
    recipe = Recipe(
        rules=(
            Rule(
                layers=(r"^blocks\.",),
                scheme="int8:channel",
                activation=activation,
                transforms=(Step("smoothquant", (("alpha", 0.5),)),),
            ),
        )
    )
    model, coverage = quantize_model(tiny_model(), recipe, BATCHES)
    assert isinstance(model.blocks[0].mlp.down_proj, W8A8Linear)
    assert {each.transform for each in coverage.transforms} == {"smoothquant"}
    expected = apply(tiny_model(), jnp.asarray(BATCHES[0]))
    error = jnp.linalg.norm(apply(model, jnp.asarray(BATCHES[0])) - expected) / jnp.linalg.norm(expected)
    assert float(error) < 0.15  # two layers deep, and random weights pass errors on whole


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["int4:g32:asym", "int2:g32:asym"])
def test_awq_then_gptq_is_better_than_either(spec: str) -> None:
    """On channels of different sizes: the layers that the block's input reaches, and logits of other tokens."""
    others = jnp.asarray(np.random.default_rng(9).integers(0, 200, (8, 64)), jnp.int32)
    expected = apply(model_with_outliers(), others)
    first = [f"blocks.0.attn.{name}_proj" for name in "qkv"]
    layers, logits = {}, {}
    for name in ("rtn", "awq", "gptq", "awq+gptq"):
        model, coverage = quantize_model(model_with_outliers(), one_rule(name, spec), BATCHES)
        logits[name] = float(jnp.linalg.norm(apply(model, others) - expected))
        layers[name] = np.asarray([each.error for each in coverage.layers if each.path in first])
    for name in ("awq", "gptq"):
        assert np.all(layers["awq+gptq"] < layers[name])
        assert np.all(layers[name] < layers["rtn"])
        assert logits["awq+gptq"] < logits[name] < logits["rtn"]


class MLP(nnx.Module):
    """A module that is no decoder."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.Linear(24, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jax.nn.relu(self.first(x)))


class ConvNet(nnx.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), padding="VALID", use_bias=False, rngs=rngs)
        self.last = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
        return self.last(jnp.mean(x, axis=(1, 2)))


@pytest.mark.parametrize(("kind", "shape"), [(MLP, (32, 24)), (ConvNet, (4, 12, 12, 3))])
def test_any_module_is_quantized(kind: Any, shape: tuple[int, ...]) -> None:
    data = [jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32) for i in range(6)]
    expected = kind(nnx.Rngs(0))(data[0])
    errors, heard = {}, list[Event]()
    for name in ("rtn", "gptq"):
        recipe = one_rule(name, "int4:g8", layers=(".",))
        model, coverage = quantize_model(kind(nnx.Rngs(0)), recipe, data, progress=heard.append)
        errors[name] = float(jnp.linalg.norm(model(data[0]) - expected) / jnp.linalg.norm(expected))
        assert len(coverage.layers) == (2 if kind is MLP else 3)
        assert [event.reports for event in heard] == [coverage.layers]
        heard.clear()
    assert errors["gptq"] < errors["rtn"] < 0.3


def test_bad_data_is_named() -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.k_proj: gptq and its transforms learn from data"):
        quantize_model(tiny_model(), _plain())
    with pytest.raises(InputError, match="at least 2 tokens"):
        quantize_model(tiny_model(), _plain(), [])
    broken = tiny_model()
    broken.embed.weight.set_value(broken.embed.weight.get_value().at[:, 3].set(jnp.nan))
    with pytest.raises(InputError, match=r"layer blocks\.0\.attn\.q_proj: activations hold a NaN"):
        quantize_model(broken, _plain(), BATCHES)
    silent = tiny_model()
    silent.blocks[0].attn_norm.weight.set_value(jnp.zeros(64))
    with pytest.raises(InputError, match=r"layer blocks\.0\.attn\.q_proj: all activations are zero"):
        quantize_model(silent, _plain(), BATCHES)
    wrong = tiny_model()
    weight = wrong.blocks[1].mlp.up_proj.weight
    weight.set_value(weight.get_value().at[0, 0].set(jnp.inf))
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.up_proj: its weight holds a NaN or an infinity"):
        quantize_model(wrong, one_rule("rtn", "int4:g32"))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([BATCHES[0], BATCHES[1][:, :32]], r"batch 1 is \(2, 32\), batch 0 \(2, 64\): give all in one shape"),
        ([BATCHES[0], BATCHES[1] + 1000], r"batch 1 holds token id 1\d\d\d, outside the model's vocabulary of 257"),
        ([BATCHES[0] - 300], r"batch 0 holds token id -\d+, outside"),
        ([BATCHES[0].astype(np.float32)], r"batch 0 is float32\[2, 64\]: give token ids as integer arrays"),
        (list(BATCHES[0]), r"batch 0 is int32\[64\]: give token ids as integer arrays \[batch, time\]"),
        ([BATCHES[0].tolist()], "batch 0 is a list: give token ids"),
        ([BATCHES[0][:, :1]], "at least 2 tokens"),
        ([BATCHES[0][:0]], "at least 2 tokens"),
        (np.stack(BATCHES)[:0], "at least 2 tokens"),
        (iter(BATCHES), "calibration batches are a list_iterator: every block reads them, so give a list"),
    ],
)
def test_batches_that_are_not_windows_of_tokens_are_refused(
    batches: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jquant.ptq.pipeline._quantize_part", _must_not_run)
    with pytest.raises(InputError, match=message):
        quantize_model(tiny_model(), _plain(), batches)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([np.ones((2, 64), bool)], "1 masks for 4 calibration batches: give one a batch"),
        ([np.ones((2, 64), bool)] * 5, "5 masks for 4 calibration batches"),
        ([np.ones((2, 32), bool)] * 4, r"mask 0 is \(2, 32\), its batch \(2, 64\): give one entry a token"),
        ([np.zeros((2, 64), np.float32)] * 4, r"mask 0 is float32\[2, 64\]: give boolean arrays"),
        ([None] * 4, "mask 0 is a NoneType: give boolean arrays"),
        ((mask for mask in [np.ones((2, 64), bool)] * 4), "masks are a generator: every block reads them"),
    ],
)
def test_masks_that_do_not_fit_their_batches_are_refused(
    masks: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jquant.ptq.pipeline._quantize_part", _must_not_run)
    with pytest.raises(InputError, match=message):
        quantize_model(tiny_model(), _plain(), BATCHES, masks=masks)


def test_batches_of_a_module_that_is_no_decoder_are_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jquant.ptq.whole_module.quantize_block", _must_not_run)
    recipe = one_rule("gptq", "int4:g8", layers=(".",))
    for batch in ([jnp.ones((32, 24))], ([jnp.ones((32, 24))],), "text"):
        with pytest.raises(InputError, match=r"batch 1 is a (list|str): give the array that the module is called with"):
            quantize_model(MLP(nnx.Rngs(0)), recipe, [jnp.ones((32, 24)), batch])


def test_masks_of_a_module_that_is_no_decoder_are_one_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jquant.ptq.whole_module.quantize_block", _must_not_run)
    recipe, data = one_rule("gptq", "int4:g8", layers=(".",)), [jnp.ones((32, 24))] * 2
    with pytest.raises(InputError, match="1 masks for 2 calibration batches"):
        quantize_model(MLP(nnx.Rngs(0)), recipe, data, masks=[np.ones(32, bool)])
    with pytest.raises(InputError, match=r"mask 0 is float32\[32\]: give boolean arrays"):
        quantize_model(MLP(nnx.Rngs(0)), recipe, data, masks=[np.ones(32, np.float32)] * 2)


@pytest.mark.parametrize(
    ("method", "spec", "message"),
    [
        ("gptq", "q4_0", r"layer blocks\.0\.attn\.k_proj: GPTQ to q4_0"),
        ("hqq", "int4:g32", r"layer blocks\.0\.attn\.k_proj: .*asym"),
        ("rtn", "int4:g128", r"layer blocks\.0\.attn\.k_proj: group size 128"),
        ("smoothquant", "int4:g32", "quantizes no activations"),
        ("rtn@int4:token", "int4:g32", r"layer blocks\.0\.attn\.k_proj: weights in int4:g32 with activations in int4"),
        ("smoothquant@int8:token", "fp8_e4m3:channel", r"layer blocks\.0\.attn\.k_proj: .*both must be integers"),
        ("rtn@int8:channel", "int8:channel", r"layer blocks\.0\.attn\.k_proj: .*per token"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_the_work(
    method: str, spec: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jquant.ptq.pipeline._quantize_part", _must_not_run)
    with pytest.raises(InputError, match=message):
        quantize_model(tiny_model(), one_rule(method, spec), BATCHES)


def _must_not_run(*arguments: Any) -> Any:
    raise AssertionError("the work began")


def test_layers_of_flax_do_not_quantize_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jquant.ptq.whole_module.quantize_block", _must_not_run)
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    rule = Rule(layers=("layers",), scheme="int8:channel", activation="int8:token")
    with pytest.raises(InputError, match=r"layer layers\.0: activations in int8:token: only decoders' linear layers"):
        quantize_model(model, Recipe(rules=(rule,)), [jnp.ones((2, 8))])


@pytest.mark.parametrize(("method", "spec"), [("rtn@int8:token", "int8:channel"), ("rtn", "int4:g32")])
def test_a_layer_that_is_quantized_already_is_named(method: str, spec: str) -> None:
    model, _ = quantize_model(tiny_model(), one_rule(method, spec))
    with pytest.raises(InputError, match=r"layer blocks\.0\.\w+\.\w+_proj is quantized already: start from the float"):
        quantize_model(model, one_rule("rtn", "int4:g32"))


def test_masks_are_refused_where_experts_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jquant.ptq.pipeline._quantize_part", _must_not_run)
    shapes = {"blocks.0.mlp.up_proj": (4, 64, 32)}
    rules = dict.fromkeys(shapes, one_rule("gptq", "int4:g32").rules[0])
    with pytest.raises(InputError, match=r"layer blocks\.0\.mlp\.up_proj: masks do not reach experts"):
        check_rules(rules, shapes, True, masked=True)
    check_rules(rules, shapes, True)


def test_a_transform_that_finds_no_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jquant.ptq.pipeline._quantize_part", _must_not_run)
    with pytest.raises(InputError, match=r"awq on blocks\.0\.attn\.q_proj: no norm or layer before it"):
        quantize_model(tiny_model(), one_rule("awq", "int4:g32", layers=("q_proj",)), BATCHES)


@pytest.mark.parametrize(("method", "learns"), [("rtn@int8:tensor", False), ("gptq@int8:tensor", True)])
def test_only_methods_that_learn_from_them_need_many_tokens(
    method: str, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[bool] = []
    monkeypatch.setattr(gram, "check", lambda found, what, *, learns: heard.append(learns))
    quantize_model(tiny_model(layers=1), one_rule(method, "int8:channel"), BATCHES)
    assert heard == [learns] * 4


def test_few_tokens_are_damped_and_reported() -> None:
    """Fewer rows than inputs: H is singular, and the damping makes a factor of it."""
    masks = [np.arange(64)[None] < 16]
    with pytest.warns(InputWarning, match=r"data of 16 tokens for the 96 inputs of layer blocks\.0\.mlp\.down_proj"):
        quantize_model(tiny_model(), _plain(), [BATCHES[0][:1]], masks=masks)
    with pytest.warns(InputWarning, match="16 tokens"):
        _, coverage = quantize_model(tiny_model(), _plain(), [BATCHES[0][:1, :16]])
    assert all(layer.damping > 0.0099 and not layer.fallback for layer in coverage.layers)


@pytest.mark.parametrize(
    "axes",
    [*(pytest.param(axes, marks=pytest.mark.slow) for axes in ({"tensor": 8}, {"data": 2})), {"data": 2, "tensor": 4}],
)
def test_sharded_is_unsharded(axes: dict[str, int], quantized: tuple[Any, Coverage]) -> None:
    """Rows of weights alone: bit for bit. Batches: sums in another order, which may turn single codes over."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    found, coverage = quantize_model(tiny_model(), _plain(), BATCHES, mesh=mesh)
    for ours, theirs in zip(coverage.layers, quantized[1].layers, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=0.02)
        codes = [module_at(model, ours.path).weight.get_value().codes() for model in (found, quantized[0])]  # type: ignore[attr-defined]
        assert np.mean(np.asarray(codes[0]) == np.asarray(codes[1])) > 0.995
    used = found.blocks[0].mlp.gate_proj.weight.get_value().planes[0].sharding
    assert len(used.device_set) == mesh.size


def _assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(other)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
