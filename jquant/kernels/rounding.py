"""Division and rounding inside kernels: the bits of core/division.py and core/formats.py, in what Triton can do.

Triton has no rounding to whole numbers, and nothing in it may depend on the platform. Where a kernel is compiled for an
NVIDIA GPU (`assembly`) quotients are NVIDIA's fused multiply-adds, a sixth of the operations:

    q = x·inverse,   r = x − q·divisor without rounding,   x / divisor = q + r·inverse

correctly rounded, as the reciprocal is (Markstein, IBM J. Res. Dev. 34, 1990).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jquant.core.division import divide_by_refinement, whole_by_remainder
from jquant.core.formats import Codebook, Element, Float, select_by_order

_UNITS = 1.5 * 2**23  # added to a float below 2²², it rounds it to a whole number, half to even
_SIGNIFICAND = 0x007FFFFF
_SMALL, _POWER = 2.0**-60, 2.0**64  # divisors below are scaled up, lest remainders be subnormal
_LARGEST = 2.0**20  # of approximate quotients; what is larger lies beyond every format


class Divisor(NamedTuple):
    """What a quotient needs of its divisor, found once for many."""

    value: Float32[Array, "..."]
    inverse: Float32[Array, "..."]  # about 1 / value; for assembly correctly rounded
    power: Float32[Array, "..."]  # for assembly: what numerators are scaled up by first, as value and inverse are


def divisor(value: Float32[Array, "..."], *, assembly: bool) -> Divisor:
    """Of positive numbers from 2⁻¹²⁴ to 2¹²⁵, and of infinity."""
    if not assembly:
        return Divisor(value, 1 / value, value)
    power = jnp.where(value < _SMALL, jnp.float32(_POWER), jnp.float32(1))
    value = value * power
    # Finite numbers over infinity are 0: their remainder has to be finite.
    finite = jnp.where(jnp.isinf(value), 0.0, value)
    lines = (  # rcp.rn without its branches: two steps of Newton, right but for a significand of all ones
        "{ .reg .f32 n, e, y; neg.f32 n, $2; rcp.approx.ftz.f32 y, $1; fma.rn.f32 e, n, y, 0f3F800000; "
        "fma.rn.f32 y, e, y, y; fma.rn.f32 e, n, y, 0f3F800000; fma.rn.f32 $0, e, y, y; }"
    )
    inverse = jax.lax.bitcast_convert_type(_by_assembly(lines, value, finite), jnp.int32)
    all_ones = (jax.lax.bitcast_convert_type(value, jnp.int32) & _SIGNIFICAND) == _SIGNIFICAND
    inverse = jax.lax.bitcast_convert_type(jnp.where(all_ones, inverse | 1, inverse), jnp.float32)
    return Divisor(finite, inverse, power)


def quotient(x: Float32[Array, "..."], by: Divisor, *, assembly: bool) -> Float32[Array, "..."]:
    """x / divisor, correctly rounded (core/division.py); by assembly only up to 2²⁰, beyond to a unit or two."""
    if not assembly:
        return divide_by_refinement(x, by.value)
    lines = (
        "{ .reg .f32 x, q, r; mul.rn.f32 x, $1, $4; mul.rn.f32 q, x, $3; "
        f"min.f32 q, q, {_hex(_LARGEST)}; max.f32 q, q, {_hex(-_LARGEST)}; neg.f32 r, q; fma.rn.f32 r, r, $2, x; "
        "fma.rn.f32 q, r, $3, q; copysign.f32 $0, $1, q; }"
    )
    return _by_assembly(lines, x, by.value, by.inverse, by.power)


def whole_quotient(x: Float32[Array, "..."], by: Divisor, *, assembly: bool) -> Float32[Array, "..."]:
    """The correctly rounded quotient, rounded to a whole number, half to even; beyond ±1024 anything beyond."""
    if not assembly:
        return whole_by_remainder(x, by.value, by.inverse)
    return to_whole(quotient(x, by, assembly=True), assembly=True)


def nearest_code(y: Array, element: Element) -> tuple[Array, Array]:
    """`element.encode(y)` as int32, and `element.round(y)`; floats, and codebooks of up to 16 levels."""
    if isinstance(element, Float):
        return element.nearest(y, to_whole)
    assert isinstance(element, Codebook), "`fits` refuses others"
    codes = np.arange(len(element.values), dtype=np.float32)
    code = select_by_order(y, element.midpoints(), codes)
    return code.astype(jnp.int32), select_by_order(y, element.midpoints(), element.levels())


def to_whole(y: Array, *, assembly: bool = False) -> Array:
    """Rounded to a whole number, half to even, for |y| < 1024; beyond, 1024, and in assembly anything beyond."""
    shifted = y + jnp.float32(_UNITS)
    if not assembly:  # XLA would cancel it; compilers of kernels do not
        shifted = jnp.clip(shifted, _UNITS - 1024, _UNITS + 1024)
    return shifted - jnp.float32(_UNITS)


def beyond_nearest_whole(
    x: Float32[Array, "..."], by: Float32[Array, "..."], lowest: Array | float, highest: Array | float
) -> Float32[Array, "..."]:
    """x·by less the whole number nearest to it from lowest to highest, in NVIDIA's assembly; for |lowest| < 2²²."""
    lines = (
        f"{{ .reg .f32 w; fma.rn.f32 w, $1, $2, {_hex(_UNITS)}; max.f32 w, w, $3; min.f32 w, w, $4; "
        f"sub.rn.f32 w, {_hex(_UNITS)}, w; fma.rn.f32 $0, $1, $2, w; }}"
    )
    return _by_assembly(lines, x, by, *(jnp.float32(_UNITS) + jnp.asarray(end) for end in (lowest, highest)))


def multiply_add(x: Array, y: Array, z: Array, *, assembly: bool) -> Array:
    """x·y + z, of float32 arrays of one shape; by assembly in one operation, which compilers of kernels do not make."""
    return _by_assembly("fma.rn.f32 $0, $1, $2, $3;", x, y, z) if assembly else x * y + z


def _by_assembly(lines: str, *operands: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Element by element, $0 from $1, $2, …"""
    from jax.experimental.pallas import triton

    shape = jnp.broadcast_shapes(*(each.shape for each in operands))
    return triton.elementwise_inline_asm(
        lines,
        args=[jnp.broadcast_to(each, shape) for each in operands],
        constraints="=f" + ",f" * len(operands),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )[0]


def _hex(value: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{np.float32(value).view(np.uint32):08X}"
