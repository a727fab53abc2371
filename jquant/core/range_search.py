"""Ranges that lose least: a scale may clip the few largest of a group to serve the many better.

    p* = argmin_p Σ |x − dequantize(quantize(x; p · range))|^2.4,    p = 1, 1 − 1/100, …, down to 1 − 0.8

for each group alone; of equal ones the widest. The range is shrunk before its scale is rounded to the scheme's format:
so power-of-two scales may drop by whole powers, and nested scales keep the second level of the whole matrix.

Reference: IST-DASLab/gptq, quant.py, `find_params` with mse=True; the constants are its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jquant.core.division import exact_ratio, whole_ratio
from jquant.core.errors import InputError
from jquant.core.formats import Element, Int
from jquant.core.qtensor import Parameters, TileRange, parameters_of_range, tile_range
from jquant.core.scales import DoubleQuantizedScale, FloatScale, NestedScale
from jquant.core.scheme import Scheme

_TOGETHER = 20  # ranges tried side by side
_LONG = 1024  # tiles, or pieces of tiles, that make a row long enough


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
        tiles: float32, see `core.tiles.to_tiles`.
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

    count = count_of_tries(config)
    tries = min(_TOGETHER, count)

    def some(index: Array, best: tuple[Array, Array]) -> tuple[tuple[Array, Array], Parameters]:
        steps = jnp.minimum(index * tries + jnp.arange(tries), count - 1)  # the last may come twice: it changes nothing
        factors = factor_of_step(steps, config).reshape(-1, *(1,) * span.high.ndim)
        found = parameters_of_range(shrunk(span, factors), plain, outer=outer)
        errors = _errors(tiles, importance, found, plain, config.exponent)
        here = jnp.argmin(errors, axis=0)  # of equal ones the first, which is the widest
        error = jnp.min(errors, axis=0)
        least, chosen = best
        better = jnp.minimum(error, least), jnp.where(error < least, factors.reshape(-1)[here], chosen)
        return better, jax.tree.map(lambda each: each[-1:], found)

    def some_more(state: tuple[Array, Array, tuple[Array, Array]]) -> tuple[Array, Array, tuple[Array, Array]]:
        index, _, best = state
        best, narrowest = some(index, best)
        beyond = _errors(tiles, importance, narrowest, plain, config.exponent, beyond_levels=True)[0]
        # Sums are taken as those of tries are, so that no more than a few last bits lie between them.
        return index + 1, jnp.any(~((beyond > 1.001 * best[0]) | (best[0] == 0))), best

    start = (jnp.full_like(span.high, jnp.inf), jnp.ones_like(span.high))
    stretches = -(-count // tries)
    if plain.scale == FloatScale():
        state = (jnp.int32(0), jnp.bool(True), start)
        _, _, (_, chosen) = jax.lax.while_loop(lambda state: (state[0] < stretches) & state[1], some_more, state)
    else:  # rounded, scales of narrower ranges may be wider
        _, chosen = jax.lax.fori_loop(0, stretches, lambda index, best: some(index, best)[0], start)
    return parameters_of_range(shrunk(span, chosen), scheme, outer=outer)


def scheme_of_search(scheme: Scheme) -> Scheme:
    """The scheme with scales that a group finds alone: doubly quantized ones as they are before."""
    if not isinstance(scheme.scale, DoubleQuantizedScale):
        return scheme
    return Scheme(element=scheme.element, granularity=scheme.granularity, scale=FloatScale())


def count_of_tries(config: RangeSearch) -> int:
    """How many ranges are tried, the widest first."""
    return max(1, int(config.max_shrink * config.grid))


def factor_of_step(steps: Int32[Array, "..."], config: RangeSearch) -> Float32[Array, "..."]:
    """What the range is multiplied by in each try."""
    # Looked up: what XLA makes of a division by a constant differs in the last bit from one program to the next.
    return jnp.asarray(1 - np.arange(count_of_tries(config), dtype=np.float32) / np.float32(config.grid))[steps]


def shrunk(span: TileRange, factor: Float32[Array, "..."]) -> TileRange:
    """The range times a factor."""
    return TileRange(span.high * factor, None if span.low is None else span.low * factor)


def _errors(
    tiles: Array,
    importance: Array | None,
    found: Parameters,
    scheme: Scheme,
    exponent: float,
    *,
    beyond_levels: bool = False,
) -> Float32[Array, "tries *batch r c"]:
    """Σ h·|x − x̂|^p of every tile, for each of several parameters [tries, …].

    `beyond_levels`, what no narrower range loses less than: x̂ is x where that lies between the least and the largest
    value of the format, or with a zero point, which is rounded, a step beyond.

    Goes from element to element, with all tiles and tries side by side: that is a plain loop over long rows, where sums
    along short tiles would be taken number by number. Few large tiles are cut into pieces that stand side by side.
    """
    shape = tiles.shape[:-3] + tiles.shape[-2:-1]
    size, count = tiles.shape[-3] * tiles.shape[-1], math.prod(shape)
    pieces = next(part for part in range(1, size + 1) if size % part == 0 and (part * count >= _LONG or part == size))

    def rows(x: Array) -> Array:
        """[elements of a piece, pieces · tiles]"""
        return jnp.moveaxis(x, (-3, -1), (0, 1)).reshape(size // pieces, pieces * count)

    def of_pieces(x: Array) -> Array:
        return jnp.tile(x.reshape(len(x), count), (1, pieces))

    elements, scale = rows(tiles), of_pieces(found.scale)
    weights = None if importance is None else rows(jnp.broadcast_to(importance, tiles.shape))
    zero = None if found.zero_point is None else of_pieces(found.zero_point)

    def one(index: Array, total: Array) -> Array:
        x = jax.lax.dynamic_slice_in_dim(elements, index, 1)
        if beyond_levels:
            value = jnp.clip(x, *_ends(scheme.element, scale, zero))
        elif isinstance(scheme.element, Int):
            value = scheme.element.clip(whole_ratio(x, scale), zero) * scale
        else:
            value = scheme.element.round(exact_ratio(x, scale)) * scale
        lost = power_of(jnp.abs(value - x), exponent)
        if weights is not None:
            lost = lost * jax.lax.dynamic_slice_in_dim(weights, index, 1)
        return total + lost

    total = jax.lax.fori_loop(0, len(elements), one, jnp.zeros_like(scale))
    return jnp.sum(total.reshape(-1, pieces, count), axis=1).reshape(-1, *shape)


def _ends(element: Element, scale: Array, zero: Array | None) -> tuple[Array, Array]:
    """The least and the largest value; with a zero point a step beyond either."""
    far = jnp.float32(1e30)
    if isinstance(element, Int):
        low, high = (element.clip(jnp.full_like(scale, end), zero) * scale for end in (-far, far))
    else:
        low, high = (element.round(jnp.full_like(scale, end)) * scale for end in (-far, far))
    return (low, high) if zero is None else (low - scale, high + scale)


def power_of(x: Array, exponent: float) -> Array:
    """x^exponent for x ≥ 0, near 0 below 10⁻³⁰. XLA's own power knows all special cases and takes thrice the time."""
    return x * x if exponent == 2 else jnp.exp(exponent * jnp.log(jnp.maximum(x, 1e-30)))
