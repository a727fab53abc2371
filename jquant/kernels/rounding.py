"""Division and rounding inside kernels: the bits of core/division.py and core/formats.py, in what Triton can do.

Triton has no rounding to whole numbers, and nothing in it may depend on the platform.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jquant.core.division import divide_by_refinement, whole_by_remainder
from jquant.core.formats import Codebook, Element, Float, select_by_order

_UNITS = 1.5 * 2**23  # added to a float below 2²², it rounds it to a whole number, half to even


def divide(numerator: Array, divisor: Array) -> Array:
    """The correctly rounded quotient (core/division.py)."""
    return divide_by_refinement(numerator, divisor)


def whole_ratio(numerator: Array, divisor: Array, inverse: Array) -> Array:
    """The correctly rounded quotient, rounded to a whole number, half to even; `inverse` is about 1 / divisor."""
    return whole_by_remainder(numerator, divisor, inverse)


def nearest_code(y: Array, element: Element) -> tuple[Array, Array]:
    """`element.encode(y)` as int32, and `element.round(y)`; floats, and codebooks of up to 16 levels."""
    if isinstance(element, Float):
        return element.nearest(y, to_whole)
    assert isinstance(element, Codebook), "`fits` refuses others"
    codes = np.arange(len(element.values), dtype=np.float32)
    code = select_by_order(y, element.midpoints(), codes)
    return code.astype(jnp.int32), select_by_order(y, element.midpoints(), element.levels())


def to_whole(y: Array) -> Array:
    """Rounded to a whole number, half to even, for |y| < 1024; beyond, 1024."""
    # Clipped in between, or XLA cancels it.
    return jnp.clip(y + jnp.float32(_UNITS), _UNITS - 1024, _UNITS + 1024) - jnp.float32(_UNITS)
