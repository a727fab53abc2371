"""What work costs in time: operations of matrix products, and numbers that are rounded, each at a rate of its own.

A solver and a transform say theirs beside the search that it is of (`Method.cost`, `Transform.cost`), by the same
settings. What a step takes in roundings was measured on a CPU, against `measured_rates` there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.ggml_rows import searches
from jquant.core.scheme import Scheme

Shape = tuple[int, ...]  # of a weight, [out, in] or [experts, out, in]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of some work; costs add up, and are multiplied by how often it is done."""

    operations: float = 0.0  # multiplications and additions of matrix products
    roundings: float = 0.0  # of single numbers, each with its squared error

    def __add__(self, other: Cost) -> Cost:
        return Cost(operations=self.operations + other.operations, roundings=self.roundings + other.roundings)

    def __mul__(self, times: float) -> Cost:
        return Cost(operations=times * self.operations, roundings=times * self.roundings)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Calibration data on its way through a block."""

    windows: int
    window: int = 1  # tokens that see each other
    batch: int = 1  # windows a call
    attention: int = 0  # heads times their size
    experts: int = 1  # that a token goes to, where there are any

    @property
    def tokens(self) -> int:
        return self.windows * self.window

    def rows(self, shape: Shape) -> int:
        """That a layer of this shape reads, and all its experts together."""
        return self.tokens * (self.experts if len(shape) > 2 else 1)

    def passing(self, shapes: Iterable[Shape], *, attends: bool) -> float:
        """Operations a token of the layers of these shapes, and of attention between them."""
        layers = sum(2 * shape[-2] * shape[-1] * (self.experts if len(shape) > 2 else 1) for shape in shapes)
        return layers + (4 * self.window * self.attention if attends else 0)


class Rates(NamedTuple):
    """Of `Cost`'s numbers, a second."""

    operations: float
    roundings: float


def square_error(shape: Shape) -> Cost:
    """Of tr(E·H·Eᵀ)."""
    return Cost(operations=2 * math.prod(shape) * shape[-1])


def rounding(shape: Shape, scheme: Scheme) -> Cost:
    """Of quantizing a weight to nearest, scales included; block types of ggml search theirs."""
    searched = 0 if scheme.block is None else 3 * searches(scheme.block)
    return Cost(roundings=(3 + searched) * math.prod(shape))


def measured_rates() -> Rates:
    """Of one float32 product here, and of numbers rounded."""
    side, count = 1024, 1 << 20
    product = _seconds(jax.jit(lambda x: x @ x), jnp.ones((side, side), jnp.float32), runs=3)
    numbers = jnp.asarray(np.linspace(-8, 8, count, dtype=np.float32))
    return Rates(2 * side**3 / product, count / _seconds(jax.jit(_rounding_error), numbers, runs=20))


def _rounding_error(x: jax.Array) -> jax.Array:
    scale = jnp.max(x) / 7
    return jnp.sum(jnp.square(x - jnp.clip(jnp.round(x / scale), -8, 7) * scale))


def _seconds(program: Callable[[jax.Array], jax.Array], x: jax.Array, *, runs: int) -> float:
    """The least of some runs, once it is compiled."""
    program(x).block_until_ready()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        program(x).block_until_ready()
        found.append(time.perf_counter() - started)
    return min(found)
