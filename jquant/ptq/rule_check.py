"""What is refused before the work: rules that a layer, a method or the lack of data does not allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import jax

from jquant.calib.gram import Gram
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.nn.surgery import Path
from jquant.ptq.block import rule_needs_data, solve
from jquant.ptq.data import Products
from jquant.ptq.methods import SOLVERS
from jquant.ptq.recipe import Rule
from jquant.ptq.transforms import configured

EMBEDDING = "embed"


def check_rules(rules: Mapping[Path, Rule], shapes: Mapping[Path, tuple[int, ...]], has_data: bool) -> None:
    """Raises InputError naming layer and rule where one cannot be done; nothing is computed."""
    seen: set[tuple[Rule, tuple[int, ...]]] = set()
    for path, rule in rules.items():
        if rule_needs_data(rule) and not has_data:
            raise InputError(
                f"layer {path}: {rule.method.name} and its transforms learn from data: give calibration text"
            )
        if path == EMBEDDING and (rule_needs_data(rule) or rule.activation):
            raise InputError(f"layer {path}: an embedding has no input to learn from; use rtn, rtn-mse or hqq for it")
        if (rule, shapes[path]) in seen:
            continue
        seen.add((rule, shapes[path]))
        try:
            abstract_solution(rule, shapes[path])
        except InputError as error:
            raise InputError(f"layer {path}: {error}") from error


def check_products(products: str, rules: Mapping[Path, Rule]) -> None:
    """Raises InputError where there are none of that dtype, or there would be none at all."""
    if products not in get_args(Products):
        raise InputError(f"products of {products!r}: there are {', '.join(get_args(Products))}")
    if products != "float32" and not any(map(rule_needs_data, rules.values())):
        raise InputError(f"products of {products}: no method of the recipe learns from data; leave it at float32")


def abstract_solution(rule: Rule, shape: tuple[int, ...]) -> Any:
    """The shapes of the rule's solution on a weight of this shape. Raises InputError where the method refuses it."""
    method, known = SOLVERS[rule.method.name], scheme(rule.scheme or "")
    weight, square, rows = (_float32(*each) for each in (shape, (*shape[:-2], shape[-1], shape[-1]), shape[:-2]))
    gram = Gram(square, rows)
    if method.programs is not None and len(shape) == 2:  # those that will run: what is traced here serves them
        config = configured(SOLVERS, rule.method.name, rule.method.options)
        return method.programs(weight, gram, known, config)[-1].out_info
    return jax.eval_shape(lambda weight, gram: solve(weight, gram, known, rule), weight, gram)


def _float32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, "float32")
