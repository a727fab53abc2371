"""Correctly rounded float32 division on every backend: codes must not depend on where they were computed.

XLA is free with divisions. It turns one by a constant, or by a broadcast array, into a product with the rounded
reciprocal; on GPU it emits `div.full.f32`, which may be two units in the last place off. Each moves scales, and the
codes of values near a tie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

_MANTISSA, _ONE, _EXPONENTS = 0x007FFFFF, 0x3F800000, 0x7F800000
_UPPER_HALF = ~0xFFF  # of a significand: 12 bits with the leading one
_LARGEST_WHOLE, _UNITS = 1024.0, 1.5 * 2**23


def exact_divide(numerator: Float32[Array, "..."], divisor: float) -> Float32[Array, "..."]:
    """numerator / divisor for numerator ≥ 0, correctly rounded."""
    # A divisor that depends on data is left alone; a constant one is not.
    return _divide(numerator, jnp.where(numerator > 0, jnp.float32(divisor), jnp.float32(1)))


def exact_ratio(numerator: Float32[Array, "..."], divisor: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """numerator / divisor for divisor > 0, which may be broadcast, correctly rounded where neither is subnormal."""
    # The select makes a broadcast divisor a full array again; it fuses, and a NaN stays one.
    return _divide(numerator, jnp.where(numerator == numerator, divisor, jnp.float32(1)))


def whole_ratio(numerator: Float32[Array, "..."], divisor: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """round(numerator / divisor), ties to even, of the correctly rounded quotient; beyond ±1024 anything beyond.

    Cheaper than `exact_ratio` where division is not IEEE's. divisor > 0, and may be broadcast.
    """
    return jax.lax.platform_dependent(numerator, divisor, cpu=_whole_by_division, default=_whole_by_remainder)


def _whole_by_division(numerator: Array, divisor: Array) -> Array:
    return jnp.round(numerator / jnp.where(numerator == numerator, divisor, jnp.float32(1)))


def _whole_by_remainder(numerator: Array, divisor: Array) -> Array:
    # The barrier: once a divisor, not once an element.
    return whole_by_remainder(numerator, divisor, jax.lax.optimization_barrier(1 / divisor))


def whole_by_remainder(numerator: Array, divisor: Array, inverse: Array) -> Array:
    """`whole_ratio` from an approximate 1 / divisor.

    That is k, the whole number nearest to an approximate quotient, or the one behind t = k ± ½: by the sign of
    numerator − t·divisor.

    That is exact where it matters: t has 12 bits, as each half of the divisor, and near t differences of floats are
    floats. The quotient is rounded to t itself where the remainder is at most half a unit of t in the last place.
    """
    near = numerator * inverse
    # Adding 1.5·2²³ rounds to whole numbers, as a GPU's rounding does in eight times the time; clipped in between, or
    # XLA cancels it.
    shifted = jnp.clip(near + _UNITS, _UNITS - _LARGEST_WHOLE, _UNITS + _LARGEST_WHOLE)
    whole = shifted - _UNITS
    side = jnp.where(near > whole, jnp.float32(1), jnp.float32(-1))
    tie = whole + 0.5 * side
    # Of small numbers the remainder would be subnormal.
    power = jnp.where(divisor < 2.0**-60, jnp.float32(2.0**64), jnp.float32(1))
    numerator, divisor = numerator * power, divisor * power
    high = _float(_bits(divisor) & _UPPER_HALF)
    remainder = side * ((numerator - tie * high) - tie * (divisor - high))
    tolerance = _float(_bits(tie) & _EXPONENTS) * (divisor * jnp.float32(2.0**-24))
    is_odd = (_bits(shifted) & 1) == 1
    is_behind = jnp.where(is_odd, remainder >= -tolerance, remainder > tolerance)
    return jnp.where(is_behind, whole + side, whole)


def _divide(numerator: Array, divisor: Array) -> Array:
    return jax.lax.platform_dependent(numerator, divisor, cpu=jnp.divide, default=divide_by_refinement)


def divide_by_refinement(numerator: Array, divisor: Array) -> Array:
    """numerator / divisor, correctly rounded: the quotient of the significands, refined, with the difference of the
    exponents put back."""
    a, b = _bits(numerator), _bits(divisor)
    quotient = _bits(refine(_significand(a), _significand(b)))
    exponent = (quotient >> 23) + ((a & _EXPONENTS) >> 23) - ((b & _EXPONENTS) >> 23)
    value = _float((quotient & _MANTISSA) | (jnp.clip(exponent, 0, 255) << 23))
    value = jnp.where(exponent <= 0, 0.0, jnp.where(exponent >= 255, jnp.inf, value))
    ordinary = _is_normal(a) & _is_normal(b)
    return jnp.where(ordinary, jnp.where(numerator < 0, -value, value), numerator / divisor)


def refine(a: Array, b: Array, quotient: Array | None = None) -> Array:
    """a / b, correctly rounded, for a and b in [1, 2).

    With the exact remainder r = a − q·b of an approximate quotient, q + r/b is at most one unit off; the remainder of
    that says whether it is, and no quotient of two floats lies halfway between floats.

    Args:
        a: float32 [...].
        b: float32, as a.
        quotient: within two units in the last place; by default what the backend computes.
    """
    quotient = a / b if quotient is None else quotient
    quotient = quotient + _remainder(a, quotient, b) / b
    unit = jnp.where(quotient >= 1, jnp.float32(2.0**-23), jnp.float32(2.0**-24))
    remainder = _remainder(a, quotient, b)
    step = jnp.where(2 * jnp.abs(remainder) > unit * b, unit, 0.0)
    return jnp.where(remainder < 0, quotient - step, quotient + step)


def _remainder(a: Array, q: Array, b: Array) -> Array:
    """a − q·b without rounding, for q near a/b. Every product and difference below is exact, so contraction into fused
    multiply-adds, which XLA may or may not do, changes nothing (Dekker, Numerische Mathematik 18, 1971)."""
    q_high, b_high = _float(_bits(q) & _UPPER_HALF), _float(_bits(b) & _UPPER_HALF)
    q_low, b_low = q - q_high, b - b_high
    return a - q_high * b_high - q_high * b_low - q_low * b_high - q_low * b_low


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _significand(bits: Array) -> Array:
    """In [1, 2)."""
    return _float((bits & _MANTISSA) | _ONE)


def _is_normal(bits: Array) -> Array:
    """Neither zero, subnormal, infinite nor NaN."""
    exponent = bits & _EXPONENTS
    return (exponent > 0) & (exponent < _EXPONENTS)
