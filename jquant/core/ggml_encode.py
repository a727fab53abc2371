"""ggml's block types encoded in closed form: float32 to bytes, bit for bit as ggml does.

Each encoder maps x float32[..., elements] to uint8[..., bytes]. Quotients are products with the float32 reciprocal, as
in ggml; a select between a product and a sum keeps compilers from rounding them as one.

Reference: ggml-quants.c (`quantize_row_*_ref`); SPEC 3. Checked against gguf-py's `quantize` and, for ggml_nvfp4, C.
Where they store an infinite scale, because it exceeds float16, these store the largest one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from jquant.core.division import exact_divide, exact_ratio
from jquant.core.formats import DOUBLED_E2M1, code_of_whole_float
from jquant.core.ggml_decode import halved_ue4m3

Encoder = Callable[[Array], Array]

_LARGEST_HALF = 65504.0
_MAGNITUDES = np.asarray(DOUBLED_E2M1[:8], np.float32)
_MIDPOINTS = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2


def q4_0(x: Float32[Array, "*n elements"]) -> UInt8[Array, "*n bytes"]:
    """d = peak / −8, the peak being the first element of largest magnitude; q = ⌊x / d + 8.5⌋ up to 15."""
    d = _peak(x) / -8
    codes = _floor_codes(x * _reciprocal(d), 8.5, 15)
    return jnp.concatenate([half_bytes(d), _pack_nibbles(codes)], axis=-1)


def q4_1(x: Float32[Array, "*n elements"]) -> UInt8[Array, "*n bytes"]:
    """d = (max − min) / 15, m = min; q = ⌊(x − m) / d + 0.5⌋."""
    d, lowest = _range(x, 15)
    codes = _floor_codes((x - lowest) * _reciprocal(d), 0.5, 15)
    return jnp.concatenate([half_bytes(d), half_bytes(lowest), _pack_nibbles(codes)], axis=-1)


def q5_0(x: Float32[Array, "*n elements"]) -> UInt8[Array, "*n bytes"]:
    """As Q4_0, with d = peak / −16 and codes up to 31."""
    d = _peak(x) / -16
    codes = _floor_codes(x * _reciprocal(d), 16.5, 31)
    return jnp.concatenate([half_bytes(d), _pack_fifth_bits(codes), _pack_nibbles(codes & 15)], axis=-1)


def q5_1(x: Float32[Array, "*n elements"]) -> UInt8[Array, "*n bytes"]:
    """As Q4_1, with d = (max − min) / 31."""
    d, lowest = _range(x, 31)
    codes = _floor_codes((x - lowest) * _reciprocal(d), 0.5, 31)
    parts = [half_bytes(d), half_bytes(lowest), _pack_fifth_bits(codes), _pack_nibbles(codes & 15)]
    return jnp.concatenate(parts, axis=-1)


def q8_0(x: Float32[Array, "*n elements"]) -> UInt8[Array, "*n bytes"]:
    """d = max|x| / 127; q = x / d, rounded half away from zero."""
    d = exact_divide(_absmax(x), 127.0)
    whole = jax.lax.round(_apart(x * _reciprocal(d)), jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    codes = jax.lax.bitcast_convert_type(whole.astype(jnp.int8), jnp.uint8)
    return jnp.concatenate([half_bytes(d), codes], axis=-1)


def mxfp4(x: Float32[Array, "*n elements"]) -> UInt8[Array, "*n bytes"]:
    """e = ⌊log2 max|x|⌋ − 2 + 127; the nearest level of x / 2^(e − 128), the smaller of two equally near."""
    exponent = jnp.maximum(((jax.lax.bitcast_convert_type(_absmax(x), jnp.int32) >> 23) & 0xFF) - 2, 0)
    # By halves, as 2^128 is no float32.
    half = exponent >> 1
    y = x * _power_of_two(64 - half) * _power_of_two(64 - (exponent - half))
    return jnp.concatenate([exponent.astype(jnp.uint8), _pack_nibbles(_e2m1(y, jnp.ones_like(y)))], axis=-1)


def nvfp4(x: Float32[Array, "*n elements"]) -> UInt8[Array, "*n bytes"]:
    """In sub-blocks of 16: s = max|x| / 6 as an unsigned e4m3, rounded half up; the nearest level of x / (s / 2).

    Like ggml's, it has no room for an infinity, which comes out as the largest value.
    """
    parts = x.reshape(*x.shape[:-1], 4, 16)
    scale = _ue4m3(exact_divide(_absmax(parts), 6.0))
    codes = _e2m1(parts, jnp.broadcast_to(halved_ue4m3(scale), parts.shape))
    packed = _pack_nibbles(codes).reshape(*x.shape[:-1], 32)
    return jnp.concatenate([scale[..., 0], packed], axis=-1)


EXACT: dict[str, Encoder] = {
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q5_0": q5_0,
    "q5_1": q5_1,
    "q8_0": q8_0,
    "ggml_mxfp4": mxfp4,
    "ggml_nvfp4": nvfp4,
}


def to_half(x: Float32[Array, "..."]) -> Array:
    """float16, to nearest even; what is finite stays so."""
    saturated = jnp.where(jnp.isfinite(x), jnp.clip(x, -_LARGEST_HALF, _LARGEST_HALF), x)
    # The barrier keeps XLA on GPU from dropping the rounding where the scale is read back in the same program.
    return jax.lax.optimization_barrier(saturated.astype(jnp.float16))


def half_bytes(x: Float32[Array, "*n 1"]) -> UInt8[Array, "*n 2"]:
    return jax.lax.bitcast_convert_type(to_half(x)[..., 0], jnp.uint8)


def _peak(x: Array) -> Array:
    """The first element of largest magnitude, [..., 1]: of a and −a the one that comes first decides the sign."""
    largest = _absmax(x)
    # Twice its place, and one more where it is negative. On CPU an argmax would take five times the time.
    keys = 2 * np.arange(x.shape[-1], dtype=np.int32) + (x < 0)
    first = jnp.min(jnp.where(jnp.abs(x) == largest, keys, 2 * x.shape[-1]), axis=-1, keepdims=True)
    return jnp.where(first & 1 == 1, -largest, largest)


def _absmax(x: Array) -> Array:
    return jnp.maximum(jnp.max(x, axis=-1, keepdims=True), -jnp.min(x, axis=-1, keepdims=True))


def _range(x: Array, top: int) -> tuple[Array, Array]:
    """(max − min) / top, and min."""
    lowest = jnp.min(x, axis=-1, keepdims=True)
    return exact_divide(jnp.max(x, axis=-1, keepdims=True) - lowest, float(top)), lowest


def _reciprocal(d: Array) -> Array:
    """1 / d, correctly rounded; 0 where d is 0."""
    magnitude = jnp.abs(d)
    inverse = exact_ratio(jnp.ones_like(d), jnp.where(magnitude > 0, magnitude, 1.0))
    return jnp.where(magnitude > 0, jnp.where(d < 0, -inverse, inverse), 0.0)


def _apart(product: Array) -> Array:
    """The product, rounded on its own before anything is added; 0 where an infinite scale makes it NaN."""
    return jnp.where(product == product, product, 0.0)


def _floor_codes(y: Array, shift: float, highest: int) -> Array:
    """min(⌊y + shift⌋, highest) as uint8, for y ≥ −shift."""
    return code_of_whole_float(jnp.clip(jnp.floor(_apart(y) + shift), 0, highest))


def _pack_nibbles(codes: Array) -> Array:
    """uint8[..., 2k] to uint8[..., k]: the first half in the low nibbles."""
    half = codes.shape[-1] // 2
    return codes[..., :half] | (codes[..., half:] << 4)


def _pack_fifth_bits(codes: Array) -> Array:
    """The fifth bits of uint8[..., 32] as uint8[..., 4], lowest bit first."""
    bits = (codes >> 4).reshape(*codes.shape[:-1], 4, 8) << np.arange(8, dtype=np.uint8)
    return jnp.sum(bits, axis=-1, dtype=jnp.uint8)


def _e2m1(x: Array, unit: Array) -> Array:
    """Codes of the doubled levels of e2m1 nearest to x / unit. Midpoints times units are exact, and so are ties."""
    magnitude = jnp.abs(x)
    code = sum((magnitude > _MIDPOINTS[i] * unit).astype(jnp.uint8) for i in range(7))
    return jnp.where((x < 0) & (code > 0), code | 8, code) * (unit > 0)


def _ue4m3(x: Array) -> Array:
    """x ≥ 0 as an e4m3 without a sign, rounded half up; all from 256 on is 448 (`ggml_fp32_to_ue4m3`)."""
    x = jnp.minimum(x, 448.0)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # Half a unit added to the whole pattern carries into the exponent by itself.
    normal = ((bits + (1 << 19)) >> 20) - (120 << 3)
    subnormal = jnp.clip(jnp.floor(x * 512.0 + 0.5), 0, 7).astype(jnp.int32)
    return jnp.where(x < 2.0**-6, subnormal, jnp.where(normal < 0x78, normal, 0x7E)).astype(jnp.uint8)


def _power_of_two(exponent: Array) -> Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
