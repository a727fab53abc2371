"""Meshes by name, and where parameters and what belongs to them lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from jquant.core.errors import InputError
from jquant.nn.mesh import make_mesh
from jquant.nn.placement import parameter_shardings
from jquant.qat.config import QATConfig
from jquant.qat.sharding import spread_rows, train_state_shardings
from jquant.qat.trainer import _Run
from tests.qat.small import Net, batches, squared_error


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


def test_what_is_refused() -> None:
    assert make_mesh("") is None
    for spec in ("model=2", "data=0", "data", "data=2,data=2", "data=2,"):
        with pytest.raises(InputError, match="write axes of data, fsdp, tensor"):
            make_mesh(spec)
    with pytest.raises(InputError, match="asks for 64 devices, there are 8: "):
        make_mesh("data=64")
    with pytest.raises(InputError, match="a batch of 9 rows on 8 devices"):
        spread_rows(jnp.zeros((1, 9)), make_mesh("data=8"))
