"""Scales and zero points of GPTQ's groups: of whole groups of columns, wherever these come from.

Reference: as gptq.py, which says when a group's parameters are chosen and from what.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jquant.core.qtensor import Parameters as Chosen
from jquant.core.qtensor import choose_parameters
from jquant.core.range_search import RangeSearch, scheme_of_search, search_parameters
from jquant.core.scheme import Scheme
from jquant.kernels import dispatch, range_search
from jquant.ptq.gptq_columns import Columns, alive
from jquant.ptq.gptq_factor import GPTQConfig

_TILES = 8192  # whose ranges are searched side by side: what is made of them stays in the cache


class Parameters(NamedTuple):
    """Of all groups, filled in as groups are reached."""

    target: Array  # [groups, row tiles] float32, the scale before it is rounded to the scheme's format
    scale: Array  # [groups, row tiles] what is divided by
    zero: Array  # [groups, row tiles]


class Plan(NamedTuple):
    """What is static while columns are rounded."""

    scheme: Scheme
    group: int
    config: GPTQConfig
    way: dispatch.Way


def choose(columns: Columns, importance: Array, group: int, outer: Array | None, plan: Plan) -> Parameters:
    """Of whole groups of so many columns, as many as `importance` has entries; on CPU a few groups at a time.

    Args:
        columns: of the weight.
        importance: [groups · group], H_jj of each column; 0 of dead inputs.
        group: columns of one.
        outer: second level of nested scales.
        plan: scheme and search.
    """
    rows = jax.eval_shape(lambda: columns(0, 1)).shape[1]
    groups = len(importance) // group
    tile_rows = plan.scheme.granularity.tile(rows, group)[0]
    known = plan.config.range != "minmax" and plan.way != "jnp"
    if known and range_search.fits(plan.scheme, group, tile_rows):
        found = range_search.search_parameters(
            alive(columns(0, len(importance)), importance),
            group,
            plan.scheme,
            importance=importance if plan.config.range == "output" else None,
            config=_search(plan),
            interpret=plan.way == "interpret",
        )
        return _by_groups(found)
    most = groups if plan.way != "jnp" else -(-_TILES // -(-rows // tile_rows))
    stretches = -(-groups // most)
    together = -(-groups // stretches)
    again = stretches * together - groups  # the last stretch begins so many groups earlier: one program searches all

    def some(begin: Array | int, count: int) -> Parameters:
        weights = jax.lax.dynamic_slice_in_dim(importance, begin * group, count * group)
        values = alive(columns(begin * group, count * group), weights)
        if plan.way == "jnp":  # turned once, and not by every try that reads them
            values = jax.lax.optimization_barrier(values)
        return _choose_together(values, weights, group, tile_rows, outer, plan)

    begins = jnp.minimum(jnp.arange(stretches) * together, groups - together)
    _, found = jax.lax.scan(lambda _, begin: (None, some(begin, together)), None, begins)
    found = jax.tree.map(lambda each: each.reshape(-1, each.shape[-1]), found)
    if not again:
        return found
    known = groups - together + again  # of all stretches but the last
    return jax.tree.map(lambda each: jnp.concatenate([each[:known], each[known + again :]]), found)


def _choose_together(
    columns: Array, importance: Array, group: int, tile_rows: int, outer: Array | None, plan: Plan
) -> Parameters:
    scheme, rows = scheme_of_search(plan.scheme), columns.shape[1]
    tiles = jnp.pad(columns.T, ((0, -rows % tile_rows), (0, 0))).reshape(-1, tile_rows, len(columns) // group, group)
    if plan.config.range == "minmax":
        return _by_groups(choose_parameters(tiles, scheme, outer=outer))
    weights = importance.reshape(1, 1, -1, group) if plan.config.range == "output" else None
    return _by_groups(search_parameters(tiles, scheme, outer=outer, importance=weights, config=_search(plan)))


def _search(plan: Plan) -> RangeSearch:
    return RangeSearch(exponent=2.0) if plan.config.range == "output" else RangeSearch()


def _by_groups(found: Chosen) -> Parameters:
    zero = jnp.zeros_like(found.scale) if found.zero_point is None else found.zero_point
    return Parameters(found.target.T, found.scale.T, zero.T)
