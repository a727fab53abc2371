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
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jquant.core.formats import Int
from jquant.core.scales import SMALLEST_SCALE, FloatScale
from jquant.core.scheme import Channel, Group, Scheme, Token
from jquant.core.ste import Keep
from jquant.kernels.rounding import whole_ratio

_ELEMENTS, _WARPS = 4096, 8  # of a program; on an H100 as fast as a copy


def fits(scheme: Scheme, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether the kernel does this scheme on an array [..., in]."""
    element = scheme.element
    if not isinstance(element, Int) or scheme.zero_point != "none" or scheme.scale != FloatScale():
        return False
    if not isinstance(scheme.granularity, Group | Channel | Token) or dtype not in (jnp.float32, jnp.bfloat16):
        return False
    group = scheme.tile(1, shape[-1])[1]
    return shape[-1] % group == 0 and 32 <= group <= 8192 and group & (group - 1) == 0


def fake_quantize(
    x: Float[Array, "*batch in"], scheme: Scheme, *, clipped: bool = True, keep: Keep = "input", interpret: bool = False
) -> Float[Array, "*batch in"]:
    """dequantize(quantize(x, scheme)) in the dtype of x, with a straight-through gradient.

    Args:
        x: `fits(scheme, x.shape, x.dtype)` must hold.
        clipped: the gradient is 0 where x was clipped.
        keep: what tells the gradient where: a `mask` of a byte an element, or the `input` itself.
        interpret: run the kernel's operations one by one, on any platform.
    """
    return _fake_quantize(scheme, clipped, keep, interpret, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _fake_quantize(scheme: Scheme, clipped: bool, keep: Keep, interpret: bool, x: Array) -> Array:
    return _by_groups(partial(_forward, scheme.element), (x,), scheme, (x.dtype,), interpret)[0]


def _keep(scheme: Scheme, clipped: bool, keep: Keep, interpret: bool, x: Array) -> tuple[Array, Array | None]:
    if not clipped or keep == "input":
        return _fake_quantize(scheme, clipped, keep, interpret, x), x if clipped else None
    value, mask = _by_groups(partial(_forward, scheme.element), (x,), scheme, (x.dtype, jnp.uint8), interpret)
    return value, mask


def _pull(
    scheme: Scheme, clipped: bool, keep: Keep, interpret: bool, kept: Array | None, cotangent: Array
) -> tuple[Array]:
    if kept is None:
        return (cotangent,)
    if keep == "mask":
        return (jnp.where(kept == 1, cotangent, jnp.zeros((), cotangent.dtype)),)
    kernel = partial(_backward, scheme.element)
    return (_by_groups(kernel, (kept, cotangent), scheme, (cotangent.dtype,), interpret)[0],)


_fake_quantize.defvjp(_keep, _pull)


def _by_groups(
    kernel: Any, operands: tuple[Array, ...], scheme: Scheme, dtypes: tuple[Any, ...], interpret: bool
) -> list[Array]:
    from jax.experimental import pallas as pl

    shape = operands[0].shape
    group = scheme.tile(1, shape[-1])[1]
    rows = operands[0].size // group
    tile = min(max(1, _ELEMENTS // group), 1 << (rows - 1).bit_length())
    flat = [each.reshape(rows, group) for each in operands]
    padded = -(-rows // tile) * tile
    if padded != rows:
        flat = [jnp.pad(each, ((0, padded - rows), (0, 0))) for each in flat]
    spec = pl.BlockSpec((tile, group), lambda i: (i, 0))
    found = pl.pallas_call(
        kernel,
        grid=(padded // tile,),
        in_specs=[spec] * len(flat),
        out_specs=[spec] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct((padded, group), dtype) for dtype in dtypes],
        interpret=interpret,
        name="fake_quantize",
        **_options(interpret),
    )(*flat)
    return [each[:rows].reshape(shape) for each in found]


def _forward(element: Any, x: Any, out: Any, mask: Any = None) -> None:
    values = x[...].astype(jnp.float32)
    scale = _scale(values, element)
    low, high = element.lowest_code - element.offset, element.highest_code - element.offset
    whole = whole_ratio(values, scale, 1 / scale)
    out[...] = (jnp.clip(whole, low, high) * scale).astype(out.dtype)
    if mask is not None:
        mask[...] = ((whole >= low) & (whole <= high)).astype(jnp.uint8)


def _backward(element: Any, x: Any, cotangent: Any, out: Any) -> None:
    values = x[...].astype(jnp.float32)
    scale = _scale(values, element)
    whole = whole_ratio(values, scale, 1 / scale)
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
