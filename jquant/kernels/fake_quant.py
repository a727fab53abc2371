"""Fake quantization in one read and one write: scale of a group, codes and values, while the group is on chip.

    s = amax / reach,   y = clip(round(x / s), lowest, highest)·s        bit for bit as core/ste.py

XLA reads the input twice, or holds a float32 copy of it. Integers without zero points, groups of neighbours along one
of the last two axes, float32 scales: what training uses most; all else stays with XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jquant.core.formats import Float as FloatElement
from jquant.core.formats import Int
from jquant.core.scales import SMALLEST_SCALE, FloatScale
from jquant.core.scheme import Channel, Group, Scheme, Token
from jquant.core.tiles import Axis
from jquant.kernels.options import assembles, lanes, triton_options
from jquant.kernels.rounding import Divisor, divisor, whole_quotient

Keep = Literal["input", "bound"]
Codes = Literal["signed", "packed"]
_ELEMENTS, _WARPS = 4096, 8  # of a program; on an H100 as fast as a copy
_HIGHEST = 256  # of a group in columns that is on chip at once; a taller one is read twice, from the L2 cache then
_TALL, _SHORTEST = 8192, 64  # elements of it that are on chip; rows that are worth it


class Plan(NamedTuple):
    """What is static."""

    scheme: Scheme
    clipped: bool  # the gradient is 0 where x was clipped
    axis: Axis
    dtype: DTypeLike  # of the result
    keep: Keep
    interpret: bool


def fits(scheme: Scheme, shape: tuple[int, ...], dtype: DTypeLike, axis: Axis = -1) -> bool:
    """Whether the kernel does this scheme on an array [..., out, in], or [..., in, out] where the axis is −2."""
    element = scheme.element
    if not isinstance(element, Int) or scheme.zero_point != "none" or scheme.scale != FloatScale():
        return False
    if not isinstance(scheme.granularity, Group | Channel | Token) or dtype not in (jnp.float32, jnp.bfloat16):
        return False
    inputs = shape[axis]
    group = scheme.tile(1, inputs)[1]
    if inputs % group:
        return False
    power = group & (group - 1) == 0
    if axis == -1:
        return power and 32 <= group <= 8192
    width = _columns(group, shape[-1])
    low = power and 8 <= group <= _HIGHEST
    return shape[-1] % width == 0 and (low or (group > _HIGHEST and _stretch(group, width) >= _SHORTEST))


def fake_quantize(
    x: Float[Array, "..."],
    scheme: Scheme,
    *,
    clipped: bool = True,
    axis: Axis = -1,
    dtype: DTypeLike | None = None,
    keep: Keep = "input",
    interpret: bool = False,
) -> Float[Array, "..."]:
    """dequantize(quantize(x, scheme)) with a straight-through gradient.

    Args:
        x: [..., out, in], or [..., in, out] where the axis is −2; `fits` must hold for it.
        scheme: its groups lie along the axis.
        clipped: the gradient is 0 where x was clipped.
        axis: of the inputs.
        dtype: of the result, rounded once from float32; by default that of x.
        keep: how the gradient knows where: the `input` goes through a kernel again, or the `bound` of each group is
            kept and XLA joins the comparison with what reads the gradient, as with an optimizer's step, which has x at
            hand.
        interpret: run the kernel's operations one by one, on any platform.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    return _fake_quantize(Plan(scheme, clipped, axis, dtype, keep, interpret), x)


class Encoded(NamedTuple):
    """An operand of a product of codes, and what the product is differentiated with."""

    value: Float[Array, "out in"]  # dequantized
    codes: Array  # [out, in], int8 with zero at 0, or uint8 as a QTensor holds them
    scale: Float32[Array, " out"]


