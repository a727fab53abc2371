"""The percentile of magnitudes: a range for static scales that a few outliers do not set.

    a = the smallest bin edge with  #{ |x| ≤ a } ≥ percent/100 · N

It is at most one bin of the histogram, 2·max|x| / bins, above the exact percentile (nearest rank), and never below it;
100 gives max|x| itself.

Reference: Wu et al., Integer Quantization for Deep Learning Inference (2004.09602), 5.2.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.calib import histogram
from jquant.calib.histogram import HistogramState
from jquant.core.errors import InputError

init, update, merge, check = histogram.init, histogram.update, histogram.merge, histogram.check


def finalize(state: HistogramState, percent: float = 99.99) -> Float[Array, "*channels"]:
    """The percentile; NaN where nothing was seen, or a NaN or an infinity was (`check` says which).

    Args:
        state: of all values, or of each channel's.
        percent: in (0, 100].

    Raises:
        InputError: `percent` is outside.
    """
    if not 0 < percent <= 100:
        raise InputError(f"percentile {percent}: it must be in (0, 100], as 99.99")
    total = jnp.cumsum(state.counts, axis=-1)
    bin_ = jnp.argmax(total >= total[..., -1:] * (percent / 100), axis=-1)
    value = jnp.take_along_axis(histogram.edges(state), bin_[..., None], axis=-1)[..., 0]
    return jnp.where(histogram.unusable(state), jnp.nan, value)
