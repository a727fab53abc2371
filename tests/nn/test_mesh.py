"""Meshes by name, where arrays lie on them, and that what is computed there gathers no weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jquant.calib import gram
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme
from jquant.evaluation import scoring
from jquant.models import generate, split
from jquant.models.checkpoint import open_checkpoint
from jquant.models.decoder import Decoder
from jquant.nn import protocol
from jquant.nn.mesh import make_mesh, mesh_of, mesh_text, parse_mesh
from jquant.nn.placement import copied, fetched, place_module, placed, spread_batch
from jquant.ptq import gptq, gptq_factor, layer_programs
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import tiny_model, write

MESH = "data=2,fsdp=2,tensor=2"
TIME = 40  # unlike any size of the model: activations and weights are told apart by their shapes


def mesh_for(spec: str = MESH) -> Mesh:
    mesh = make_mesh(spec)
    assert mesh is not None
    return mesh


def test_a_mesh_by_name() -> None:
    assert make_mesh("") is None
    assert parse_mesh("tensor=4, data = 2") == {"data": 2, "tensor": 4}
    mesh = mesh_for("tensor=4,data=2")
    assert mesh_text(mesh) == "data=2,tensor=4"
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2
    assert mesh_for("fsdp=2").size == 2  # a part of the devices
    for spec in ("model=2", "data", "data=2,", "data=2;fsdp=4"):
        with pytest.raises(InputError, match=r"write axes of data, fsdp, tensor with their devices, as data=2,fsdp=4"):
            make_mesh(spec)
    with pytest.raises(InputError, match=r"'fsdp=2,data=0': an axis has at least 1 device"):
        make_mesh("fsdp=2,data=0")
    with pytest.raises(InputError, match=r"'data=2,data=2': data stands there twice"):
        make_mesh("data=2,data=2")
    with pytest.raises(InputError, match=r"'data=4,fsdp=4' asks for 16 devices, there are 8: .*choose sizes"):
        make_mesh("data=4,fsdp=4")


def test_batches_and_small_arrays() -> None:
    mesh = mesh_for()
    spread = spread_batch(np.arange(8).reshape(4, 2), mesh)
    assert {shard.data.shape for shard in spread.addressable_shards} == {(2, 2)}
    assert mesh_of({"a": spread}) == mesh
    np.testing.assert_array_equal(fetched(spread), np.arange(8).reshape(4, 2))
    with pytest.raises(InputError, match="a batch of 3 on 2 devices: it must divide"):
        spread_batch(np.zeros((3, 2)), mesh)
    assert spread_batch(1, None) == 1


@pytest.mark.parametrize("spec", [None, "int4:g32:asym", pytest.param("nf4:g32:dq", marks=pytest.mark.slow)])
def test_a_checkpoint_is_loaded_in_parts(spec: str | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each device is given its own rows and no whole matrix; packed codes likewise."""
    model = open_checkpoint(write(tmp_path_factory.mktemp("tiny") / "model")).model(mesh=mesh_for())
    if spec is not None:
        quantize_layers(model, scheme(spec))
    for path, variable in nnx.to_flat_state(nnx.state(model.blocks)):
        value = variable.get_value()
        leaf = value.planes[0] if isinstance(value, QTensor) else value
        parts = 4 if leaf.ndim == 2 else 1
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, path
    assert model.embed.weight.get_value().sharding.spec == PartitionSpec(None, ("tensor", "fsdp"))


@pytest.mark.parametrize("spec", [None, "int4:g32:asym"])
def test_a_forward_pass_gathers_no_weight(spec: str | None) -> None:
    """Evaluation's three programs and generation's step: activations travel, weights and packed codes do not."""
    model, mesh = _placed_model(spec), mesh_for()
    weights = _matrices(model)
    tokens = spread_batch(np.zeros((2, TIME), np.int32), mesh)
    context = copied(model.contexts(TIME)[0], mesh)
    x = protocol.apply(model.embed, tokens)
    scored = spread_batch(np.ones((2, TIME - 1), bool), mesh)
    pieces = {name: nnx.split(part) for name, part in (("embed", model.embed), ("block", model.blocks[0]))}
    head, state = nnx.split(model.head)
    programs = {
        "embed": protocol._apply.lower(*pieces["embed"], tokens),
        "block": protocol._apply.lower(*pieces["block"], x, context),
        "head": scoring._score_rows.lower(head, None, state, None, x, None, tokens, scored),
    }
    parts, caches = split.split(model), tuple(generate._empty_caches(model, 256))
    kinds = model.config.is_windowed()[:1]
    hidden, contexts = generate._embed(
        parts.embed.module, model.config, 256, parts.embed.leaves, np.zeros((1, 1), np.int32), np.int32(0)
    )
    run = parts.token_runs[0]
    programs["step"] = generate._step.lower(
        run.module, kinds, run.leaves, hidden, contexts, caches[:1], parts.cache_place
    )
    for name, program in programs.items():
        assert not weights & set(_moved(program.compile().as_text())), name


def test_statistics_are_summed_and_rows_solved_apart() -> None:
    """A Gram matrix is one sum over "data"; GPTQ with range search, errors and decoding gather no weight."""
    mesh, rng = mesh_for(), np.random.default_rng(0)
    weight = placed("blocks.0.q_proj.weight", rng.normal(size=(2048, 64)).astype(np.float32), mesh)
    x = spread_batch(rng.normal(size=(4, TIME, 64)).astype(np.float32), mesh)
    update = layer_programs.update.lower(gram.init(64), x, None).compile().as_text()
    assert update is not None
    assert len(re.findall(r"= \S+ all-reduce\(", update)) == 1
    assert not set(_moved(update))
    sums = layer_programs.update(gram.init(64), x, None)
    statistics = layer_programs.finalizing(sums)(sums)
    config, spec = gptq.GPTQConfig(), scheme("int4:g32:asym")
    factor = gptq_factor.factorize_in_place(statistics, config=config)
    solve = gptq._solve.lower(weight, factor, spec, config, "jnp")
    found = gptq._solve(weight, factor, spec, config, "jnp").qtensor
    programs = [
        solve,
        layer_programs._rounded.lower(weight, spec),
        layer_programs._difference.lower(weight, found, factor.order),
        layer_programs._squares.lower(weight, factor.gram, "float32"),
        layer_programs.decoded.lower(found),
    ]
    for program in programs:
        assert not list(_moved(program.compile().as_text()))
    assert {shard.data.shape for shard in found.planes[0].addressable_shards} == {(512, 32)}


def _placed_model(spec: str | None) -> Decoder:
    model = tiny_model()
    if spec is not None:
        quantize_layers(model, scheme(spec))
    place_module(model, mesh_for())
    return model


def _matrices(model: Decoder) -> set[tuple[int, ...]]:
    """Of all weights and packed codes, sizes in rising order: a program may turn them. Scales are smaller."""
    leaves = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if leaf.ndim >= 2 and min(leaf.shape) > 8]
    return {tuple(sorted(leaf.shape)) for leaf in leaves}


def _moved(program: str | None) -> Iterator[tuple[int, ...]]:
    """Sizes of what a compiled program gathers or sends as it is."""
    assert program is not None
    for line in program.splitlines():
        found = re.search(r"= (.*?) (all-gather|all-to-all|collective-permute)(-start)?\(", line)
        for shape in re.findall(r"\[([0-9,]*)\]", found[1]) if found else ():
            yield tuple(sorted(int(size) for size in shape.split(",") if size not in ("", "1")))


def _unused(_: Any) -> None: ...
