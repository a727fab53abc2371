"""Fake quantization in one read and one write: scale of a group, codes and values, while the group is on chip.

    s = amax / reach,   y = clip(round(x / s), lowest, highest)·s        bit for bit as core/ste.py

XLA reads the input twice, or holds a float32 copy of it. Integers without zero points, groups of neighbours along the
last axis, float32 scales: what training uses most; all else stays with XLA.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jquant.core.formats import Int
from jquant.core.scales import SMALLEST_SCALE, FloatScale
from jquant.core.scheme import Scheme
from jquant.kernels.rounding import whole_ratio

_ELEMENTS, _WARPS = 8192, 4  # of a program


def fits(scheme: Scheme, columns: int) -> bool:
    """Whether the kernel does this scheme on rows of so many values."""
    element = scheme.element
    if not isinstance(element, Int) or scheme.zero_point != "none" or scheme.scale != FloatScale():
        return False
    tile_rows, group = scheme.tile(1, columns)
    return tile_rows == 1 and columns % group == 0 and 32 <= group <= 8192 and group & (group - 1) == 0


def fake_quantize(
    x: Float[Array, "*batch in"], scheme: Scheme, *, interpret: bool = False
) -> Float[Array, "*batch in"]:
    """dequantize(quantize(x, scheme)) in the dtype of x.

    Args:
        x: `fits(scheme, x.shape[-1])` must hold; float32 or bfloat16.
        interpret: run the kernel's operations one by one, on any platform.
    """
    assert isinstance(scheme.element, Int), "`fits` refuses others"
    group = scheme.tile(1, x.shape[-1])[1]
    return _by_groups(partial(_forward, scheme.element), (x,), group, interpret)


def gradient(
    x: Float[Array, "*batch in"], cotangent: Float[Array, "*batch in"], scheme: Scheme, *, interpret: bool = False
) -> Float[Array, "*batch in"]:
    """The clipped straight-through gradient: the cotangent where x was not clipped, else 0. Arguments as above."""
    assert isinstance(scheme.element, Int), "`fits` refuses others"
    group = scheme.tile(1, x.shape[-1])[1]
    return _by_groups(partial(_backward, scheme.element), (x, cotangent), group, interpret)


def _by_groups(kernel: Any, operands: tuple[Array, ...], group: int, interpret: bool) -> Array:
    from jax.experimental import pallas as pl

    shape = operands[0].shape
    rows = operands[0].size // group
    tile = min(_ELEMENTS // group, 1 << (rows - 1).bit_length())
    flat = [each.reshape(rows, group) for each in operands]
    padded = -(-rows // tile) * tile
    if padded != rows:
        flat = [jnp.pad(each, ((0, padded - rows), (0, 0))) for each in flat]
    spec = pl.BlockSpec((tile, group), lambda i: (i, 0))
    found = pl.pallas_call(
        kernel,
        grid=(padded // tile,),
        in_specs=[spec] * len(flat),
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct((padded, group), operands[-1].dtype),
        interpret=interpret,
        name="fake_quantize",
        **_options(interpret),
    )(*flat)
    return found[:rows].reshape(shape)


def _forward(element: Int, x: Any, out: Any) -> None:
    values = x[...].astype(jnp.float32)
    scale = _scale(values, element)
    low, high = element.lowest_code - element.offset, element.highest_code - element.offset
    out[...] = (jnp.clip(whole_ratio(values, scale), low, high) * scale).astype(out.dtype)


def _backward(element: Int, x: Any, cotangent: Any, out: Any) -> None:
    values = x[...].astype(jnp.float32)
    whole = whole_ratio(values, _scale(values, element))
    low, high = element.lowest_code - element.offset, element.highest_code - element.offset
    out[...] = jnp.where((whole >= low) & (whole <= high), cotangent[...], jnp.zeros((), out.dtype))


def _scale(values: Float32[Array, "rows group"], element: Int) -> Float32[Array, "rows 1"]:
    """amax / reach, correctly rounded; 1 for a group of zeros."""
    largest = jnp.max(jnp.abs(values), axis=1, keepdims=True)
    found = _divide_by_reach(largest, element)
    return jnp.where(found < SMALLEST_SCALE, jnp.float32(1), found)


def _divide_by_reach(a: Array, element: Int) -> Array:
    """a / reach for a ≥ 2^-100, correctly rounded, in few operations; below, to a unit or two.

    The reach is a power of two less another one: with p = 2^k and t = p − reach, the remainder a − q·reach = (a − q·p)
    + q·t of a near quotient is exact, as all three parts are floats (Sterbenz). One step of Newton with it rounds
    correctly: quotients by such divisors stay a thirtieth of a unit or more away from halves.
    """
    power = float(1 << int(element.reach).bit_length())
    # The maximum changes nothing, but XLA, where it interprets the kernel, would fold the products below into this one.
    near = jnp.maximum(a * jnp.float32(1 / element.reach), 0.0)
    remainder = (a - near * power) + near * (power - element.reach)
    return near + remainder * jnp.float32(1 / element.reach)


def _options(interpret: bool) -> dict[str, Any]:
    if interpret:
        return {}
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=_WARPS, num_stages=1)}
