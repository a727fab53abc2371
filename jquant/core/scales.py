"""Scale formats: how the scale of a group is chosen from its range, stored, and read back.

Each format has `bits` (stored for one scale), `target(absmax, element)` (the scale before rounding to the format),
`store(target, absmax, element) -> StoredScale` and `load(stored) -> float32 scales`. What is divided by is always the
loaded scale, so rounding of scales never leaves a code that the decoder reads differently; `DoubleQuantizedScale` is
the one exception and says why.

A group whose scale would fall below 2⁻¹²⁴ counts as zero: scale 1, codes 0 (a codebook without 0 takes the smallest
scale instead). Subnormal numbers must not matter, because some backends flush them. Values above 2¹²⁶ may overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jquant.core.division import exact_divide, exact_ratio
from jquant.core.formats import FLOATS, Codebook, Element, Float, Int

SMALLEST_SCALE = np.float32(2.0**-124)
_SMALLEST_PEAK = np.float32(2.0**-112)  # below it 448 · reach / peak would overflow

E4M3 = next(element for element in FLOATS if element.name == "fp8_e4m3")
_E4M3_NAN = np.uint8(0x7F)  # OCP OFP8 1.0, table 1; an element never takes it, a scale may


class StoredScale(NamedTuple):
    """Arrays at rest: one entry a group in `scale`; `scale2` and `offset` are the second level where there is one."""

    scale: Array
    scale2: Array | None = None
    offset: Array | None = None


# What a block type of ggml has in its place: its scales lie inside the blocks.
IN_BLOCKS = StoredScale(cast("Array", None))


@dataclass(frozen=True)
class FloatScale:
    """One float a group: fp32 (exact), bf16, fp16 or fp8 e4m3, rounded to nearest even and kept within its range.

    A NaN or infinity stays one (a NaN in e4m3), so that the decoded values tell of it.
    """

    name: Literal["fp32", "bf16", "fp16", "e4m3"] = "fp32"

    @property
    def bits(self) -> float:
        return {"fp32": 32, "bf16": 16, "fp16": 16, "e4m3": 8}[self.name]

    def target(self, absmax: Float32[Array, "..."], element: Element) -> Float32[Array, "..."]:
        return exact_divide(absmax, element.reach)

    def store(self, target: Float32[Array, "..."], absmax: Array | None, element: Element) -> StoredScale:
        target = jnp.where(target < SMALLEST_SCALE, _scale_of_zeros(element), target)
        if self.name == "e4m3":
            code = E4M3.encode(jnp.maximum(target, E4M3.smallest))
            return StoredScale(jnp.where(jnp.isfinite(target), code, _E4M3_NAN))
        if self.name == "fp16":
            target = jnp.where(jnp.isfinite(target), jnp.clip(target, 2.0**-24, 65504.0), target)
        if self.name == "fp32":
            return StoredScale(target)
        dtype = {"bf16": jnp.bfloat16, "fp16": jnp.float16}[self.name]
        # The barrier keeps XLA on GPU from dropping the rounding where the scale is read back in the same program.
        return StoredScale(jax.lax.optimization_barrier(target.astype(dtype)))

    def load(self, stored: StoredScale) -> Float32[Array, "..."]:
        if self.name != "e4m3":
            return stored.scale.astype(jnp.float32)
        return jnp.where(stored.scale == _E4M3_NAN, jnp.float32(jnp.nan), E4M3.decode(stored.scale))


@dataclass(frozen=True)
class PowerOfTwoScale:
    """E8M0: the biased exponent of a power of two, as uint8 (OCP MX 1.0, 5.3.1 and 6.3).

    The exponent from amax, with emax the element's largest exponent and `max` its largest value:

        floor   ⌊log2 amax⌋ − emax                      OCP; large elements of a block may saturate
        even    the same, amax first rounded (half up) to the element's mantissa
        ceil    ⌈log2 amax⌉ − emax
        rceil   ⌈log2(amax / max)⌉                      nothing saturates

    The names are torchao's `ScaleCalculationMode`.
    """

    mode: Literal["floor", "even", "ceil", "rceil"] = "floor"

    @property
    def name(self) -> str:
        return "e8m0"

    @property
    def bits(self) -> float:
        return 8

    def target(self, absmax: Float32[Array, "..."], element: Element) -> Float32[Array, "..."]:
        assert isinstance(element, Int | Float), "Scheme refuses others"
        if self.mode == "rceil":
            exponent = _ceil_log2(exact_divide(absmax, _largest(element)))
        elif self.mode == "ceil":
            exponent = _ceil_log2(absmax) - element.max_exponent
        elif self.mode == "even":
            mantissa_bits = element.mantissa_bits if isinstance(element, Float) else element.bits - 2
            exponent = _floor_log2(absmax, round_up=1 << (23 - mantissa_bits - 1)) - element.max_exponent
        else:
            exponent = _floor_log2(absmax) - element.max_exponent
        scale = _exp2(jnp.clip(exponent, -124, 127))
        return jnp.where((absmax > 0) & (exponent >= -124), scale, jnp.where(jnp.isnan(absmax), absmax, 0.0))

    def store(self, target: Float32[Array, "..."], absmax: Array | None, element: Element) -> StoredScale:
        # A scale that came from elsewhere is rounded up to a power of two: then nothing is clipped that was not before.
        exponent = jnp.clip(_ceil_log2(_one_where_zero(target)), -124, 127) + 127
        return StoredScale(jnp.where(jnp.isnan(target), 255, exponent).astype(jnp.uint8))

    def load(self, stored: StoredScale) -> Float32[Array, "..."]:
        exponent = stored.scale.astype(jnp.int32) - 127
        return jnp.where(exponent == 128, jnp.float32(jnp.nan), _exp2(exponent))


@dataclass(frozen=True)
class NestedScale:
    """Two levels: an e4m3 scale a group and one float32 g a matrix; the scale is e4m3 / g (NVFP4, SPEC 2).

        g = 448 · reach / max|x|,    s = e4m3(g · amax / reach),    scale = s / g

    `scale2` holds g, as compressed-tensors stores it; ModelOpt stores 1/g. A group too small for e4m3 takes its
    smallest value, 2⁻⁹, which still tells its elements apart.
    """

    @property
    def name(self) -> str:
        return "nested"

    @property
    def bits(self) -> float:
        return 8

    def target(self, absmax: Float32[Array, "..."], element: Element) -> Float32[Array, "..."]:
        return exact_divide(absmax, element.reach)

    def store(
        self, target: Float32[Array, "..."], absmax: Array | None, element: Element, *, outer: Array | None = None
    ) -> StoredScale:
        if outer is None:
            reach, source = (1.0, target) if absmax is None else (element.reach, absmax)
            outer = self.outer(jnp.max(source, axis=(-2, -1), keepdims=True), reach)
        scaled = jnp.maximum(outer * target, E4M3.smallest)
        zeros = 1.0 if _has_zero(element) else E4M3.smallest
        return StoredScale(E4M3.encode(jnp.where(target > 0, scaled, zeros)), scale2=outer)

    def outer(self, peak: Float32[Array, "..."], reach: float) -> Float32[Array, "..."]:
        """g of matrices whose largest magnitude is `peak`."""
        # Reciprocal first, as torch divides a number by an array: then g has compressed-tensors' bits. The reciprocal
        # is taken 2⁸ times too large, lest that of a peak above 2¹²⁶ be subnormal and flushed.
        reciprocal = exact_ratio(jnp.full_like(peak, 256), jnp.where(peak < _SMALLEST_PEAK, 1.0, peak))
        return jnp.where(peak < _SMALLEST_PEAK, 1.0, reciprocal * np.float32(E4M3.max * reach / 256))

    def load(self, stored: StoredScale) -> Float32[Array, "..."]:
        assert stored.scale2 is not None
        return _one_where_zero(exact_ratio(E4M3.decode(stored.scale), stored.scale2))


@dataclass(frozen=True)
class DoubleQuantizedScale:
    """Scales quantized to 8 bits in turn (QLoRA, Dettmers et al., 2305.14314, 3; numbers as bitsandbytes has them).

        offset = mean(s),   code = nearest level of the dynamic map to (s − offset) / a,   a = max|s − offset|

    with one a for `block` scales in row order, float32, and one offset a matrix. Codes of the elements are found with
    the scale *before* this rounding: bitsandbytes does so, and its checkpoints must come out equal.
    """

    block: int = 256

    @property
    def name(self) -> str:
        return "dq"

    @property
    def bits(self) -> float:
        return 8 + 32 / self.block

    def target(self, absmax: Float32[Array, "..."], element: Element) -> Float32[Array, "..."]:
        return exact_divide(absmax, element.reach)

    def store(self, target: Float32[Array, "..."], absmax: Array | None, element: Element) -> StoredScale:
        count = target.shape[-2] * target.shape[-1]
        offset = exact_divide(jnp.sum(target, axis=(-2, -1), keepdims=True), count)
        blocks = self._blocked(target - offset)
        peak = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        codes = DYNAMIC_MAP.encode(exact_ratio(blocks, jnp.where(peak > 0, peak, 1.0)))
        codes = codes.reshape(*target.shape[:-2], -1)[..., :count].reshape(target.shape)
        return StoredScale(codes, scale2=peak[..., 0], offset=offset)

    def load(self, stored: StoredScale) -> Float32[Array, "..."]:
        assert stored.scale2 is not None
        assert stored.offset is not None
        levels = self._blocked(DYNAMIC_MAP.decode(stored.scale)) * stored.scale2[..., None]
        # The select keeps compilers from fusing product and sum into one rounding. A NaN returns with the offset.
        levels = jnp.where(levels == levels, levels, 0.0)
        count = stored.scale.shape[-2] * stored.scale.shape[-1]
        flat = levels.reshape(*stored.scale.shape[:-2], -1)[..., :count]
        return flat.reshape(stored.scale.shape) + stored.offset

    def _blocked(self, values: Array) -> Array:
        """[..., rows, groups] to [..., blocks, block], the last block padded with zeros."""
        flat = values.reshape(*values.shape[:-2], -1)
        short = -flat.shape[-1] % self.block
        if short:
            flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, short)])
        return flat.reshape(*flat.shape[:-1], -1, self.block)


ScaleFormat = FloatScale | PowerOfTwoScale | NestedScale | DoubleQuantizedScale


def outer_scale(scale_format: ScaleFormat, x: Float32[Array, "*batch out in"], element: Element) -> Array | None:
    """The second level that belongs to a whole matrix, [..., 1, 1]; None where the format has none of that kind."""
    if not isinstance(scale_format, NestedScale):
        return None
    return scale_format.outer(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), element.reach)


def encoding_scale(scale_format: ScaleFormat, target: Array, stored: StoredScale) -> Float32[Array, "..."]:
    """The scale that elements are divided by when they are encoded: the stored one, but for double quantization."""
    if isinstance(scale_format, DoubleQuantizedScale):
        return _one_where_zero(target)
    return scale_format.load(stored)


def dynamic_map() -> np.ndarray:
    """The 256 levels of bitsandbytes' signed dynamic data type (Dettmers et al., 8-bit Optimizers, 2110.02861, 1.3).

    Seven decades 10⁰ … 10⁻⁶; decade i holds 2^i means of neighbouring points of an even grid on [0.1, 1], both signs;
    then 0 and 1. The grid is torch's linspace to the last bit: a float32 step from the nearer end, rounded once.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        index, step = np.arange(count + 1), np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count))
        from_start = np.float64(np.float32(0.1)) + step * index
        edges = np.where(index < (count + 1) // 2, from_start, 1 - step * (count - index)).astype(np.float32)
        means = (edges[1:] + edges[:-1]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.asarray(values, np.float32))


DYNAMIC_MAP = Codebook(tuple(float(v) for v in dynamic_map()), name="dynamic8")


def _one_where_zero(scale: Array) -> Array:
    return jnp.where(scale < SMALLEST_SCALE, jnp.float32(1), scale)


def _scale_of_zeros(element: Element) -> np.float32:
    """1, or the smallest where no level is 0: then a group of zeros still comes out as next to nothing."""
    return np.float32(1) if _has_zero(element) else SMALLEST_SCALE


def _has_zero(element: Element) -> bool:
    return 0.0 in element.levels()


def _largest(element: Element) -> float:
    return float(element.levels()[-1])


def _floor_log2(x: Array, *, round_up: int = 0) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) + round_up
    return ((bits >> 23) & 0xFF) - 127


def _ceil_log2(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return (bits >> 23) - 127 + ((bits & 0x7FFFFF) > 0)


def _exp2(exponent: Array) -> Array:
    """2^exponent as float32, exactly, for exponents −126 … 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
