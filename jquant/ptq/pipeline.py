"""Quantizes a model block by block: load one, learn from what enters it, solve, go on with what it gives, write it out.

    quantize_model(model, recipe, batches)                    a model in memory
    quantize_blocks(source, recipe, batches, workdir=…)       one that is loaded a block at a time, and may be resumed

Memory holds one block, its statistics and the activations of the calibration data, which may go to disk. Each finished
block is a point to go on from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jquant.calib import gram
from jquant.core.errors import InputError
from jquant.io.freed_memory import return_freed_memory
from jquant.kernels.dispatch import quick_compilation
from jquant.nn.install import activations_of, install, tensors_of
from jquant.nn.linear import Quantized
from jquant.nn.matrices import layer_shapes, packed_paths
from jquant.nn.placement import batch_sharding, copied, fetched, place_module, spread_batch
from jquant.nn.protocol import CausalLM, apply
from jquant.nn.surgery import Path, replace
from jquant.ptq.activations import InMemory, Store
from jquant.ptq.ahead import Ahead
from jquant.ptq.block import Solved, block_outputs, quantize_block, rule_needs_data, solve
from jquant.ptq.coverage import Coverage, LayerReport, TransformReport
from jquant.ptq.data import Data, Products, check_tokens
from jquant.ptq.recipe import Recipe, Rule, assign, refuse_packed
from jquant.ptq.rule_check import EMBEDDING, check_products, check_rules, inputs_of_gram
from jquant.ptq.solver import check_finite
from jquant.ptq.source import ModelSource, Source
from jquant.ptq.whole_module import quantize_whole
from jquant.ptq.workdir import Workdir

_STATES = "states"  # key of what enters the block at hand


@dataclass(frozen=True, kw_only=True)
class Event:
    """A part was finished, or found finished."""

    part: str  # "block-0003", "outer"
    done: int
    total: int
    reports: tuple[LayerReport, ...]
    seconds: float
    found: bool  # an earlier run finished it


Listener = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What stays the same through a run."""

    rules: Mapping[Path, Rule]
    batches: Sequence[Any] | None
    masks: Sequence[Any] | None
    contexts: Sequence[Any]
    store: Store
    mesh: Mesh | None
    workdir: Workdir | None
    needs_data: bool
    products: Products
    ahead: Ahead


def quantize_model(
    model: Any,
    recipe: Recipe,
    batches: Sequence[Any] | None = None,
    *,
    masks: Sequence[Any] | None = None,
    mesh: Mesh | None = None,
    workdir: Workdir | None = None,
    store: Store | None = None,
    progress: Listener | None = None,
    products: Products = "float32",
) -> tuple[Any, Coverage]:
    """Quantizes a model in place.

    Args:
        model: a decoder in three parts (nn/protocol.py); or any NNX module, which is then one block.
        recipe: what happens to which layers.
        batches: calibration data: token ids int32 [batch, time], all of one shape; for other modules the arrays, or
            tuples of arrays, that they are called with. None where no rule needs data.
        masks: one a batch, bool, True for the positions that count; None where there is no padding.
        mesh: of nn/mesh.py: batches are spread over "data", rows of weights over "fsdp" and "tensor". Gram matrices are
            summed over "data" and whole on every device, as their factors are.
        workdir: keeps finished parts, so that a killed run goes on (ptq/workdir.py).
        store: of activations; by default in memory.
        progress: hears of every finished block, and what became of each of its layers.
        products: what the factors of products are rounded to, and of Gram matrices, while calibration data go through
            the layers that have a rule, but for stacks of experts, and through attention between such layers; sums, and
            all between products, are float32 either way, and so are the statistics of transforms. Of GPTQ's report
            `rounding_error` and what errors are relative to are then of rounded factors too, up to 0.2 % off.
            bfloat16 takes two thirds of the time on a CPU that has instructions for it (avx512_bf16, amx_bf16), and may
            take longer on one without. Perplexities are the same to GPTQ's noise: SmolLM2's of int4 41.3 for 41.4.

    Returns:
        The model, its layers replaced by packed ones, and the coverage report.

    Raises:
        InputError: the recipe does not fit the model, or the data does not fit either; products are of a dtype
            that there is not, or of bfloat16 and the model is no decoder.
    """
    store = InMemory() if store is None else store
    refuse_packed(recipe, list(layer_shapes(model)), packed_paths(model))
    if not all(hasattr(model, part) for part in ("embed", "blocks", "head")):
        if products != "float32":
            raise InputError(f"products of {products}: only layers of a decoder multiply in it; leave it at float32")
        coverage = quantize_whole(model, recipe, batches, masks, mesh, store)
        if progress is not None:
            event = Event(
                part="module", done=1, total=1, reports=coverage.layers, seconds=coverage.seconds, found=False
            )
            progress(event)
        return model, coverage
    decoder = cast(CausalLM, model)

    def put_back(index: int, block: nnx.Module) -> None:
        decoder.blocks[index] = block

    coverage = quantize_blocks(
        ModelSource(decoder),
        recipe,
        batches,
        masks=masks,
        mesh=mesh,
        workdir=workdir,
        store=store,
        progress=progress,
        put_back=put_back,
        products=products,
    )
    return model, coverage


