"""Quantizes a module that is no decoder: all of it is one block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jquant.core.errors import InputError
from jquant.nn.matrices import layer_shapes
from jquant.nn.placement import place_module, spread_batch
from jquant.nn.surgery import module_at, replace
from jquant.ptq.activations import Store
from jquant.ptq.block import check_input_layer, quantize_block, rule_needs_data
from jquant.ptq.coverage import Coverage
from jquant.ptq.data import Data, check_arrays, check_masks
from jquant.ptq.recipe import Recipe, assign
from jquant.ptq.rule_check import check_rules


def quantize_whole(
    model: nnx.Module,
    recipe: Recipe,
    batches: Sequence[Any] | None,
    masks: Sequence[Any] | None,
    mesh: Mesh | None,
    store: Store,
) -> Coverage:
    """In place; arguments as of `pipeline.quantize_model`."""
    started = time.perf_counter()
    shapes = layer_shapes(model)
    rules = assign(recipe, list(shapes))
    check_rules(rules, shapes, batches is not None, masked=masks is not None)
    for path, rule in rules.items():
        if rule.activation is not None:
            try:
                check_input_layer(module_at(model, path), rule.activation)
            except InputError as error:
                raise InputError(f"layer {path}: {error}") from error
    data = None
    if any(map(rule_needs_data, rules.values())):
        assert batches is not None
        given = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
        if not given:
            raise InputError("the recipe's methods learn from data: give at least one calibration batch")
        check_arrays(given)
        check_masks(masks, len(given))
        data = Data(
            count=len(given),
            arguments=lambda batch: spread_batch(given[batch], mesh),
            mask=lambda batch: None if masks is None else spread_batch(jnp.asarray(masks[batch]), mesh),
            store=store,
        )
    if mesh is not None:
        place_module(model, mesh)
    solved = quantize_block(model, rules, data)
    for path in solved.layers:
        store.drop(path)
    replace(model, solved.layers)
    left = tuple(path for path in shapes if path not in rules)
    return Coverage(
        layers=tuple(solved.reports),
        transforms=tuple(solved.transforms),
        left_alone=left,
        seconds=time.perf_counter() - started,
    )
