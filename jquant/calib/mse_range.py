"""The range of activations that loses least: a static scale clips outliers where that serves the rest better.

    a* = argmin_a Σ_b counts_b · (x_b − dequantize(quantize(x_b; scale from a)))²,    a = max|x| · (1, 0.99, …, 0.01)

over the middles x_b of a histogram's bins, half of each count on either side of 0: so it is as good as magnitudes and
bins can tell, an error of at most half a bin, max|x| / bins, in every value.

Reference: Choukroun et al., Low-bit Quantization of Neural Networks (1902.06822), 3; the grid is ours.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.calib import histogram
from jquant.calib.histogram import HistogramState
from jquant.core.division import exact_ratio
from jquant.core.errors import InputError
from jquant.core.qtensor import TileRange, parameters_of_range
from jquant.core.range_search import scheme_of_search
from jquant.core.scheme import Scheme

_GRID = 100

init, update, merge, check = histogram.init, histogram.update, histogram.merge, histogram.check


def finalize(state: HistogramState, scheme: Scheme) -> Float[Array, "*channels"]:
    """The largest magnitude that the scale should be made for; NaN as percentile.py has it.

    Args:
        state: of all values, or of each channel's.
        scheme: without zero points; its granularity does not matter.

    Raises:
        InputError: the scheme has zero points or is a block type of ggml.
    """
    if scheme.zero_point != "none" or scheme.block is not None:
        raise InputError(f"range of magnitudes for {scheme}: it serves schemes without zero points or blocks of ggml")
    return _finalize(state, scheme)


@partial(jax.jit, static_argnames="scheme")
def _finalize(state: HistogramState, scheme: Scheme) -> Array:
    plain = scheme_of_search(scheme)
    bins = state.counts.shape[-1]
    middle = (jnp.arange(bins) + 0.5) / bins * jnp.exp2(state.exponent.astype(jnp.float32))[..., None]
    values = jnp.stack([middle, -middle], axis=-2)  # [..., 2, bins]

    def lost(span: Array) -> Array:
        scale = parameters_of_range(TileRange(span[..., None, None], None), plain).scale
        error = plain.element.round(exact_ratio(values, scale)) * scale - values
        return jnp.sum(jnp.sum(error * error, axis=-2) * state.counts, axis=-1)

    def one(index: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        least, chosen = best
        span = state.largest * (1 - index.astype(jnp.float32) / _GRID)
        found = lost(span)
        return jnp.minimum(found, least), jnp.where(found < least, span, chosen)

    start = (jnp.full_like(state.largest, jnp.inf), state.largest)
    _, chosen = jax.lax.fori_loop(0, _GRID, one, start)
    return jnp.where(histogram.unusable(state), jnp.nan, chosen)
