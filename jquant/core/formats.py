"""Element formats: what one code can stand for. `Int`, `Float`, `Codebook`, and the named ones; ggml's block types.

An element format works on values already divided by their scale. Each has `bits`, `levels()` (every value, ascending),
`reach` (the value that the largest magnitude of a group is scaled to), and five array functions:

    encode(y) -> codes     nearest level's code, saturating; uint8 in [0, 2**bits)
    decode(codes) -> y     float32
    round(y) -> y          decode(encode(y)) without the detour, bit for bit
    in_range(y) -> bool    whether the nearest level was found without saturating
    symmetric              whether −max is a level too

Codes are the format's own bit patterns: offset binary for integers (code = value + 2**(bits−1)), sign and magnitude
for floats, the index for codebooks.

A `GGMLBlock` is no element: its weights are encoded a block at a time, scales among them (ggml_encode, ggml_decode).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from jquant.core.errors import InputError

_SELECT_TREE_LEVELS = 32  # above this, a binary search beats a tree of selects


@dataclass(frozen=True)
class Int:
    """A `bits`-wide integer, two to eight bits, in one of the two symmetric conventions (SPEC 1).

    `full` (the default; compressed-tensors and GPTQ): codes −2^(b−1) … 2^(b−1)−1, amax lands on (2^b−1)/2, so +amax
    itself is clipped by half a step. `restricted`: codes ±(2^(b−1)−1), amax lands on the last of them. With a zero
    point the convention does not matter: codes are 0 … 2^b−1 and the value is code − zero point.
    """

    bits: int
    convention: Literal["full", "restricted"] = "full"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"integer of {self.bits} bits: int2 to int8 exist")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def offset(self) -> int:
        """The code of zero when there is no zero point."""
        return 2 ** (self.bits - 1)

    @property
    def lowest_code(self) -> int:
        return 1 if self.convention == "restricted" else 0

    @property
    def highest_code(self) -> int:
        return 2**self.bits - 1

    @property
    def reach(self) -> float:
        return float(self.offset - 1) if self.convention == "restricted" else self.highest_code / 2

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value's leading bit; MXINT8 takes its shared scale from it (OCP MX 1.0, 5.3.4)."""
        return self.bits - 2

    @property
    def symmetric(self) -> bool:
        return self.convention == "restricted"

    def levels(self) -> np.ndarray:
        return np.arange(self.lowest_code, self.highest_code + 1, dtype=np.float32) - self.offset

    def encode(self, y: Float32[Array, "..."], zero_point: Array | None = None) -> UInt8[Array, "..."]:
        """Codes clip(round(y) + z, lowest, highest); z is the offset where no zero point is given."""
        if zero_point is not None:
            return code_of_whole_float(self._clipped(jnp.round(y), zero_point))
        # Clipped to whole bounds first, the sum below does the rounding too: half the operations.
        return code_of_whole_float(
            jnp.clip(y, self.lowest_code - self.offset, self.highest_code - self.offset), self.offset
        )

    def decode(self, codes: UInt8[Array, "..."], zero_point: Array | None = None) -> Float32[Array, "..."]:
        zero = self.offset if zero_point is None else zero_point
        return codes.astype(jnp.float32) - zero

    def round(self, y: Float32[Array, "..."], zero_point: Array | None = None) -> Float32[Array, "..."]:
        return self.clip(jnp.round(y), zero_point)

    def clip(self, whole: Float32[Array, "..."], zero_point: Array | None = None) -> Float32[Array, "..."]:
        """`round` of whole numbers."""
        return self._clipped(whole, zero_point) - (self.offset if zero_point is None else zero_point)

    def in_range(self, y: Float32[Array, "..."], zero_point: Array | None = None) -> Bool[Array, "..."]:
        return self.holds(jnp.round(y), zero_point)

    def holds(self, whole: Float32[Array, "..."], zero_point: Array | None = None) -> Bool[Array, "..."]:
        """`in_range` of whole numbers."""
        code = whole + (self.offset if zero_point is None else zero_point)
        return (code >= self._lowest(zero_point)) & (code <= self.highest_code)

    def _lowest(self, zero_point: Array | None) -> int:
        return self.lowest_code if zero_point is None else 0

    def _clipped(self, whole: Array, zero_point: Array | None) -> Array:
        zero = self.offset if zero_point is None else zero_point
        return jnp.clip(whole + zero, self._lowest(zero_point), self.highest_code)


