"""What is refused before the work: rules that a layer, a method or the lack of data does not allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax

from jquant.calib.gram import Gram
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.nn.protocol import Equivalence
from jquant.nn.surgery import Path
from jquant.nn.w8a8 import check_multipliable
from jquant.ptq.ahead import traced_solver
from jquant.ptq.block import MASKED_EXPERTS, fitting_places, rule_needs_data, solve, uses_gram
from jquant.ptq.data import Products
from jquant.ptq.recipe import Rule

EMBEDDING = "embed"


def check_rules(
    rules: Mapping[Path, Rule],
    shapes: Mapping[Path, tuple[int, ...]],
    has_data: bool,
    *,
    places: Sequence[Equivalence] = (),
    masked: bool = False,
) -> None:
    """Raises InputError naming layer and rule where one cannot be done; nothing is computed.

    Args:
        rules: of the layers that are to be quantized.
        shapes: of their weights.
        has_data: whether there is calibration data.
        places: of every block, where transforms may fold scales.
        masked: whether the data has masks.
    """
    seen: set[tuple[Rule, tuple[int, ...]]] = set()
    for path, rule in rules.items():
        if rule_needs_data(rule) and not has_data:
            raise InputError(
                f"layer {path}: {rule.method.name} and its transforms learn from data: give calibration text"
            )
        if path == EMBEDDING and (rule_needs_data(rule) or rule.activation):
            raise InputError(f"layer {path}: an embedding has no input to learn from; use rtn, rtn-mse or hqq for it")
        if masked and len(shapes[path]) > 2 and rule_needs_data(rule):
            raise InputError(f"layer {path}: {MASKED_EXPERTS}")
        if (rule, shapes[path]) in seen:
            continue
        seen.add((rule, shapes[path]))
        try:
            abstract_solution(rule, shapes[path])
            if rule.activation is not None:
                check_multipliable(scheme(rule.scheme or ""), scheme(rule.activation), shapes[path][-1])
        except InputError as error:
            raise InputError(f"layer {path}: {error}") from error
    _check_places(rules, places)


def _check_places(rules: Mapping[Path, Rule], places: Sequence[Equivalence]) -> None:
    """Every transform, in every block where a rule asks for it."""
    parts: dict[str, dict[Path, Rule]] = {}
    for path, rule in rules.items():
        if rule.transforms:
            names = path.split(".")
            depth = 2 if names[0] == "blocks" else min(1, len(names) - 1)
            prefix = "".join(f"{name}." for name in names[:depth])
            parts.setdefault(prefix, {})[path.removeprefix(prefix)] = rule
    for prefix, inside in parts.items():
        for step in dict.fromkeys(step for rule in inside.values() for step in rule.transforms):
            wanted = [path for path, rule in inside.items() if step in rule.transforms]
            fitting_places(step, wanted, places if prefix.startswith("blocks.") else (), prefix)


def check_products(products: str, rules: Mapping[Path, Rule]) -> None:
    """Raises InputError where there are none of that dtype, or there would be none at all."""
    if products not in get_args(Products):
        raise InputError(f"products of {products!r}: there are {', '.join(get_args(Products))}")
    if products != "float32" and not any(map(rule_needs_data, rules.values())):
        raise InputError(f"products of {products}: no method of the recipe learns from data; leave it at float32")


def inputs_of_gram(rules: Mapping[Path, Rule], shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, int]:
    """How many inputs the layers have whose rules learn from the Gram matrix of these."""
    return {path: shapes[path][-1] for path, rule in rules.items() if uses_gram(rule)}


def abstract_solution(rule: Rule, shape: tuple[int, ...]) -> Any:
    """The shapes of the rule's solution on a weight of this shape. Raises InputError where the method refuses it."""
    weight = jax.ShapeDtypeStruct(shape, "float32")
    programs = traced_solver(weight, rule)
    if programs is not None:  # those that will run: what is traced here serves them
        return programs[-1].out_info
    square, rows = (jax.ShapeDtypeStruct((*shape[:-2], *more), "float32") for more in ((shape[-1],) * 2, ()))
    return jax.eval_shape(
        lambda weight, square, rows: solve(weight, Gram(square, rows), scheme(rule.scheme or ""), rule),
        *(weight, square, rows),
    )
