"""Codes of activations, a scale a row, in one read and one write: int8 or fp8, as a product of codes takes them.

    s = amax / reach,   code = round(x / s), clipped        bit for bit as `core.qtensor.quantize` of tokens

XLA reads the input twice. A row that is no power of two long is read in stretches, the second time from the cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jquant.core.formats import Float as FloatElement
from jquant.core.formats import Int
from jquant.core.scales import FloatScale
from jquant.core.scheme import Scheme, Token
from jquant.kernels.fake_quant import of_peak, peak_of, scale_of
from jquant.kernels.options import assembles, triton_options
from jquant.kernels.rounding import Divisor, divisor, nearest_code, quotient, whole_quotient

_ELEMENTS, _WARPS = 8192, 8  # of a program
_STRETCH = 128  # the shortest that is worth a kernel


def fits(scheme: Scheme, columns: int, dtype: DTypeLike) -> bool:
    """Whether the kernel does this scheme on rows of so many columns."""
    element = scheme.element
    known = (isinstance(element, Int) and element.bits <= 8) or element.name == "fp8_e4m3"
    exact = scheme.zero_point == "none" and scheme.scale == FloatScale() and scheme.block is None
    shaped = isinstance(scheme.granularity, Token) and _stretch(columns) >= _STRETCH
    return known and exact and shaped and dtype in (jnp.float32, jnp.bfloat16)


@partial(jax.jit, static_argnames=("scheme", "interpret"))
def quantize_rows(
    x: Float[Array, "rows in"], scheme: Scheme, *, interpret: bool = False
) -> tuple[Array, Float32[Array, " rows"]]:
    """Codes [rows, in] and scales.

    Args:
        x: rows; `fits` must hold.
        scheme: intN:token or fp8_e4m3:token.
        interpret: run the kernel's operations one by one, on any platform.

    Returns:
        int8 codes with zero at 0, or float8_e4m3fn, and the scale of each row.

    Jitted, so that a program's equal calls are lowered once.
    """
    from jax.experimental import pallas as pl

    element = scheme.element
    count, columns = x.shape
    stretch = _stretch(columns)
    tile = min(max(1, _ELEMENTS // stretch), 1 << (count - 1).bit_length())
    rows = -(-count // tile) * tile
    codes, scales = pl.pallas_call(
        partial(_kernel, element, stretch, assembles(interpret)),
        grid=(rows // tile,),
        in_specs=[pl.BlockSpec((tile, columns), lambda i: (i, 0))],
        out_specs=[pl.BlockSpec((tile, columns), lambda i: (i, 0)), pl.BlockSpec((tile, 1), lambda i: (i, 0))],
        out_shape=[jax.ShapeDtypeStruct((rows, columns), jnp.int8), jax.ShapeDtypeStruct((rows, 1), jnp.float32)],
        interpret=interpret,
        name="quantize_rows",
        **triton_options(_WARPS, interpret),
    )(jnp.pad(x, ((0, rows - count), (0, 0))))
    codes = codes if isinstance(element, Int) else jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    return codes[:count], scales[:count, 0]


def _stretch(columns: int) -> int:
    """Columns that are held at once: the largest power of two that divides them, within a program."""
    return min(columns & -columns, _ELEMENTS)


def _kernel(element: Any, stretch: int, assembly: bool, x: Any, codes: Any, scales: Any) -> None:
    from jax.experimental import pallas as pl

    tile, columns = x.shape
    count = columns // stretch

    def part(index: Any) -> Array:
        return x[:, pl.ds(index * stretch, stretch)].astype(jnp.float32)

    def largest(index: Any, found: Array) -> Array:
        return jnp.maximum(found, peak_of(part(index), 1))

    peak = jax.lax.fori_loop(0, count, largest, jnp.zeros((tile, 1), jnp.int32))
    scale = scale_of(of_peak(peak), element)
    scales[...] = scale
    by = divisor(scale, assembly=assembly)

    def encode(index: Any, nothing: None) -> None:
        found = _codes(part(index), by, element, assembly=assembly)
        codes[:, pl.ds(index * stretch, stretch)] = found.astype(codes.dtype)

    jax.lax.fori_loop(0, count, encode, None)


def _codes(values: Float32[Array, "rows in"], by: Divisor, element: Any, *, assembly: bool) -> Array:
    """Of floats the bit pattern."""
    if isinstance(element, Int):
        low, high = element.lowest_code - element.offset, element.highest_code - element.offset
        return jnp.clip(whole_quotient(values, by, assembly=assembly), low, high).astype(jnp.int32)
    assert isinstance(element, FloatElement), "`fits` refuses others"
    ratio = quotient(values, by, assembly=assembly)
    return _to_e4m3(ratio) if assembly else nearest_code(ratio, element)[0]


def _to_e4m3(values: Float32[Array, "rows in"]) -> Array:
    """int8, four at a time by NVIDIA's instruction, which rounds and saturates as the format does (8.9 and later)."""
    from jax.experimental.pallas import triton

    lines = (
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
        "mov.b32 $0, {a, b}; }"
    )
    return triton.elementwise_inline_asm(
        lines,
        args=[values],
        constraints="=r,r,r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.int8)],
    )[0]
