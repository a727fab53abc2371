"""Layers for training with quantization: each kind, under each transformation of JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant import qat
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.nn.fake_quant import FakeQuantParam, InputQuantizer, ObserverState, WeightQuantizer
from jquant.nn.linear import ExpertLinear, Linear
from jquant.nn.qat_layers import QATLayer, QATLinear
from jquant.qat.state import split
from tests.jitted import dequantize, quantize

IN, OUT = 48, 40
KINDS: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...]]] = {
    "ours": (lambda rngs: Linear(IN, OUT, use_bias=True, rngs=rngs), (3, IN)),
    "linear": (lambda rngs: nnx.Linear(IN, OUT, rngs=rngs), (2, 3, IN)),
    "general": (lambda rngs: nnx.LinearGeneral((6, 8), (5, 8), axis=(-2, -1), rngs=rngs), (3, 6, 8)),
    "batched general": (lambda rngs: nnx.LinearGeneral(16, 8, axis=-1, batch_axis={0: 3}, rngs=rngs), (3, 5, 16)),
    "einsum": (lambda rngs: nnx.Einsum("bti,ihd->bthd", (IN, 5, 8), (5, 8), rngs=rngs), (2, 3, IN)),
    "conv": (
        lambda rngs: nnx.Conv(16, 24, kernel_size=(3, 3), strides=2, feature_group_count=2, rngs=rngs),
        (2, 6, 6, 16),
    ),
    "attention": (lambda rngs: nnx.MultiHeadAttention(4, IN, decode=False, rngs=rngs), (2, 5, IN)),
}
WEIGHTS = {  # scheme, gradient
    "int3 lsq": ("int3:g16", "lsq"),
    "int4 asym lsq": ("int4:channel:asym", "lsq"),
    "int8": ("int8:channel", "clipped_ste"),
    "nf4": ("nf4:g16", "clipped_ste"),
    "nvfp4": ("nvfp4", "ste"),
}
INPUTS = {  # scheme, gradient
    "none": (None, "clipped_ste"),
    "token": ("int8:token", "clipped_ste"),
    "static": ("int8:tensor", "clipped_ste"),
    "static asym lsq": ("int4:tensor:asym", "lsq"),
    "pact": ("int8:tensor:asym", "pact"),
    "mxfp8": ("mxfp8_e4m3", "ste"),
}


class Holder(nnx.Module):
    """One layer, and something that is not quantized."""

    def __init__(self, layer: nnx.Module) -> None:
        self.layer = layer
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.gain.get_value() * self.layer(x)  # type: ignore[operator]


def _quiet(_: str) -> None:
    pass


@nnx.jit
def _forward(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)  # type: ignore[operator]


def _prepared(
    kind: str, weight: tuple[str, str], inputs: tuple[str | None, str] = INPUTS["none"]
) -> tuple[Holder, jax.Array]:
    """A trained layer: whatever is quantized has moved away from where it started."""
    make, shape = KINDS[kind]
    model = Holder(make(nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    recipe = qat.one_rule(
        weight[0], layers=("layer",), gradient=weight[1], activation=inputs[0], activation_gradient=inputs[1]
    )
    report = qat.prepare(model, recipe, announce=_quiet)
    if report.uncalibrated:
        qat.calibrate(model, [x, 2 * x])
    optimizer = nnx.Optimizer(model, optax.sgd(0.02), wrt=nnx.Param)
    for _ in range(2):
        _step(model, optimizer, x)
    return model, x


@nnx.jit
def _step(model: Holder, optimizer: nnx.Optimizer, x: jax.Array) -> None:
    optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model))


@pytest.mark.parametrize(
    ("kind", "weight"),
    [(kind, weight) for kind in KINDS for weight in (WEIGHTS if kind in ("ours", "linear") else ("int3 lsq", "nf4"))],
)
def test_packed_weights_give_the_outputs_of_training(kind: str, weight: str) -> None:
    model, x = _prepared(kind, WEIGHTS[weight])
    trained = _forward(model, x)
    packed = qat.convert(model)
    assert np.array_equal(_forward(packed, x), trained)
    assert not nnx.to_flat_state(nnx.state(packed, FakeQuantParam))


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        *((kind, inputs) for kind in ("ours", "linear") for inputs in INPUTS if inputs != "none"),
        ("conv", "token"),
        ("conv", "pact"),
        ("attention", "static"),
    ],
)
def test_so_they_do_with_quantized_inputs(kind: str, inputs: str) -> None:
    model, x = _prepared(kind, WEIGHTS["int8"], INPUTS[inputs])
    qat.set_observing(model, False)
    trained = _forward(model, x)
    plain = Holder(KINDS[kind][0](nnx.Rngs(0)))
    assert not np.array_equal(trained, plain(x))
    assert np.array_equal(_forward(qat.convert(model), x), trained)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", ["ours", "linear"])
def test_unwrapped_layers_are_the_float_ones_with_quantized_values(kind: str, weight: str) -> None:
    model, x = _prepared(kind, WEIGHTS[weight])
    packed, plain = qat.convert(nnx.clone(model)), qat.unwrap(nnx.clone(model))
    assert type(plain.layer) is type(KINDS[kind][0](nnx.Rngs(0)))
    values = dequantize(packed.layer.weight.get_value())  # type: ignore[attr-defined]
    held = plain.layer.weight.get_value() if kind == "ours" else plain.layer.kernel.get_value().T  # type: ignore[attr-defined]
    assert np.array_equal(held, values)
    np.testing.assert_allclose(plain(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs", [None, "int8:token", "mxfp8_e4m3"])
def test_experts(inputs: str | None) -> None:
    class Experts(nnx.Module):
        def __init__(self) -> None:
            self.layer = ExpertLinear(3, IN, OUT, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(x, jnp.asarray([2, 0, 4]))

    model, x = Experts(), jnp.asarray(np.random.default_rng(0).standard_normal((6, IN)), jnp.float32)
    qat.prepare(model, qat.one_rule("int8:channel", layers=("layer",), activation=inputs), announce=_quiet)
    gradients = nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)
    of_weight = gradients["layer"]["weight"].get_value()
    assert np.any(of_weight[0] != 0)
    assert np.any(of_weight[2] != 0)
    assert not np.any(of_weight[1])
    trained = _forward(model, x)
    assert np.array_equal(_forward(qat.convert(model), x), trained)


def test_tokens_and_logits_of_an_embedding() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.Embed(20, 32, rngs=nnx.Rngs(0))

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.table.attend(self.table(tokens))

    model, tokens = Tied(), jnp.arange(12)
    qat.prepare(model, qat.one_rule("int4:g32", layers=("table",), gradient="lsq"), announce=_quiet)
    quantizer = model.table.weight_quantizer  # type: ignore[attr-defined]
    table = dequantize(jax.jit(quantizer.quantize)(model.table.layer.embedding.get_value()))  # type: ignore[attr-defined]
    trained = _forward(model, tokens)
    np.testing.assert_allclose(trained, table[tokens] @ table.T, rtol=1e-5, atol=1e-6)
    gradients = nnx.grad(lambda model: jnp.sum(model(tokens) ** 2))(model)
    assert np.any(gradients["table"]["weight_quantizer"]["log_scale"].get_value() != 0)
    assert np.array_equal(_forward(qat.convert(model), tokens), trained)


def test_scales_move_and_take_their_own_optimizer() -> None:
    """What is quantization's is told from the rest by its type: here it alone is trained."""
    model, x = _prepared("linear", ("int3:g16", "lsq"), ("int8:tensor:asym", "lsq"))
    before = nnx.to_pure_dict(nnx.state(nnx.clone(model), nnx.Param))
    labels = jax.tree.map(
        lambda variable: "scales" if isinstance(variable, FakeQuantParam) else "rest",
        nnx.state(model, nnx.Param),
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    transform = optax.multi_transform({"scales": optax.adam(0.1), "rest": optax.set_to_zero()}, labels)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layer, old = after["layer"], before["layer"]
    assert np.array_equal(layer["layer"]["kernel"], old["layer"]["kernel"])
    for quantizer in ("weight_quantizer", "input_quantizer"):
        moved = layer[quantizer]["log_scale"] != old[quantizer]["log_scale"]
        assert np.mean(moved) > 0.9, quantizer


class Stacked(nnx.Module):
    """A block of a stack: a layer of each kind and a norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.first, self.second = nnx.Linear(32, 64, rngs=rngs), Linear(64, 32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.second(nnx.relu(self.first(self.norm(x))))


def _rule(**choices: Any) -> qat.Recipe:
    return qat.one_rule("int4:g32", layers=("first", "second"), **choices)


def _x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("gradient", ["clipped_ste", pytest.param("lsq", marks=pytest.mark.slow)])
def test_scan_over_layers_is_the_loop_over_them(gradient: str) -> None:
    create = nnx.vmap(lambda rngs: Stacked(rngs), in_axes=0, out_axes=0)
    stack = create(nnx.Rngs(0).split(3))
    qat.prepare(stack, _rule(gradient=gradient), announce=_quiet)
    assert bool(nnx.to_flat_state(nnx.state(stack, FakeQuantParam))) == (gradient == "lsq")

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block: Stacked, x: jax.Array) -> jax.Array:
        return block(x)

    def loop(stack: Stacked, x: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(stack)
        for index in range(3):
            x = nnx.merge(graphdef, jax.tree.map(lambda array, index=index: array[index], state))(x)
        return x

    x = _x(5, 32)
    np.testing.assert_allclose(run(stack, x), loop(stack, x), rtol=1e-5, atol=1e-5)
    by_scan, by_loop = (nnx.jit(nnx.grad(lambda s, f=f: jnp.sum(f(s, x) ** 2)))(stack) for f in (run, loop))
    for mine, other in zip(jax.tree.leaves(by_scan), jax.tree.leaves(by_loop), strict=True):
        assert np.any(mine != 0)
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=1e-4 * np.abs(other).max())


def test_quantizers_of_inputs_stack_where_each_layer_is_prepared() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Stacked:
        block = Stacked(rngs)
        qat.prepare(block, _rule(activation="int8:tensor"), announce=_quiet)
        return block

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block: Stacked, x: jax.Array) -> jax.Array:
        return block(x)

    stack = create(nnx.Rngs(0).split(3))
    nnx.jit(run)(stack, _x(5, 32))
    seen = stack.first.input_quantizer.seen.get_value()  # type: ignore[attr-defined]
    assert seen.shape == (3, 4)
    assert len(np.unique(seen[:, 1])) == 3


def test_remat_and_vmap() -> None:
    block = Stacked(nnx.Rngs(0))
    qat.prepare(block, _rule(gradient="lsq", activation="int8:token"), announce=_quiet)
    x = _x(4, 5, 32)

    def loss(block: Stacked, call: Callable[[Stacked, jax.Array], jax.Array]) -> jax.Array:
        return jnp.sum(call(block, x) ** 2)

    plain, again, mapped = (
        nnx.jit(nnx.grad(partial(loss, call=call)))(block)
        for call in (
            lambda block, x: block(x),
            nnx.remat(lambda block, x: block(x)),
            nnx.vmap(lambda block, x: block(x), in_axes=(None, 0)),
        )
    )
    for exact, *others in zip(*map(jax.tree.leaves, (plain, again, mapped)), strict=True):
        for other in others:
            np.testing.assert_allclose(other, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("inputs", [None, "int8:token", "int8:tensor"])
def test_sharded_over_devices_as_on_one(inputs: str | None) -> None:
    block = Stacked(nnx.Rngs(0))
    qat.prepare(block, _rule(gradient="lsq", activation=inputs), announce=_quiet)
    x = _x(16, 32)
    graphdef, params, rest = nnx.split(block, nnx.Param, ...)

    def gradients(params: Any, rest: Any, x: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            merged = nnx.merge(graphdef, params, rest, copy=True)
            return jnp.mean(merged(x) ** 2), nnx.state(merged, ObserverState)

        return jax.grad(loss, has_aux=True)(params)

    expected = jax.jit(gradients)(params, rest, x)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    sizes = {2: PartitionSpec("fsdp", None), 1: PartitionSpec(), 0: PartitionSpec()}
    sharded = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, sizes[a.ndim])), params)
    rest = jax.device_put(rest, NamedSharding(mesh, PartitionSpec()))
    found = jax.jit(gradients)(sharded, rest, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    for mine, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def test_shard_map_over_the_batch_gives_the_mean_of_gradients() -> None:
    block = Stacked(nnx.Rngs(0))
    qat.prepare(block, _rule(gradient="lsq", activation="int8:token"), announce=_quiet)
    x, mesh = _x(16, 32), Mesh(np.asarray(jax.devices()), ("data",))
    graphdef, params, rest = nnx.split(block, nnx.Param, ...)

    def gradients(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda params: jnp.mean(nnx.merge(graphdef, params, rest, copy=True)(x) ** 2))(params)

    def of_shard(params: Any, x: jax.Array) -> Any:
        return jax.lax.pmean(gradients(params, x), "data")

    specs = (PartitionSpec(), PartitionSpec("data"))
    mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    found, expected = jax.jit(mapped)(params, x), jax.jit(gradients)(params, x)
    for mine, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("kind", ["ours", "linear"])
def test_bfloat16_computes_on_weights_quantized_from_float32(kind: str) -> None:
    """A master cast first would lose what a step changed, and its quantized value the last bits of its scale."""
    model, x = _prepared(kind, ("int4:g16", "lsq"))
    if kind == "linear":
        model.layer.layer.dtype = jnp.bfloat16  # type: ignore[attr-defined]
    parts = split(model, dtype=jnp.bfloat16)
    narrow = parts.structure.merge(parts.structure.computing(parts.trained, jnp.bfloat16), parts.fixed, parts.rest)
    found = _forward(narrow, x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    plain: Any = qat.unwrap(nnx.clone(model)).layer
    weight = plain.weight.get_value() if kind == "ours" else plain.kernel.get_value().T
    bias = plain.bias.get_value().astype(jnp.bfloat16).astype(jnp.float32)
    exact = x.astype(jnp.bfloat16).astype(jnp.float32) @ weight.astype(jnp.bfloat16).astype(jnp.float32).T + bias
    gain = model.gain.get_value().astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), gain * exact, rtol=2e-2, atol=2e-2)

    def loss(trained: dict[str, jax.Array]) -> jax.Array:
        merged = parts.structure.merge(parts.structure.computing(trained, jnp.bfloat16), parts.fixed, parts.rest)
        return jnp.mean(merged(x.astype(jnp.bfloat16)).astype(jnp.float32) ** 2)  # type: ignore[operator]

    for name, gradient in jax.jit(jax.grad(loss))(parts.trained).items():
        assert gradient.dtype == jnp.float32, name
        assert np.any(gradient != 0), name


@pytest.mark.slow
def test_layers_that_compute_in_more_bits_than_they_store() -> None:
    """Values are rounded to what is stored, by kernels too: packed layers give the outputs of training."""
    for mode in ("jnp", "interpret"):
        layer = nnx.Linear(64, 128, param_dtype=jnp.bfloat16, dtype=jnp.float32, rngs=nnx.Rngs(0))
        model, x = Holder(layer), jax.random.normal(jax.random.key(0), (3, 64))
        qat.prepare(model, qat.one_rule("int4:g32", layers=("layer",)), announce=_quiet)
        with dispatch.override(mode):
            trained = _forward(model, x)
            assert np.array_equal(_forward(qat.convert(model), x), trained), mode


def test_weights_are_rounded_once_to_the_dtype_asked_for() -> None:
    matrix, chosen = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16), scheme("int4:g32")
    expected = dequantize(quantize(matrix, chosen), jnp.float32)
    for mode in ("jnp", "interpret"):
        with dispatch.override(mode):
            found = dispatch.fake_quantize(matrix, chosen, dtype=jnp.float32)
            assert np.array_equal(found, expected), mode


def test_gradual_bits_keep_the_range() -> None:
    matrix = _x(16, 64)
    quantizer = WeightQuantizer(matrix, scheme("int2:g32"), gradient="lsq", start="range")
    reach = 3 / 2 * jnp.exp2(quantizer.log_scale.get_value())  # type: ignore[union-attr]
    quantizer.set_scheme(scheme("int6:g32"))
    np.testing.assert_allclose(63 / 2 * quantizer.parameters()[0], reach, rtol=1e-6)
    quantizer.set_scheme(scheme("int2:g32"))
    np.testing.assert_allclose(3 / 2 * quantizer.parameters()[0], reach, rtol=1e-6)


@pytest.mark.parametrize("log_scale", [-1e4, -126.0, 126.0, 1e4])
def test_scales_are_positive_whatever_the_optimizer_does(log_scale: float) -> None:
    quantizer = WeightQuantizer(_x(16, 64), scheme("int4:g32"), gradient="lsq")
    assert quantizer.log_scale is not None
    quantizer.log_scale.set_value(jnp.full_like(quantizer.log_scale.get_value(), log_scale))
    scale = np.asarray(quantizer.parameters()[0])
    assert np.all(scale >= np.finfo(np.float32).smallest_normal)
    assert np.all(np.isfinite(7 * scale))


def test_a_static_range_is_a_running_mean_without_the_bias_of_its_start() -> None:
    quantizer = InputQuantizer(scheme("int8:tensor"), momentum=0.5)
    for factor in (1.0, 3.0):
        quantizer(factor * jnp.asarray([[-1.0, 2.0]]))
    scale, zero = quantizer.parameters()
    assert zero is None
    highest = (0.25 * 2 + 0.5 * 6) / 0.75
    np.testing.assert_allclose(scale, highest / 127.5, rtol=1e-6)


def test_weights_from_the_range_are_those_of_quantize() -> None:
    matrix = _x(16, 64)
    quantizer = WeightQuantizer(matrix, scheme("nf4:g32"))
    assert np.array_equal(
        jax.jit(quantizer)(matrix), jax.jit(lambda w: dequantize(quantize(w, scheme("nf4:g32"))))(matrix)
    )


def test_layers_of_ours_and_flax_are_told_apart() -> None:
    block = Stacked(nnx.Rngs(0))
    qat.prepare(block, _rule(), announce=_quiet)
    assert isinstance(block.first, QATLayer)
    assert isinstance(block.second, QATLinear)
