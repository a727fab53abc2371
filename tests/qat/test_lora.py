"""Adapters over a frozen quantized model: what is replaced, that training works, and the ways back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.nn.linear import Linear, QuantizedLinear
from jquant.nn.lora import LoRALinear, LoRAParam
from jquant.nn.protocol import apply
from jquant.nn.surgery import module_at, named_modules
from jquant.ptq.rtn import quantize_layers
from jquant.qat.batches import RowBatches
from jquant.qat.config import QATConfig
from jquant.qat.loftq import loftq
from jquant.qat.lora import ALL_BUT_ADAPTERS, add_adapters, loftq_start, merge, requantize
from jquant.qat.losses import next_token_loss
from jquant.qat.trainer import train
from tests.jitted import dequantize, quantize
from tests.tiny_checkpoint import CONFIG, tiny_model

KEY = jax.random.key(3)
ALL = (r"^blocks\.",)
SOME = (r"attn\.[qo]_proj$",)
TOKENS = jax.random.randint(jax.random.key(1), (2, 17), 0, 40)


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def logits(model: Decoder) -> jax.Array:
    return apply(model, TOKENS)


def test_adapters_begin_at_the_packed_models_output() -> None:
    model, packed = tiny_model(), tiny_model()
    report = add_adapters(model, ALL, scheme("int4:g32"), rank=4, key=KEY)
    quantize_layers(packed, scheme("int4:g32"))
    assert np.array_equal(logits(model), logits(packed))
    assert {layer.path for layer in report.layers} == {path for path, _ in named_modules(packed, QuantizedLinear)}
    assert report.left_alone == ("head.lm_head",)
    first = module_at(packed, "blocks.0.attn.q_proj")
    weight = module_at(tiny_model(), "blocks.0.attn.q_proj")
    assert isinstance(first, QuantizedLinear)
    assert isinstance(weight, Linear)
    w = np.asarray(weight.weight.get_value())
    wanted = np.sum((w - np.asarray(dequantize(first.weight.get_value()))) ** 2) / np.sum(w**2)
    assert {layer.path: layer.error for layer in report.layers}["blocks.0.attn.q_proj"] == pytest.approx(
        wanted, rel=1e-4
    )


def test_report_counts_what_is_trained() -> None:
    model = tiny_model()
    report = add_adapters(model, (r"attn\.[qv]_proj$",), scheme("int4:g32"), rank=2, key=KEY)
    assert report.trained == 2 * 2 * ((64 + 64) + (64 + 32))  # two blocks, rank 2; v has 2 heads of 16
    assert report.trained_bytes == 4 * report.trained
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert report.frozen_bytes == total - report.trained_bytes
    assert "4 layers with adapters over int4:g32" in report.summary()


def test_packed_layers_keep_their_codes() -> None:
    model = tiny_model()
    quantize_layers(model, scheme("int3:g32"))
    before = [layer.weight.get_value() for _, layer in named_modules(model, QuantizedLinear)]  # type: ignore[attr-defined]
    report = add_adapters(model, ALL, None, rank=4, key=KEY)
    after = [layer.weight.get_value() for _, layer in named_modules(model, LoRALinear)]  # type: ignore[attr-defined]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    assert {(layer.scheme, layer.rounded, layer.error) for layer in report.layers} == {("int3:g32", False, None)}


def test_a_layers_adapter_depends_on_key_and_path_alone() -> None:
    def first(patterns: tuple[str, ...], key: jax.Array) -> jax.Array:
        model = tiny_model()
        add_adapters(model, patterns, scheme("int4:g32"), rank=4, key=key)
        layer = module_at(model, "blocks.1.mlp.up_proj")
        assert isinstance(layer, LoRALinear)
        return layer.lora_a.get_value()

    assert np.array_equal(first(ALL, KEY), first(("up_proj",), KEY))
    assert not np.array_equal(first(ALL, KEY), first(ALL, jax.random.key(4)))


def test_blocks_stay_alike() -> None:
    model = tiny_model()
    add_adapters(model, ALL, scheme("int4:g32"), rank=4, key=KEY, alpha=16)
    graphs = [nnx.split(block)[0] for block in model.blocks]
    assert graphs[0] == graphs[1]


def test_training_reduces_the_loss_and_moves_nothing_else() -> None:
    model = tiny_model()
    add_adapters(model, ALL, scheme("nf4:g64:dq"), rank=4, key=KEY, alpha=8)
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=LoRAParam)
    frozen = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(LoRAParam)))

    @nnx.jit
    def step(model: Decoder, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRAParam))(model, TOKENS)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    same = jax.tree.map(np.array_equal, frozen, nnx.state(model, nnx.Not(LoRAParam)))
    assert all(jax.tree.leaves(same))
    moments = [leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState))]
    assert (
        sum(moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, LoRAParam))) + 2
    )  # two counters


def test_the_trainer_trains_adapters_only() -> None:
    model = tiny_model()
    add_adapters(model, SOME, scheme("int4:g32"), rank=4, key=KEY)
    frozen = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(LoRAParam)))
    batches = RowBatches(np.asarray(TOKENS), batch=2, seed=0)
    losses: list[float] = []
    config = QATConfig(steps=4, batch=2, learning_rate=0.02, frozen=ALL_BUT_ADAPTERS)
    train(model, next_token_loss(), batches, config, listen=lambda record: losses.append(record.loss))
    assert losses[-1] < losses[0]
    same = jax.tree.map(np.array_equal, frozen, nnx.state(model, nnx.Not(LoRAParam)))
    assert all(jax.tree.leaves(same))


def test_rematerialized_and_plain_gradients_agree() -> None:
    model = tiny_model()
    add_adapters(model, ALL, scheme("int4:g32"), rank=4, key=KEY)

    def rematerialized(model: Decoder, tokens: jax.Array) -> jax.Array:
        x = model.embed(tokens[:, :-1])
        for block, context in zip(model.blocks, model.contexts(tokens.shape[1] - 1), strict=True):
            x = nnx.remat(lambda block, x, context: block(x, context))(block, x, context)
        return optax.softmax_cross_entropy_with_integer_labels(model.head(x), tokens[:, 1:]).mean()

    plain, again = (
        nnx.jit(nnx.grad(function, argnums=nnx.DiffState(0, LoRAParam)))(model, TOKENS)
        for function in (loss, rematerialized)
    )
    close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)
    assert all(jax.tree.leaves(close))


def _trained(spec: str) -> Decoder:
    """Adapters with numbers in B, as after training."""
    model = tiny_model()
    add_adapters(model, ALL, scheme(spec), rank=4, key=KEY)
    for path, layer in named_modules(model, LoRALinear):
        assert isinstance(layer, LoRALinear)
        shape = layer.lora_b.get_value().shape
        layer.lora_b.set_value(0.05 * jax.random.normal(jax.random.key(len(path)), shape))
    return model


def test_merge_gives_float_layers_with_the_same_output() -> None:
    model = _trained("int4:g32")
    before = logits(model)
    paths = merge(model)
    assert len(paths) == 14
    assert isinstance(module_at(model, paths[0]), Linear)
    assert np.allclose(logits(model), before, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="no layer with an adapter"):
        merge(model)


@pytest.mark.parametrize("given", [None, "int8:channel"])
def test_requantize_reports_what_rounding_adds(given: str | None) -> None:
    model, merged = _trained("int4:g32"), _trained("int4:g32")
    merge(merged)
    reports = requantize(model, None if given is None else scheme(given))
    assert {report.scheme for report in reports} == {given or "int4:g32"}
    for path, layer in named_modules(merged, Linear):  # new scales, or the base's where these lose less
        if given is None and path != "head.lm_head":
            assert isinstance(layer, Linear)
            w = layer.weight.get_value()
            again = dequantize(quantize(w, scheme("int4:g32")))
            report = next(report for report in reports if report.path == path)
            assert report.error <= float(jnp.sum((w - again) ** 2) / jnp.sum(w**2)) * (1 + 1e-5)
    if given is not None:
        quantize_layers(merged, scheme(given))
        assert np.array_equal(logits(model), logits(merged))
    assert all(report.learned > 0 for report in reports)
    assert max(report.error for report in reports) < (1e-3 if given else 0.05)
    assert not list(named_modules(model, LoRALinear))


@pytest.mark.parametrize("spec", ["int4:g32", "int4:g32:asym", "nf4:g32", "mxfp4"])
def test_requantize_of_untouched_adapters_changes_nothing(spec: str) -> None:
    model = tiny_model()
    layer = module_at(model, "blocks.0.mlp.up_proj")
    assert isinstance(layer, Linear)
    layer.weight.set_value(layer.weight.get_value().at[:3].set(0))  # rows whose scales are those of nothing
    add_adapters(model, (r"blocks\.0\.mlp\.up",), scheme(spec), rank=4, key=KEY)
    before = logits(model)
    (report,) = requantize(model)
    assert (report.error, report.learned) == (0, 0)
    assert np.array_equal(logits(model), before)


def test_requantize_keeps_groups_of_columns() -> None:
    weight = jax.random.normal(KEY, (32, 64))
    groups = jax.random.permutation(KEY, jnp.repeat(jnp.arange(2), 32))
    base = quantize(weight, scheme("int4:g32"), groups=groups)
    net = nnx.Dict(layer=QuantizedLinear(base))
    add_adapters(net, ("layer",), None, rank=2, key=KEY)
    (report,) = requantize(net)
    assert report.error < 1e-12
    assert report.kept_scales
    assert net.layer.weight.get_value().groups is not None


@pytest.mark.parametrize("spec", ["int2:g32", "nf4:g32"])
def test_loftq_starts_closer_to_the_weight(spec: str) -> None:
    w = jax.random.normal(jax.random.key(0), (48, 64))

    def error(steps: int, rank: int) -> float:
        found = loftq(w, scheme(spec), rank, steps=steps)
        return float(jnp.sum((w - dequantize(found.base) - found.b @ found.a) ** 2))

    alone = float(jnp.sum((w - dequantize(loftq(w, scheme(spec), 1).base)) ** 2))
    assert error(1, 8) < alone
    assert error(5, 8) <= error(1, 8) * (1 + 1e-6)
    assert error(1, 16) < error(1, 8)


def test_loftq_as_the_start_of_adapters() -> None:
    plain, better = tiny_model(), tiny_model()
    first = add_adapters(plain, SOME, scheme("int2:g32"), rank=8, key=KEY, alpha=4)
    second = add_adapters(better, SOME, scheme("int2:g32"), rank=8, key=KEY, alpha=4, initialize=loftq_start(steps=2))
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.error is not None
        assert other.error is not None
        assert other.error < one.error
    reference = logits(tiny_model())
    assert jnp.mean((logits(better) - reference) ** 2) < jnp.mean((logits(plain) - reference) ** 2)


def test_flax_linear_layers_take_adapters_too() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.one = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.one(x)

    net, x = Net(), jax.random.normal(KEY, (5, 64))
    expected = net(x)
    add_adapters(net, ("one",), scheme("int8:channel"), rank=4, key=KEY)
    assert isinstance(net.one, LoRALinear)
    assert np.allclose(net(x), expected, atol=0.05)
    with pytest.raises(InputError, match="conv is a Conv: adapters go over"):
        add_adapters(net, ("conv",), scheme("int8:channel"), rank=4, key=KEY)


@pytest.mark.parametrize(
    ("patterns", "spec", "options", "message"),
    [
        (("nothing",), "int4:g32", {}, "matches nothing"),
        (ALL, None, {}, r"q_proj has a float weight|has a float weight"),
        (ALL, "int4:g128", {}, "layer blocks.*group size 128"),
        (ALL, "int4:g32", {"rank": 33}, "layer .*rank 33"),
        (ALL, "int4:g32", {"rank": 0}, "layer .*rank 0"),
        (ALL, "int4:g32", {"alpha": -1.0}, "alpha"),
    ],
)
def test_mistakes_change_nothing(
    patterns: tuple[str, ...], spec: str | None, options: dict[str, Any], message: str
) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=message):
        add_adapters(model, patterns, None if spec is None else scheme(spec), **{"rank": 4, "key": KEY, **options})
    assert not list(named_modules(model, LoRALinear))


def test_mistakes_about_packed_adapted_and_expert_layers() -> None:
    model = tiny_model()
    quantize_layers(model, scheme("int4:g32"))
    with pytest.raises(InputError, match="packed in int4:g32 and nf4:g64 was asked"):
        add_adapters(model, ALL, scheme("nf4:g64"), rank=4, key=KEY)
    with pytest.raises(InputError, match="needs the float weight"):
        add_adapters(model, ALL, None, rank=4, key=KEY, initialize=loftq_start())
    add_adapters(model, ALL, None, rank=4, key=KEY)
    with pytest.raises(InputError, match="has an adapter already"):
        add_adapters(model, ALL, None, rank=4, key=KEY)
    experts = Decoder(
        ModelConfig(**{**CONFIG.__dict__, "num_experts": 2, "experts_per_token": 1, "architecture": "qwen3_moe"}),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(InputError, match="is a ExpertLinear: adapters go over Linear"):
        add_adapters(experts, ("up_proj",), scheme("int4:g32"), rank=4, key=KEY)
    broken = tiny_model()
    layer = module_at(broken, "blocks.0.mlp.up_proj")
    assert isinstance(layer, Linear)
    layer.weight.set_value(layer.weight.get_value().at[0, 0].set(jnp.nan))
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.up_proj: the weight holds a NaN"):
        add_adapters(broken, ALL, scheme("int4:g32"), rank=4, key=KEY)
