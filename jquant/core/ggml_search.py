"""ggml's block types encoded by search: the K types, IQ4_NL, and the _0/_1 types under an importance vector.

Each encoder maps x float32[elements, blocks], and weights of the squared errors of the same shape or None, to
uint8[bytes, blocks]: blocks last, so that compilers vectorize over them.

    scales of the sub-blocks (and minima) of least squares, ggml_fit;  d = f16 of what maps the largest to the last code
    of scales;  their codes, then the elements' codes, by rounding what the rounded d leaves

ggml minimises Σ w e² with w growing with |x|, times the importance where there is one. Here w is the importance alone:
that is the error the importance matrix stands for, and without one the plain squared error.

Reference: ggml-quants.c, whose layouts these are and whose encoders the goldens are measured with; the search is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from jquant.core.formats import IQ4_NL_LEVELS, code_of_whole_float, select_by_order
from jquant.core.ggml_encode import to_half
from jquant.core.ggml_fit import POLISH, best_minimum, best_multiple, best_scale, best_scale_and_minimum

Columns = Float32[Array, "elements blocks"]
Bytes = UInt8[Array, "bytes blocks"]
SearchingEncoder = Callable[[Array, Array | None], Array]

_STARTS, _SIGNED_STARTS = 21, 19  # of a search for scale and minimum, and for a scale alone
_IQ4_NL = np.asarray(IQ4_NL_LEVELS, np.float32)
_IQ4_NL_MIDPOINTS = (_IQ4_NL[1:] + _IQ4_NL[:-1]) / 2
_IQ4_NL_TARGETS = np.concatenate([end + np.arange(-7, 8, dtype=np.float32) for end in _IQ4_NL[[0, -1]]])


def q4_0(x: Columns, weights: Columns | None) -> Bytes:
    """x ≈ d · (q − 8)."""
    d, codes = _one_scale(x, weights, 8)
    return jnp.concatenate([_half_rows(d), _nibbles(codes, 16)])


def q5_0(x: Columns, weights: Columns | None) -> Bytes:
    """x ≈ d · (q − 16)."""
    d, codes = _one_scale(x, weights, 16)
    return jnp.concatenate([_half_rows(d), _fifth_bits(codes), _nibbles(codes & 15, 16)])


def q4_1(x: Columns, weights: Columns | None) -> Bytes:
    """x ≈ d · q + m."""
    d, m, codes = _one_scale_and_minimum(x, weights, 15)
    return jnp.concatenate([_half_rows(d), _half_rows(m), _nibbles(codes, 16)])


def q5_1(x: Columns, weights: Columns | None) -> Bytes:
    """x ≈ d · q + m."""
    d, m, codes = _one_scale_and_minimum(x, weights, 31)
    return jnp.concatenate([_half_rows(d), _half_rows(m), _fifth_bits(codes), _nibbles(codes & 15, 16)])


def iq4_nl(x: Columns, weights: Columns | None) -> Bytes:
    """x ≈ d · level(q). The levels are uneven at their ends, so that the sign of d matters: both are tried."""
    scale = best_scale(x, weights, _nearest_iq4_nl, _IQ4_NL_TARGETS)
    d = to_half(scale)
    y = x * _inverse(d.astype(jnp.float32))
    codes = select_by_order(y, _IQ4_NL_MIDPOINTS, np.arange(16, dtype=np.uint8))
    return jnp.concatenate([_half_rows(d), _nibbles(codes, 16)])


def q2_k(x: Columns, weights: Columns | None) -> Bytes:
    """16 sub-blocks of 16, codes of 2 bits, scales and minima of 4."""
    d, m, scales, minima, codes = _scales_and_minima(x, weights, size=16, top=3, scale_top=15)
    return jnp.concatenate([scales | (minima << 4), _pairs(codes), _half_rows(d), _half_rows(m)])


def q4_k(x: Columns, weights: Columns | None) -> Bytes:
    """8 sub-blocks of 32, codes of 4 bits, scales and minima of 6."""
    d, m, scales, minima, codes = _scales_and_minima(x, weights, size=32, top=15, scale_top=63)
    return jnp.concatenate([_half_rows(d), _half_rows(m), _six_bit_pairs(scales, minima), _nibbles(codes, 32)])


def q5_k(x: Columns, weights: Columns | None) -> Bytes:
    """As Q4_K, with codes of 5 bits."""
    d, m, scales, minima, codes = _scales_and_minima(x, weights, size=32, top=31, scale_top=63)
    fifth = _merge((codes >> 4).reshape(8, 32, -1), 1)
    parts = [_half_rows(d), _half_rows(m), _six_bit_pairs(scales, minima), fifth, _nibbles(codes & 15, 32)]
    return jnp.concatenate(parts)


def q3_k(x: Columns, weights: Columns | None) -> Bytes:
    """16 sub-blocks of 16, codes of 3 bits, signed scales of 6."""
    d, scales, codes = _scales(x, weights, half=4, scale_half=32)
    third = _merge((codes >> 2).reshape(8, 32, -1), 1)
    return jnp.concatenate([third, _pairs(codes & 3), _six_bit(_bytes(scales + 32)), _half_rows(d)])


def q6_k(x: Columns, weights: Columns | None) -> Bytes:
    """16 sub-blocks of 16, codes of 6 bits, signed scales of 8."""
    d, scales, codes = _scales(x, weights, half=32, scale_half=128)
    signed = jax.lax.bitcast_convert_type(scales.astype(jnp.int8), jnp.uint8)
    return jnp.concatenate([_nibbles(codes & 15, 64), _pairs(codes >> 4), signed, _half_rows(d)])


SEARCHED: dict[str, SearchingEncoder] = {
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q5_0": q5_0,
    "q5_1": q5_1,
    "q2_k": q2_k,
    "q3_k": q3_k,
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
    "iq4_nl": iq4_nl,
}


# How often each rounds an element while it searches.
TRIES = {
    **dict.fromkeys(("q4_1", "q5_1", "q2_k", "q4_k", "q5_k"), _STARTS + POLISH),
    **dict.fromkeys(("q4_0", "q5_0", "q3_k", "q6_k"), _SIGNED_STARTS),
    "iq4_nl": len(_IQ4_NL_TARGETS),
}


def _one_scale(x: Array, weights: Array | None, half: int) -> tuple[Array, Array]:
    """f16 d[blocks] and codes + half, uint8[elements, blocks]."""
    d = to_half(best_scale(x, weights, _nearest_signed(half), _signed_targets(half)))
    return d, _signed_codes(x, d.astype(jnp.float32), half)


def _one_scale_and_minimum(x: Array, weights: Array | None, top: int) -> tuple[Array, Array, Array]:
    """f16 d and m [blocks], codes uint8[elements, blocks]."""
    scale, minimum = best_scale_and_minimum(x, weights, top, _targets(top))
    d, m = to_half(scale), to_half(-minimum)
    return d, m, _codes(x, d.astype(jnp.float32), -m.astype(jnp.float32), top)


def _scales_and_minima(
    x: Array, weights: Array | None, *, size: int, top: int, scale_top: int
) -> tuple[Array, Array, Array, Array, Array]:
    """f16 d and dmin [blocks], codes of scales and minima uint8[sub-blocks, blocks], codes uint8[elements, blocks]."""
    parts, weights = _split(x, size), None if weights is None else _split(weights, size)
    s, m = best_scale_and_minimum(parts, weights, top, _targets(top))
    total = None if weights is None else jnp.sum(weights, axis=-2)
    d, scales = _shared(s, total, _nearest_whole(scale_top), scale_top)
    m = best_minimum(parts, weights, top, d.astype(jnp.float32) * scales, m)
    dmin, minima = _shared(m, total, _nearest_whole(scale_top), scale_top)
    unit, m = d.astype(jnp.float32), dmin.astype(jnp.float32) * minima
    scales = best_multiple(parts + m[..., None, :], weights, _nearest_whole(top), unit, scales, (0, scale_top))
    codes = _codes(parts, unit * scales, m, top)
    return d, dmin, _bytes(scales), _bytes(minima), codes.reshape(x.shape)


def _scales(x: Array, weights: Array | None, *, half: int, scale_half: int) -> tuple[Array, Array, Array]:
    """f16 d[blocks], whole signed scales float32[16, blocks], codes + half uint8[elements, blocks]."""
    parts, weights = _split(x, 16), None if weights is None else _split(weights, 16)
    s = best_scale(parts, weights, _nearest_signed(half), _signed_targets(half))
    total = None if weights is None else jnp.sum(weights, axis=-2)
    d, scales = _shared(s, total, _nearest_signed(scale_half), -scale_half)
    unit = d.astype(jnp.float32)
    scales = best_multiple(parts, weights, _nearest_signed(half), unit, scales, (-scale_half, scale_half - 1))
    codes = _signed_codes(parts, unit * scales, half)
    return d, scales, codes.reshape(x.shape)


def _shared(
    values: Array, weights: Array | None, nearest: Callable[[Array], Array], target: int
) -> tuple[Array, Array]:
    """f16 d[blocks] and whole c[sub-blocks, blocks] with values ≈ d · c, the largest c near `target`."""
    targets = (target + np.linspace(-0.5, 0.5, 9)).astype(np.float32)
    d = to_half(best_scale(values, weights, nearest, targets))
    return d, nearest(values * _inverse(d.astype(jnp.float32)))


def _codes(x: Array, scale: Array, minimum: Array, top: int) -> Array:
    """Codes of x[..., elements, groups] ≈ scale · q − minimum."""
    y = (x + minimum[..., None, :]) * _inverse(scale)[..., None, :]
    return _bytes(jnp.clip(jnp.round(y), 0, top))


def _signed_codes(x: Array, scale: Array, half: int) -> Array:
    """Codes of x[..., elements, groups] ≈ scale · (q − half)."""
    return _bytes(_nearest_signed(half)(x * _inverse(scale)[..., None, :]) + half)


def _nearest_signed(half: int) -> Callable[[Array], Array]:
    return lambda y: jnp.clip(jnp.round(y), -half, half - 1)


def _nearest_whole(top: int) -> Callable[[Array], Array]:
    return lambda y: jnp.clip(jnp.round(y), 0, top)


def _nearest_iq4_nl(y: Array) -> Array:
    return select_by_order(y, _IQ4_NL_MIDPOINTS, _IQ4_NL)


def _targets(top: int) -> np.ndarray:
    """What the largest element starts from, in units of the scale."""
    return (top + np.linspace(-1.0, 1.0, _STARTS)).astype(np.float32)


def _signed_targets(half: int) -> np.ndarray:
    """What the element of largest magnitude starts from: the code without a counterpart, or near it."""
    return -(half + np.linspace(-0.9, 0.9, _SIGNED_STARTS)).astype(np.float32)


def _split(x: Array, size: int) -> Array:
    """[elements, blocks] to [sub-blocks, size, blocks]."""
    return x.reshape(-1, size, x.shape[-1])


def _inverse(scale: Array) -> Array:
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def _bytes(whole: Array) -> Array:
    return code_of_whole_float(whole)


def _half_rows(d: Array) -> Array:
    """The bytes of f16 [blocks] as uint8[2, blocks]."""
    return jax.lax.bitcast_convert_type(d, jnp.uint8).T


def _merge(parts: Array, width: int) -> Array:
    """uint8[k, n, blocks] of `width` bits to [n, blocks]: part i at bit i · width."""
    merged = parts[0]
    for i in range(1, parts.shape[0]):
        merged = merged | (parts[i] << (i * width))
    return merged


def _nibbles(codes: Array, run: int) -> Array:
    """uint8[2k, blocks] to [k, blocks]: of every two runs of codes the first is in the low nibbles."""
    pairs = codes.reshape(-1, 2, run, codes.shape[-1])
    return (pairs[:, 0] | (pairs[:, 1] << 4)).reshape(-1, codes.shape[-1])


def _pairs(codes: Array) -> Array:
    """uint8[256, blocks] of 2 bits to [64, blocks]: each half's four runs of 32 lie above one another."""
    halves = codes.reshape(2, 4, 32, codes.shape[-1])
    return jnp.concatenate([_merge(halves[0], 2), _merge(halves[1], 2)])


def _fifth_bits(codes: Array) -> Array:
    """The fifth bits of uint8[32, blocks] as uint8[4, blocks], lowest bit first."""
    return _merge((codes >> 4).reshape(4, 8, -1).swapaxes(0, 1), 1)


def _six_bit_pairs(scales: Array, minima: Array) -> Array:
    """Scales and minima uint8[8, blocks] of 6 bits as 12 bytes; the layout is in ggml_decode."""
    upper = scales[:4] | ((scales[4:] >> 4) << 6), minima[:4] | ((minima[4:] >> 4) << 6)
    return jnp.concatenate([*upper, (scales[4:] & 15) | ((minima[4:] & 15) << 4)])


def _six_bit(scales: Array) -> Array:
    """Scales uint8[16, blocks] of 6 bits as the 12 bytes of Q3_K; the layout is in ggml_decode."""
    return jnp.concatenate([_nibbles(scales & 15, 8), _merge((scales >> 4).reshape(4, 4, -1), 2)])
