"""Ranges that lose least: a scale may clip the few largest of a group to serve the many better.

    p* = argmin_p Σ |x − dequantize(quantize(x; p · range))|^2.4,    p = 1, 1 − 1/100, …, down to 1 − 0.8

for each group alone; of equal ones the widest. The range is shrunk before its scale is rounded to the scheme's format:
so power-of-two scales may drop by whole powers, and nested scales keep the second level of the whole matrix.

Reference: IST-DASLab/gptq, quant.py, `find_params` with mse=True; the constants are its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jquant.core.division import exact_ratio
from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.qtensor import Parameters, TileRange, parameters_of_range, spread, tile_range
from jquant.core.scales import DoubleQuantizedScale, FloatScale, NestedScale
from jquant.core.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """What is tried."""

    grid: int = 100  # steps of the whole range
    max_shrink: float = 0.8  # the narrowest range tried leaves out about this part
    exponent: float = 2.4  # of the error

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.max_shrink <= 1:
            raise InputError(
                f"range search with grid {self.grid}, max_shrink {self.max_shrink}: at least 1, and in (0, 1]"
            )
        if not self.exponent > 0:
            raise InputError(f"range search with exponent {self.exponent}: it must be positive, as 2.4")


def search_parameters(
    tiles: Float32[Array, "*batch r tr c tc"],
    scheme: Scheme,
    *,
    outer: Array | None = None,
    importance: Float32[Array, "*#batch #r #tr c tc"] | None = None,
    config: RangeSearch | None = None,
) -> Parameters:
    """`choose_parameters` with the range of each tile shrunk to where the tile loses least.

    Args:
        tiles: float32, see `core.qtensor.to_tiles`.
        scheme: integers, floats or codebooks with any granularity and scale format. Doubly quantized scales are
            searched for as they are before their own quantization.
        importance: weights ≥ 0 of the errors, one a column of each tile; by default all alike.
        outer: second level of a nested scale; by default that of the tiles' unshrunk range.
        config: by default IST-DASLab's grid.

    Raises:
        InputError: the scheme is a block type of ggml.
    """
    if scheme.block is not None:
        raise InputError(f"{scheme} finds the scales inside its blocks itself: it takes no range search; use rtn")
    config = RangeSearch() if config is None else config
    span = tile_range(tiles, scheme)
    if isinstance(scheme.scale, NestedScale) and outer is None:
        outer = scheme.scale.outer(jnp.max(span.high, axis=(-2, -1), keepdims=True), scheme.element.reach)
    plain = scheme_of_search(scheme)

    def error(factor: Array) -> Array:
        found = parameters_of_range(_shrunk(span, factor), plain, outer=outer)
        lost = _power(jnp.abs(_rounded(tiles, found, plain) - tiles), config.exponent)
        lost = lost if importance is None else lost * importance
        return jnp.sum(jnp.sum(lost, axis=-1), axis=-2)

    def one(index: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        least, chosen = best
        factor = 1 - index.astype(jnp.float32) / config.grid
        found = error(factor)
        return jnp.minimum(found, least), jnp.where(found < least, factor, chosen)

    start = (jnp.full_like(span.high, jnp.inf), jnp.ones_like(span.high))
    _, chosen = jax.lax.fori_loop(0, max(1, int(config.max_shrink * config.grid)), one, start)
    return parameters_of_range(_shrunk(span, chosen), scheme, outer=outer)


def scheme_of_search(scheme: Scheme) -> Scheme:
    """The scheme with scales that a group finds alone: doubly quantized ones as they are before."""
    if not isinstance(scheme.scale, DoubleQuantizedScale):
        return scheme
    return Scheme(element=scheme.element, granularity=scheme.granularity, scale=FloatScale())


def _shrunk(span: TileRange, factor: Array) -> TileRange:
    return TileRange(span.high * factor, None if span.low is None else span.low * factor)


def _rounded(tiles: Array, parameters: Parameters, scheme: Scheme) -> Array:
    scale, zero = spread(parameters.scale), parameters.zero_point
    ratio = exact_ratio(tiles, scale)
    if zero is None:
        return scheme.element.round(ratio) * scale
    assert isinstance(scheme.element, Int)
    return scheme.element.round(ratio, spread(zero)) * scale


def _power(x: Array, exponent: float) -> Array:
    """x^exponent for x ≥ 0, near 0 below 10⁻³⁰. XLA's own power knows all special cases and takes thrice the time."""
    return jnp.exp(exponent * jnp.log(jnp.maximum(x, 1e-30)))