@quick_compilation()
def quantize_blocks(
    source: Source,
    recipe: Recipe,
    batches: Sequence[Any] | None,
    *,
    workdir: Workdir | None,
    masks: Sequence[Any] | None = None,
    mesh: Mesh | None = None,
    store: Store | None = None,
    progress: Listener | None = None,
    put_back: Callable[[int, nnx.Module], None] | None = None,
    products: Products = "float32",
) -> Coverage:
    """Quantizes a decoder whose blocks come from `source`; finished ones go to `workdir` and to `put_back`.

    Arguments, errors as `quantize_model`.
    """
    started = time.perf_counter()
    shapes = source.shapes()
    rules = assign(recipe, list(shapes))
    check_rules(rules, shapes, batches is not None, places=source.equivalences(), masked=masks is not None)
    check_products(products, rules)
    needs_data = any(map(rule_needs_data, rules.values()))
    length = 1
    if needs_data:
        assert batches is not None
        check_tokens(batches, masks, shapes[EMBEDDING][0] if EMBEDDING in shapes else None)
        counted = [batch.size for batch in batches] if masks is None else [int(fetched(mask).sum()) for mask in masks]
        gram.check_rows(inputs_of_gram(rules, shapes), sum(counted))
        gram.warn_of_few(inputs_of_gram(rules, shapes), sum(counted))
        length = batches[0].shape[1]
    run = _Run(
        rules=rules,
        batches=batches if needs_data else None,
        masks=masks,
        contexts=copied(source.contexts(length), mesh),
        store=InMemory() if store is None else store,
        mesh=mesh,
        workdir=workdir,
        needs_data=needs_data,
        products=products,
        ahead=Ahead(enabled=mesh is None),
    )
    layers: list[LayerReport] = []
    transforms: list[TransformReport] = []
    ready = -1  # the block whose inputs are in the store; < 0: none has been quantized, and programs are compiled
    for index in range(source.depth + 1):
        began = time.perf_counter()
        part = f"block-{index:04d}" if index < source.depth else "outer"
        found = None if workdir is None else workdir.record(part)
        if found is not None:
            reports = [LayerReport.from_json(record) for record in found["layers"]]
            rewritten = [TransformReport.from_json(record) for record in found["transforms"]]
            if put_back is not None:
                _restore(source, workdir, part, index, found["activations"], put_back, mesh)
        else:
            reports, rewritten = _quantize_part(run, source, index, ready, put_back)
            ready = index + 1
        layers += reports
        transforms += rewritten
        if progress is not None:
            seconds = time.perf_counter() - began
            event = Event(
                part=part,
                done=index + 1,
                total=source.depth + 1,
                reports=tuple(reports),
                seconds=seconds,
                found=found is not None,
            )
            progress(event)
    left = tuple(path for path in shapes if path not in rules)
    seconds = time.perf_counter() - started
    return Coverage(layers=tuple(layers), transforms=tuple(transforms), left_alone=left, seconds=seconds)


def _quantize_part(
    run: _Run, source: Source, index: int, ready: int, put_back: Callable[[int, nnx.Module], None] | None
) -> tuple[list[LayerReport], list[TransformReport]]:
    """One block, or what is outside of them. A function of its own: no part waits for the next one to be let go."""
    if run.needs_data and ready != index:
        _load_states(run, source, index)
    if index == source.depth:
        solved = _outer(run, source.outer())
    else:
        module = source.block(index)
        solved = _one_block(run, module, index, source, return_freed_memory if ready < 0 else _nothing)
        if put_back is not None:
            put_back(index, module)
    return_freed_memory()  # once: after every step of later parts too it took 2.5 CPU s of SmolLM2's 115
    return solved.reports, solved.transforms


def _nothing() -> None: ...


def _one_block(run: _Run, block: nnx.Module, index: int, source: Source, after_step: Callable[[], None]) -> Solved:
    """Quantizes a block, leaves it packed, and puts what it gives where the next one looks."""
    prefix = f"blocks.{index}."
    rules = {path.removeprefix(prefix): rule for path, rule in run.rules.items() if path.startswith(prefix)}
    data = _data(run, lambda state: (state, run.contexts[index]), rules) if run.needs_data else None
    solved = Solved({}, [], [])
    if run.mesh is not None:
        place_module(block, run.mesh, prefix=prefix)
    if rules:
        solved = quantize_block(
            block,
            rules,
            data,
            equivalences=source.equivalences(),
            prefix=prefix,
            ahead=run.ahead,
            after_step=after_step,
        )
    if data is not None:
        output = block_outputs(block, solved, data, ahead=run.ahead)
        for batch in range(data.count):
            run.store.put(_STATES, batch, spread_batch(output(batch), run.mesh))
        for path in solved.layers:
            run.store.drop(path)
        if run.workdir is not None:
            run.workdir.save_states(index + 1, _States(run.store, data.count))
    replace(block, solved.layers)
    if run.workdir is not None:
        run.workdir.finish(f"block-{index:04d}", tensors_of(block, prefix=prefix), _record(block, solved, prefix))
    return solved