def fake_quantize_and_encode(
    x: Float[Array, "out in"],
    scheme: Scheme,
    *,
    codes: Codes,
    clipped: bool = True,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> Encoded:
    """`fake_quantize` of rows with a scale each, with its codes and scales from the same read of x.

    Args:
        x: as there; the gradient is that of the value, and the codes have none.
        scheme: of eight bits, per channel or token.
        codes: `signed` as int8, or `packed` as uint8 with the format's offset.
        clipped: as there.
        dtype: of the value.
        interpret: as there.
    """
    plan = Plan(scheme, clipped, -1, x.dtype if dtype is None else jnp.dtype(dtype), "bound", interpret)
    return _encode(plan, codes, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _encode(plan: Plan, codes: Codes, x: Array) -> Encoded:
    return _encode_and_keep(plan, codes, x)[0]


def _encode_and_keep(plan: Plan, codes: Codes, x: Array) -> tuple[Encoded, tuple[Array, Array]]:
    dtypes = (plan.dtype, jnp.int8 if codes == "signed" else jnp.uint8)
    value, found, scale, bound = _over_groups(_forward, (x,), plan, dtypes, ("scale", "bound"))
    return Encoded(value, found, scale[:, 0]), (x, bound)


def _pull_encoded(plan: Plan, _: Codes, kept: tuple[Array, Array], cotangent: Encoded) -> tuple[Array]:
    return _pull(plan, kept, cotangent.value)


_encode.defvjp(_encode_and_keep, _pull_encoded)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quantize(plan: Plan, x: Array) -> Array:
    return _over_groups(_forward, (x,), plan, (plan.dtype,))[0]


def _keep(plan: Plan, x: Array) -> tuple[Array, tuple[Array, ...]]:
    if not plan.clipped or plan.keep == "input":
        return _fake_quantize(plan, x), (x,)
    value, bound = _over_groups(_forward, (x,), plan, (plan.dtype,), ("bound",))
    return value, (x, bound)


def _pull(plan: Plan, kept: tuple[Array, ...], cotangent: Array) -> tuple[Array]:
    x = kept[0]
    if not plan.clipped:
        return (cotangent.astype(x.dtype),)
    if plan.keep == "input":
        return (_over_groups(_backward, (x, cotangent), plan, (x.dtype,))[0],)
    axis, bound = plan.axis, kept[1]
    groups = bound.shape[axis]
    tiles = x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[len(x.shape) + axis + 1 :])
    in_range = tiles.astype(jnp.float32) <= jnp.expand_dims(bound, axis % x.ndim + 1)
    return (jnp.where(in_range.reshape(x.shape), cotangent.astype(x.dtype), jnp.zeros((), x.dtype)),)


_fake_quantize.defvjp(_keep, _pull)


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _over_groups(
    kernel: Any, operands: tuple[Array, ...], plan: Plan, dtypes: tuple[Any, ...], of_groups: tuple[str, ...] = ()
) -> list[Array]:
    """Runs the kernel on all groups: what it finds of each element, and then of each group.

    Jitted, so that layers with the same input have the same call in their program: XLA makes them one.
    """
    from jax.experimental import pallas as pl

    shape = operands[0].shape
    inputs = shape[plan.axis]
    group = plan.scheme.tile(1, inputs)[1]
    if plan.axis == -1:
        rows, tile = _rows(operands[0].size // group, group)
        folded, block, grid = (rows, group), (tile, group), (rows // tile,)
        scales, line = (rows, 1), (tile, 1)
        flat = [jnp.pad(x.reshape(-1, group), ((0, rows - x.size // group), (0, 0))) for x in operands]
    else:
        folded = (operands[0].size // group // shape[-1], group, shape[-1])
        width = _columns(group, shape[-1])
        block, grid = (None, group, width), (folded[0], shape[-1] // width)
        scales, line = (folded[0], 1, shape[-1]), (None, 1, width)
        flat = [x.reshape(folded) for x in operands]

    def spec(of: tuple[int | None, ...]) -> Any:
        # Blocks of a grid over rows, or over stretches of inputs and columns.
        return pl.BlockSpec(of, (lambda i: (i, 0)) if plan.axis == -1 else (lambda i, j: (i, 0, j)))

    results = [(folded, block, dtype) for dtype in dtypes] + [(scales, line, jnp.float32)] * len(of_groups)
    found = pl.pallas_call(
        partial(kernel, plan.scheme.element, 1 if plan.axis == -1 else 0, assembles(plan.interpret)),
        grid=grid,
        in_specs=[spec(block)] * len(flat),
        out_specs=[spec(of) for _, of, _ in results],
        out_shape=[jax.ShapeDtypeStruct(whole, dtype) for whole, _, dtype in results],
        interpret=plan.interpret,
        name="fake_quantize",
        **triton_options(_WARPS, plan.interpret),
    )(*flat)
    if plan.axis == -1:
        found = [each[: operands[0].size // group] for each in found]
    lead = shape[:-1] if plan.axis == -1 else shape[:-2]
    ends = [(inputs,) if plan.axis == -1 else (inputs, shape[-1])] * len(dtypes)
    ends += [(inputs // group,) if plan.axis == -1 else (inputs // group, shape[-1])] * len(of_groups)
    return [each.reshape(*lead, *end) for each, end in zip(found, ends, strict=True)]


def _rows(count: int, group: int) -> tuple[int, int]:
    """Groups with padding, and those of a program."""
    tile = min(max(1, _ELEMENTS // group), 1 << (count - 1).bit_length())
    return -(-count // tile) * tile, tile


def _columns(group: int, out: int) -> int:
    """Of a program, where groups lie in columns; few enough that a GPU has enough programs."""
    if group <= _HIGHEST:
        return lanes(max(32, _ELEMENTS // group))
    return lanes(32 if out >= 4096 else 16)


class _Held:
    """The values of a block [groups, group] or [group, groups]: on chip at once, or a stretch of a column at a time."""

    def __init__(self, x: Any, axis: int) -> None:
        rows = x.shape[0]
        self._x, self._axis = x, axis
        self._stretch = rows if axis == 1 or rows <= _HIGHEST else _stretch(rows, x.shape[1])
        self._count = rows // self._stretch
        self._whole = x[...].astype(jnp.float32) if self._count == 1 else None

    def largest(self) -> Array:
        """max |x| of each group, the axis kept."""
        if self._whole is not None:
            return of_peak(peak_of(self._whole, self._axis))

        def one(index: Array, found: Array) -> Array:
            return jnp.maximum(found, peak_of(self._part(index), 0))

        return of_peak(jax.lax.fori_loop(0, self._count, one, jnp.zeros((1, self._x.shape[1]), jnp.int32)))

    def each(self, write: Callable[[Any, Array], None]) -> None:
        """Calls `write` with the place and the values of each part."""
        if self._whole is not None:
            write(..., self._whole)
            return
        jax.lax.fori_loop(0, self._count, lambda index, _: write(self._at(index), self._part(index)), None)

    def _at(self, index: Array) -> Any:
        from jax.experimental import pallas as pl

        return pl.ds(index * self._stretch, self._stretch), slice(None)

    def _part(self, index: Array) -> Array:
        return self._x[self._at(index)].astype(jnp.float32)


def _stretch(group: int, width: int) -> int:
    """Rows of a tall group that are on chip: a power of two that divides it."""
    return min(group & -group, _TALL // width)


def _forward(element: Any, axis: int, assembly: bool, x: Any, out: Any, *more: Any) -> None:
    """Writes values; codes and their scales, where there is room for them; and the bound of a gradient likewise."""
    codes_out, scale_out = more[:2] if len(more) == 3 else (None, None)
    held = _Held(x, axis)
    scale = scale_of(held.largest(), element)
    by = divisor(scale, assembly=assembly)
    low, high = element.lowest_code - element.offset, element.highest_code - element.offset
    step = jnp.where(jnp.isinf(scale), jnp.nan, scale)  # 0 · ∞, and of all else there too

    def write(at: Any, values: Array) -> None:
        whole = jnp.clip(whole_quotient(values, by, assembly=assembly), low, high)
        out[at] = (whole * step).astype(out.dtype)
        if codes_out is not None:
            offset = 0 if codes_out.dtype == jnp.int8 else element.offset
            codes_out[at] = (whole.astype(jnp.int32) + offset).astype(codes_out.dtype)

    held.each(write)
    if scale_out is not None:
        scale_out[...] = scale
    if more:
        more[-1][...] = _bound(scale, by, high, assembly=assembly)


def _bound(scale: Array, by: Divisor, high: int, *, assembly: bool) -> Array:
    """The largest value that is not clipped; none is too low, as the range's lower end goes to a code.

    round(x / s) rises with x, and ends within 1.5 units in the last place of (high + ½)·s.
    """
    near = jax.lax.bitcast_convert_type(scale * jnp.float32(high + 0.5), jnp.int32)
    found = jnp.full(scale.shape, -jnp.inf, jnp.float32)
    for step in range(-2, 3):
        value = jax.lax.bitcast_convert_type(near + step, jnp.float32)
        found = jnp.where(whole_quotient(value, by, assembly=assembly) <= high, value, found)
    return found


def _backward(element: Any, axis: int, assembly: bool, x: Any, cotangent: Any, out: Any) -> None:
    held = _Held(x, axis)
    scale = scale_of(held.largest(), element)
    by = divisor(scale, assembly=assembly)
    low, high = element.lowest_code - element.offset, element.highest_code - element.offset

    def write(at: Any, values: Array) -> None:
        whole = whole_quotient(values, by, assembly=assembly)
        given = cotangent[at].astype(out.dtype)
        out[at] = jnp.where((whole >= low) & (whole <= high), given, jnp.zeros((), out.dtype))

    held.each(write)


def peak_of(x: Float32[Array, "..."], axis: int) -> Int32[Array, "..."]:
    """The bits of max |x|, the axis kept: as whole numbers they have the order of floats, and NaN is the largest.

    Maxima of floats on a GPU pass over NaN.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return jnp.max(bits, axis=axis, keepdims=True)


def of_peak(bits: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """max |x| itself."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def scale_of(peak: Float32[Array, "..."], element: Int | FloatElement) -> Float32[Array, "..."]:
    """peak / reach, correctly rounded; 1 where that counts as zero."""
    found = _divide_by_reach(peak, element)
    return jnp.where(found < SMALLEST_SCALE, jnp.float32(1), found)


def _divide_by_reach(a: Array, element: Int | FloatElement) -> Array:
    """a / reach for a ≥ 0, correctly rounded where that is no subnormal, in few operations.

    The reach is a power of two less another one: with p = 2^k and t = p − reach, the remainder a − q·reach = (a − q·p)
    + q·t of a near quotient is exact, as all three parts are floats (Sterbenz). One step of Newton with it rounds
    correctly: quotients by such divisors stay a thirtieth of a unit or more away from halves.
    """
    down, up = jnp.float32(2.0**-40), jnp.float32(2.0**40)  # so that no product overflows and no remainder is subnormal
    large, small = a > 2.0**60, a < 2.0**-60
    held = a * jnp.where(large, down, jnp.where(small, up, 1.0))
    power = float(1 << int(element.reach).bit_length())
    # The maximum changes nothing, but XLA, where it interprets the kernel, would fold the products below into this one.
    near = jnp.maximum(held * jnp.float32(1 / element.reach), 0.0)
    remainder = (held - near * power) + near * (power - element.reach)
    found = near + remainder * jnp.float32(1 / element.reach)
    return jnp.where(jnp.isinf(a), a, found * jnp.where(large, up, jnp.where(small, down, 1.0)))
