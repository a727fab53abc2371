"""The cells of a sweep, in order: each scheme, or each scheme with each group size, by each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jquant.core.errors import InputError
from jquant.core.scheme import Scheme, Tensor, scheme, with_group
from jquant.ptq.block import rule_needs_data
from jquant.ptq.methods import SOLVERS
from jquant.ptq.recipe import Rule, one_rule
from jquant.ptq.transforms import TRANSFORMS, configured

ROUNDING = "rtn"  # the method that says nothing further about a cell
_SHARED_TRANSFORMS = ("awq", "smoothquant")  # those that a sweep can run from shared statistics


@dataclasses.dataclass(frozen=True)
class Point:
    """One scheme by one method."""

    scheme: Scheme
    # Transforms, then the solver unless it rounds to nearest, then the scheme of inputs where they are quantized:
    # "gptq", "awq", "awq+gptq", "smoothquant@int8:token"
    method: str

    @cached_property
    def rule(self) -> Rule:
        """What happens to every layer of the sweep."""
        return one_rule(self.method, str(self.scheme)).rules[0]

    @property
    def needs_data(self) -> bool:
        """Whether the method learns from calibration data."""
        return rule_needs_data(self.rule)

    def configs(self) -> dict[str, dict[str, Any]]:
        """The settings of all steps, defaults included: what decides the numbers beside scheme and data."""
        steps = [(TRANSFORMS, step) for step in self.rule.transforms] + [(SOLVERS, self.rule.method)]
        return {
            step.name: dataclasses.asdict(configured(registry, step.name, step.options)) for registry, step in steps
        }

    def __str__(self) -> str:
        return str(self.scheme) if self.method == ROUNDING else f"{self.scheme} {self.method}"


def grid(schemes: Sequence[str], groups: Sequence[int] = (), methods: Sequence[str] = (ROUNDING,)) -> tuple[Point, ...]:
    """Parsed schemes, every one combined with every group size where sizes are given, then by every method.

    Methods of one scheme stand together; repeats are dropped.

    Raises:
        InputError: a spec is malformed, or a method is unknown or not for sweeps.
    """
    parsed = [scheme(spec) for spec in schemes]
    combined = [with_group(spec, size) for spec in parsed for size in groups] if groups else parsed
    if not combined:
        raise InputError("the grid is empty: give at least one scheme")
    names = [_canonical(method) for method in methods]
    return tuple(dict.fromkeys(Point(spec, name) for spec in combined for name in names))


def _canonical(method: str) -> str:
    """The method as cells name it: `awq+rtn` is `awq`."""
    try:
        rule = one_rule(method, "int8:channel").rules[0]
    except InputError as error:
        raise InputError(f"methods: {method!r}: {error}") from error
    transforms = [step.name for step in rule.transforms]
    if any(name not in _SHARED_TRANSFORMS for name in transforms):
        raise InputError(f"methods: {method!r}: sweeps can run {', '.join(_SHARED_TRANSFORMS)}; use jquant quantize")
    solvers = [] if transforms and rule.method.name == ROUNDING else [rule.method.name]
    name = "+".join([*transforms, *solvers])
    if rule.activation is None:
        return name
    activation = scheme(rule.activation)
    if isinstance(activation.granularity, Tensor):
        raise InputError(
            f"methods: {method!r}: sweeps quantize activations with scales of each token, as int8:token; static ones "
            "are found by jquant quantize"
        )
    return f"{name}@{activation}"