def _outer(run: _Run, model: Any) -> Solved:
    """Quantizes embedding and output projection, where rules name them."""
    rules = {path.removeprefix("head."): rule for path, rule in run.rules.items() if path.startswith("head.")}
    data = _data(run, lambda state: (state,), rules) if run.needs_data else None
    solved = Solved({}, [], [])
    if run.mesh is not None:
        place_module(model.embed, run.mesh, prefix="embed.")
        place_module(model.head, run.mesh, prefix="head.")
    if rules:
        solved = quantize_block(model.head, rules, data, prefix="head.")
        replace(model.head, solved.layers)
    if EMBEDDING in run.rules:
        solved.reports.append(_quantize_embedding(model.embed, run.rules[EMBEDDING]))
    if run.workdir is not None:
        tensors = tensors_of(model.embed, prefix="embed.")
        tensors |= {
            path: value
            for path, value in tensors_of(model.head, prefix="head.").items()
            if not path.startswith("head.embed.")  # tied: it is the embedding above
        }
        run.workdir.finish("outer", tensors, _record(model.head, solved, "head."))
    return solved


def _quantize_embedding(embedding: Any, rule: Rule) -> LayerReport:
    from jquant.core.scheme import scheme
    from jquant.ptq.block import weight_report

    started = time.perf_counter()
    weight = embedding.weight.get_value()
    check_finite(weight, EMBEDDING)
    solution = solve(weight, None, scheme(rule.scheme or ""), rule)
    embedding.weight = Quantized(solution.qtensor)
    return weight_report(EMBEDDING, rule, weight, solution, None)(time.perf_counter() - started)


def _record(module: nnx.Module, solved: Solved, prefix: str) -> dict[str, Any]:
    return {
        "layers": [report.as_json() for report in solved.reports],
        "transforms": [report.as_json() for report in solved.transforms],
        "activations": activations_of(module, prefix=prefix),
    }


def _restore(
    source: Source,
    workdir: Workdir | None,
    part: str,
    index: int,
    activations: Mapping[Path, str],
    put_back: Callable[[int, nnx.Module], None],
    mesh: Mesh | None,
) -> None:
    """A part that an earlier run finished, into the model."""
    assert workdir is not None
    tensors = workdir.read(part)
    if index == source.depth:
        install(source.outer(), tensors, activations)
        return
    prefix, block = f"blocks.{index}.", source.block(index)
    inner = {path.removeprefix(prefix): value for path, value in tensors.items()}
    install(block, inner, {path.removeprefix(prefix): spec for path, spec in activations.items()})
    if mesh is not None:
        place_module(block, mesh, prefix=prefix)
    put_back(index, block)


class _States(Sequence[Any]):
    """What is in the store, one batch at a time."""

    def __init__(self, store: Store, batches: int) -> None:
        self.store, self.batches = store, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: Any) -> Any:
        if batch >= self.batches:
            raise IndexError(batch)
        return self.store.get(_STATES, batch)


def _load_states(run: _Run, source: Source, index: int) -> None:
    """What enters block `index` into the store: from the embedding, or as an earlier run left it."""
    assert run.batches is not None
    if index == 0:
        embed = source.outer().embed
        if run.mesh is not None:
            place_module(embed, run.mesh, prefix="embed.")
        for batch, tokens in enumerate(run.batches):
            run.store.put(_STATES, batch, spread_batch(apply(embed, spread_batch(tokens, run.mesh)), run.mesh))
        return
    assert run.workdir is not None
    embed = source.outer().embed
    state = jax.eval_shape(lambda tokens: embed(tokens), jnp.asarray(run.batches[0]))  # pyright: ignore[reportCallIssue]
    batches = run.workdir.load_states(index, len(run.batches), state, batch_sharding(run.mesh))
    if batches is None:
        raise InputError(f"{run.workdir.path}: what enters block {index} is missing; remove the folder to start again")
    for batch, value in enumerate(batches):
        run.store.put(_STATES, batch, value)


def _data(run: _Run, arguments: Callable[[Any], tuple[Any, ...]], rules: Mapping[Path, Rule]) -> Data:
    assert run.batches is not None
    return Data(
        count=len(run.batches),
        arguments=lambda batch: arguments(run.store.get(_STATES, batch)),
        mask=lambda batch: None if run.masks is None else spread_batch(jnp.asarray(run.masks[batch]), run.mesh),
        store=run.store,
        narrow=tuple(rules) if run.products == "bfloat16" else (),
    )
