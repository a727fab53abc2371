"""Meshes by name, and where parameters and what belongs to them lie."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jquant.core.errors import InputError
from jquant.models.decoder import Decoder
from jquant.nn.mesh import make_mesh
from jquant.nn.placement import parameter_shardings, place_module, state_shardings
from jquant.qat.config import QATConfig
from jquant.qat.forward import block_states
from jquant.qat.losses import distillation_loss, next_token_loss
from jquant.qat.sharding import spread_rows, train_state_shardings
from jquant.qat.state import TrainState, split
from jquant.qat.step import make_step
from jquant.qat.trainer import _Run
from tests.qat.small import Net, batches, squared_error
from tests.tiny_checkpoint import CONFIG, tiny_model


def test_places_follow_the_paths() -> None:
    mesh = make_mesh("data=2,fsdp=4")
    assert mesh is not None
    arrays = {
        "embed.weight": jnp.zeros((257, 64)),
        "blocks.0.q_proj.weight": jnp.zeros((32, 64)),
        "blocks.0.odd.weight": jnp.zeros((30, 64)),
        "blocks.0.prime.weight": jnp.zeros((7, 5)),
        "norm.weight": jnp.zeros((64,)),
    }
    found = parameter_shardings(arrays, mesh)
    assert {name: place.spec for name, place in found.items()} == {
        "embed.weight": PartitionSpec(None, "fsdp"),
        "blocks.0.q_proj.weight": PartitionSpec("fsdp", None),
        "blocks.0.odd.weight": PartitionSpec(None, "fsdp"),
        "blocks.0.prime.weight": PartitionSpec(),
        "norm.weight": PartitionSpec(),
    }
    places = train_state_shardings(optax.adam(1.0).init(arrays), found, mesh)
    assert places[0].mu["embed.weight"].spec == PartitionSpec(None, "fsdp")
    assert places[0].nu["blocks.0.q_proj.weight"].spec == PartitionSpec("fsdp", None)
    assert places[0].count.spec == PartitionSpec()
    three = make_mesh("data=2,fsdp=2,tensor=2")
    assert three is not None
    found = parameter_shardings(arrays, three)
    assert found["blocks.0.q_proj.weight"].spec == PartitionSpec(("tensor", "fsdp"), None)
    assert found["blocks.0.odd.weight"].spec == PartitionSpec(None, ("tensor", "fsdp"))
    assert parameter_shardings(arrays, three, ("tensor",))["blocks.0.q_proj.weight"].spec == PartitionSpec(
        "tensor", None
    )
    rows = spread_rows(jnp.zeros((3, 16, 5)), mesh)
    assert {shard.data.shape for shard in rows.addressable_shards} == {(3, 2, 5)}


def test_a_step_leaves_everything_in_parts() -> None:
    """Masters and moments after a step; each device holds a quarter of a matrix and no more."""
    config = QATConfig(steps=2, batch=8, warmup_steps=0, mesh="data=2,fsdp=2,tensor=2").with_steps(40)
    run = _Run(Net(dropout=0.0), squared_error, batches(config), config, None, None)
    state, _ = run.step(run.structure, None, run.state, run.fixed, None, run._next_batch())
    matrices = [leaf for leaf in jax.tree.leaves((state.trained, state.optimizer)) if leaf.ndim >= 2]
    assert len(matrices) == 6  # two layers, with their means and mean squares
    for leaf in matrices:
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 4}


def test_blocks_are_gathered_one_at_a_time() -> None:
    """What a compiled step needs beside its arguments grows with depth by parts of a block, not by whole ones."""
    mesh, found, block = make_mesh("fsdp=8"), [], 0
    assert mesh is not None
    for layers in (2, 6):
        model = nnx.eval_shape(partial(tiny_model, layers=layers))
        parts, optimizer = split(model), optax.sgd(1.0)
        places = parameter_shardings(parts.trained, mesh)
        shardings: Any = TrainState(places, parts.rest, optimizer.init({}))  # pyright: ignore[reportArgumentType]
        step = make_step(next_token_loss(), optimizer, dtype="float32", shardings=shardings, mesh=mesh)
        tokens = jax.ShapeDtypeStruct((1, 8, 8), np.int32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
        state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            TrainState(parts.trained, parts.rest, optimizer.init({})),
            shardings,
        )
        compiled = step.lower(parts.structure, None, state, parts.fixed, None, tokens).compile()  # pyright: ignore
        found.append(compiled.memory_analysis().temp_size_in_bytes)
        block = sum(leaf.size * 4 for leaf in jax.tree.leaves(nnx.state(model.blocks[0])))
    # Blocks written out one after another grew it by 1.3 of a block each; here it is 0.4.
    assert (found[1] - found[0]) / 4 < 0.75 * block


LONGER = (
    *((mesh, True, 1024) for mesh in ("fsdp=8", "data=2,fsdp=2,tensor=2")),
    *(("fsdp=8", False, vocabulary) for vocabulary in (1023, 1024)),
    ("data=2,fsdp=2,tensor=2", True, 1023),
)


@pytest.mark.parametrize(
    ("mesh", "tied", "vocabulary"),
    [
        ("fsdp=8", True, 1023),
        ("data=2,fsdp=2,tensor=2", False, 1024),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in LONGER),
    ],
)
def test_no_device_gathers_a_table(mesh: str, tied: bool, vocabulary: int) -> None:
    """Embedding and output projection, of model and teacher: a step moves parts, and gives what one device gives."""
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary, num_layers=1, tie_embeddings=tied)
    model, teacher = (Decoder(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    tokens = np.random.default_rng(0).integers(0, vocabulary, (1, 8, 16)).astype(np.int32)
    optimizer, loss, found = optax.sgd(1.0), distillation_loss(weight=0.5, logit_rows=64), []
    for devices in (None, make_mesh(mesh)):
        parts = split(model)
        graphdef, *theirs = nnx.split(teacher, nnx.Param, ...)
        state, shardings = TrainState(parts.trained, parts.rest, optimizer.init({})), None  # pyright: ignore
        if devices is not None:
            places: Any = parameter_shardings(parts.trained, devices)
            copied = NamedSharding(devices, PartitionSpec())
            shardings = TrainState(places, jax.tree.map(lambda _, place=copied: place, parts.rest), state.optimizer)
            state = jax.device_put(state, shardings)
            theirs = [jax.device_put(each, state_shardings(each, devices)) for each in theirs]
        step = make_step(loss, optimizer, dtype="float32", shardings=shardings, mesh=devices)
        operands = (parts.structure, graphdef, jax.tree.map(jnp.array, state), parts.fixed, theirs)
        operands = (*operands, spread_rows(tokens, devices))
        if devices is not None:
            text = step.lower(*operands).compile().as_text()  # pyright: ignore[reportFunctionMemberAccess]
            shapes = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
            assert shapes
            assert not any(f"{vocabulary},64]" in shape for shape in shapes)  # a table
            if vocabulary % 8 == 0:
                assert not any(f",{vocabulary}]" in shape for shape in shapes)  # logits
        found.append(step(*operands))
    (alone, report), (spread, other) = found
    assert float(other.loss) == pytest.approx(float(report.loss), rel=1e-5)
    for name, wanted in alone.trained.items():
        np.testing.assert_allclose(spread.trained[name], wanted, rtol=1e-4, atol=1e-5)


class Uneven(nnx.Module):
    """Blocks of one structure that are given contexts of several."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.blocks = nnx.List([UnevenBlock(rngs) for _ in range(4)])

    def contexts(self, length: int) -> list[Any]:
        gain = jnp.linspace(0.5, 2.0, length)[:, None]
        return [None, {"gain": gain}, {"gain": gain}, {"gain": gain[:1]}]


class UnevenBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array, context: Any) -> jax.Array:
        return x + jnp.tanh(self.layer(x)) * (1.0 if context is None else context["gain"])


def test_blocks_may_be_given_contexts_of_several_kinds() -> None:
    mesh, tokens = make_mesh("fsdp=8"), jnp.arange(24).reshape(8, 3) % 16
    assert mesh is not None

    @nnx.jit
    def states(model: Any) -> list[jax.Array]:
        return block_states(model, tokens, remat=False)

    @nnx.jit
    def spread(model: Any) -> list[jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return block_states(model, tokens, remat=False)

    model = Uneven()
    expected = states(model)
    place_module(model, mesh)
    for found, wanted in zip(spread(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    assert make_mesh("") is None
    for spec in ("model=2", "data", "data=2,"):
        with pytest.raises(InputError, match="write axes of data, fsdp, tensor"):
            make_mesh(spec)
    with pytest.raises(InputError, match="asks for 64 devices, there are 8: "):
        make_mesh("data=64")
    with pytest.raises(InputError, match="a batch of 9 rows on 8 devices"):
        spread_rows(jnp.zeros((1, 9)), make_mesh("data=8"))