@dataclass(frozen=True)
class Float:
    """A small binary float: sign, `exponent_bits`, `mantissa_bits`; round to nearest even, saturating at `max`.

    `bias` and `max` tell the variants apart: `fn` formats give up infinity for range, `fnuz` ones (AMD MI300) also
    shift the bias by one and have no −0. No code of ours is ever NaN or infinite.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    negative_zero: bool = True

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def reach(self) -> float:
        return self.max

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)): the emax of OCP MX 1.0."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; subnormals share its quantum."""
        return 1 - self.bias

    @property
    def smallest(self) -> float:
        """Smallest positive value, a subnormal."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def symmetric(self) -> bool:
        return True

    def levels(self) -> np.ndarray:
        magnitude = np.arange(2 ** (self.bits - 1))
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & (2**self.mantissa_bits - 1)
        fraction = mantissa + np.where(exponent > 0, 2**self.mantissa_bits, 0)
        positive = np.ldexp(fraction.astype(np.float64), np.maximum(exponent, 1) - self.bias - self.mantissa_bits)
        positive = positive[positive <= self.max].astype(np.float32)
        return np.concatenate([-positive[:0:-1], positive])

    def encode(self, y: Float32[Array, "..."]) -> UInt8[Array, "..."]:
        return self.nearest(y)[0].astype(jnp.uint8)

    def nearest(
        self, y: Float32[Array, "..."], to_whole: Callable[[Array], Array] = jnp.round
    ) -> tuple[Int32[Array, "..."], Float32[Array, "..."]]:
        """Code and value of the nearest level; `to_whole` rounds values below 2^(mantissa_bits + 1), half to even."""
        whole, exponent, quantum = self._magnitude(y, to_whole)
        magnitude = whole.astype(jnp.int32) + ((exponent - self.min_exponent) << self.mantissa_bits)
        negative = jnp.signbit(y) if self.negative_zero else jnp.signbit(y) & (magnitude > 0)
        value = whole * quantum
        return magnitude | (negative.astype(jnp.int32) << (self.bits - 1)), jnp.where(negative, -value, value)

    def decode(self, codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
        bits = codes.astype(jnp.int32)
        magnitude = bits & (2 ** (self.bits - 1) - 1)
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & (2**self.mantissa_bits - 1)
        normal = _float_of_bits(((exponent - self.bias + 127) << 23) | (mantissa << (23 - self.mantissa_bits)))
        positive = jnp.where(exponent > 0, normal, mantissa.astype(jnp.float32) * self.smallest)
        return jnp.where(bits >> (self.bits - 1) == 1, -positive, positive)

    def round(self, y: Float32[Array, "..."]) -> Float32[Array, "..."]:
        return self.nearest(y)[1]

    def in_range(self, y: Float32[Array, "..."]) -> Bool[Array, "..."]:
        # What rounds to `max` without saturating: everything below the midpoint to the value that would come next.
        last_step = 2.0 ** (self.max_exponent - self.mantissa_bits)
        return jnp.abs(y) < self.max + last_step / 2

    def _magnitude(self, y: Array, to_whole: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
        """|y| as whole · quantum with quantum = 2^(exponent − mantissa_bits), rounded half to even."""
        magnitude = jnp.minimum(jnp.abs(y), self.max)
        exponent = jnp.maximum(_exponent(magnitude), self.min_exponent)
        whole = to_whole(magnitude * _power_of_two(self.mantissa_bits - exponent))
        return whole, exponent, _power_of_two(exponent - self.mantissa_bits)


@dataclass(frozen=True)
class Codebook:
    """Any 2 to 256 levels, ascending; a value goes to the nearest one, a tie to the lower.

    A `name` other than "codebook" must be registered in `ELEMENTS`, or its spec string could not be read back.
    """

    values: tuple[float, ...]
    name: str = "codebook"

    def __post_init__(self) -> None:
        array = np.asarray(self.values, np.float32)
        if not 2 <= len(array) <= 256:
            raise InputError(f"codebook of {len(array)} levels: 2 to 256 are allowed")
        if not np.all(np.isfinite(array)) or not np.all(np.diff(array) > 0):
            raise InputError(
                f"codebook {self.values[:4]}…: the levels must be finite and strictly ascending in float32"
            )

    @property
    def bits(self) -> int:
        return max(1, math.ceil(math.log2(len(self.values))))

    @property
    def reach(self) -> float:
        return float(np.max(np.abs(np.asarray(self.values, np.float32))))

    @property
    def symmetric(self) -> bool:
        return all(a == -b for a, b in zip(self.values, reversed(self.values), strict=True))

    def levels(self) -> np.ndarray:
        return np.asarray(self.values, np.float32)

    def encode(self, y: Float32[Array, "..."]) -> UInt8[Array, "..."]:
        codes = np.arange(len(self.values), dtype=np.uint8)
        return self._nearest(y, codes)

    def decode(self, codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
        levels = self.levels()
        if len(levels) > _SELECT_TREE_LEVELS:
            return jnp.asarray(levels)[codes]
        return select_by_bits(codes, np.pad(levels, (0, 2**self.bits - len(levels)), mode="edge"), self.bits)

    def round(self, y: Float32[Array, "..."]) -> Float32[Array, "..."]:
        return self._nearest(y, self.levels())

    def in_range(self, y: Float32[Array, "..."]) -> Bool[Array, "..."]:
        levels = self.levels()
        return (y >= levels[0]) & (y <= levels[-1])

    def midpoints(self) -> np.ndarray:
        levels = np.asarray(self.values, np.float32).astype(np.float64)
        return ((levels[1:] + levels[:-1]) / 2).astype(np.float32)

    def _nearest(self, y: Array, outcomes: np.ndarray) -> Array:
        midpoints = self.midpoints()
        if len(outcomes) > _SELECT_TREE_LEVELS:
            return jnp.asarray(outcomes)[jnp.searchsorted(jnp.asarray(midpoints), y, side="left")]
        return select_by_order(y, midpoints, outcomes)


@dataclass(frozen=True)
class GGMLBlock:
    """A block type of ggml, as GGUF files hold it: `elements` neighbours of a row in `nbytes` bytes, scales included.

    Its `levels` are what codes stand for, times the scale of their sub-block; it has no functions of single values.
    """

    name: str
    elements: int
    nbytes: int
    bits: int  # of a code
    values: tuple[float, ...]  # ascending
    halves: tuple[int, ...] = ()  # where in the block its float16 scale, and its minimum where there is one, begin
    takes_importance: bool = True  # as ggml's own encoder does

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.elements

    @property
    def reach(self) -> float:
        return max(abs(value) for value in self.values)

    @property
    def symmetric(self) -> bool:
        return all(a == -b for a, b in zip(self.values, reversed(self.values), strict=True))

    def levels(self) -> np.ndarray:
        return np.asarray(self.values, np.float32)

    def encode(self, y: Array) -> Array:
        raise self._refusal()

    def decode(self, codes: Array) -> Array:
        raise self._refusal()

    def round(self, y: Array) -> Array:
        raise self._refusal()

    def in_range(self, y: Array) -> Array:
        raise self._refusal()

    def _refusal(self) -> InputError:
        return InputError(f"{self.name} stores whole blocks, not single codes: use quantize, dequantize, fake_quantize")


Element = Int | Float | Codebook | GGMLBlock

# Levels of IQ4_NL (`kvalues_iq4nl` in ggml-common.h), and twice those of e2m1 in the order of their codes.
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

# Levels of NF4: bitsandbytes, csrc/kernels.cu; equal-probability quantiles of N(0, 1) (Dettmers et al., 2305.14314, E).
NF4 = Codebook(
    name="nf4",
    values=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

# Largest values and biases: OCP OFP8 1.0 (e4m3, e5m2), OCP MX 1.0 (fp6, fp4), ml_dtypes (fnuz, e3m4).
FLOATS = (
    Float("fp8_e4m3", 4, 3, 7, 448.0),
    Float("fp8_e5m2", 5, 2, 15, 57344.0),
    Float("fp8_e4m3fnuz", 4, 3, 8, 240.0, negative_zero=False),
    Float("fp8_e5m2fnuz", 5, 2, 16, 57344.0, negative_zero=False),
    Float("fp8_e3m4", 3, 4, 3, 15.5),
    Float("fp6_e2m3", 2, 3, 1, 7.5),
    Float("fp6_e3m2", 3, 2, 3, 28.0),
    Float("fp4_e2m1", 2, 1, 1, 6.0),
)

ELEMENTS: dict[str, Element] = {
    **{f"int{bits}": Int(bits) for bits in range(2, 9)},
    **{element.name: element for element in FLOATS},
    "nf4": NF4,
}

_E2M1 = tuple(sorted({value / 2 for value in DOUBLED_E2M1}))

# Sizes: ggml-common.h. MXFP4 and NVFP4 carry ggml's name, as OCP's and NVIDIA's own layouts are schemes too.
GGML_BLOCKS = {
    block.name: block
    for block in (
        GGMLBlock("q4_0", 32, 18, 4, tuple(range(-8, 8)), (0,)),
        GGMLBlock("q4_1", 32, 20, 4, tuple(range(16)), (0, 2)),
        GGMLBlock("q5_0", 32, 22, 5, tuple(range(-16, 16)), (0,)),
        GGMLBlock("q5_1", 32, 24, 5, tuple(range(32)), (0, 2)),
        GGMLBlock("q8_0", 32, 34, 8, tuple(range(-127, 128)), (0,), takes_importance=False),
        GGMLBlock("q2_k", 256, 84, 2, tuple(range(4)), (80, 82)),
        GGMLBlock("q3_k", 256, 110, 3, tuple(range(-4, 4)), (108,)),
        GGMLBlock("q4_k", 256, 144, 4, tuple(range(16)), (0, 2)),
        GGMLBlock("q5_k", 256, 176, 5, tuple(range(32)), (0, 2)),
        GGMLBlock("q6_k", 256, 210, 6, tuple(range(-32, 32)), (208,)),
        GGMLBlock("iq4_nl", 32, 18, 4, IQ4_NL_LEVELS, (0,)),
        GGMLBlock("ggml_mxfp4", 32, 17, 4, _E2M1, takes_importance=False),
        GGMLBlock("ggml_nvfp4", 64, 36, 4, _E2M1, takes_importance=False),
    )
}


def code_of_whole_float(value: Array, offset: int = 0) -> Array:
    """uint8 of round(value) + offset in [0, 255], half to even, for an even offset."""
    return jax.lax.platform_dependent(
        value, cpu=partial(_code_by_mantissa, offset=offset), default=partial(_code_by_cast, offset=offset)
    )


def _code_by_cast(value: Array, *, offset: int) -> Array:
    return (jnp.round(value) + offset).astype(jnp.int32).astype(jnp.uint8)


def _code_by_mantissa(value: Array, *, offset: int) -> Array:
    """Added to 1.5·2²³, whose unit in the last place is 1, a value is rounded and its low bits are the code.

    On CPU 1.6× faster than the cast, which checks ranges. On GPU (jax 0.11.2) XLA takes the narrowed bits for a
    saturating cast of the float and gives 255 everywhere.
    """
    return jax.lax.bitcast_convert_type(value + jnp.float32(1.5 * 2.0**23 + offset), jnp.int32).astype(jnp.uint8)


def _exponent(magnitude: Array) -> Array:
    """floor(log2 x) of float32 x ≥ 0; −127 for zero and subnormals."""
    return (jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> 23) - 127


def _float_of_bits(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def _power_of_two(exponent: Array) -> Array:
    """2^exponent as float32, exactly, for exponents −126 … 127."""
    return _float_of_bits((exponent + 127) << 23)


def select_by_order(y: Array, midpoints: np.ndarray, outcomes: np.ndarray) -> Array:
    """outcomes[number of midpoints below y], as a balanced tree of selects: it vectorizes where a search does not."""
    if len(outcomes) == 1:
        return jnp.full(y.shape, outcomes[0])
    half = len(outcomes) // 2
    return jnp.where(
        y > midpoints[half - 1],
        select_by_order(y, midpoints[half:], outcomes[half:]),
        select_by_order(y, midpoints[: half - 1], outcomes[:half]),
    )


def select_by_bits(codes: Array, outcomes: np.ndarray, bits: int) -> Array:
    """outcomes[codes] as a tree of selects on the bits of the code, the highest first."""
    if bits == 0:
        return jnp.full(codes.shape, outcomes[0])
    half = len(outcomes) // 2
    return jnp.where(
        (codes >> (bits - 1)) & 1 == 1,
        select_by_bits(codes, outcomes[half:], bits - 1),
        select_by_bits(codes, outcomes[:half], bits - 1),
    )
