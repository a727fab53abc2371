"""A `Scheme` says how an array is quantized: element × granularity × scale format × zero point.

Spec strings are parsed here, once, at the edge; `str(scheme)` gives the shortest string that parses to the same value.

    ELEMENT[:GRANULARITY][:asym|restricted][:SCALE]          int4:g128   int4:g64:asym:bf16   fp8_e4m3:channel
    a preset with its own defaults                           mxfp4   mxfp8_e5m2:rceil   nvfp4   nf4:g64:dq
    a codebook of your own, levels ascending                 codebook(-1/-0.3/0/0.3/1):g32
    a block type of GGUF, which takes no parts               q4_0   q4_k   iq4_nl   ggml_mxfp4

GRANULARITY: tensor, channel, token, gN (N along the input axis), bRxC (R outputs × C inputs).
SCALE: fp32 (default), bf16, fp16, e4m3, nested (e4m3 × fp32), dq (8-bit), e8m0 and its modes floor, even, ceil, rceil.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from jquant.core.errors import InputError
from jquant.core.formats import ELEMENTS, GGML_BLOCKS, Codebook, Element, GGMLBlock, Int
from jquant.core.scales import DoubleQuantizedScale, FloatScale, NestedScale, PowerOfTwoScale, ScaleFormat


@dataclass(frozen=True)
class Tensor:
    """One scale a matrix; a stack of matrices has one each."""

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class Channel:
    """One scale an output channel, which is a row of W[out, in]."""

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, columns

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class Token:
    """One scale a token, which is a row of activations [..., tokens, features]."""

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, columns

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class Group:
    """One scale for `size` neighbours along the last axis; the last group of a row may be shorter."""

    size: int

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise InputError(f"group size {self.size}: it must be at least 1, as in g128")

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        if self.size > columns:
            raise InputError(
                f"group size {self.size} is wider than the row of {columns}: use g{columns} or less, or `channel`"
            )
        return 1, self.size

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True)
class Block:
    """One scale for a rectangle of `rows` outputs × `columns` inputs; those at the edges may be smaller."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows <= 0 or self.columns <= 0:
            raise InputError(f"block {self}: both sides must be at least 1, as in b128x128")

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        if self.rows > rows or self.columns > columns:
            raise InputError(
                f"block {self} is larger than the matrix {rows}×{columns}: use sides up to these, or `tensor`"
            )
        return self.rows, self.columns

    def __str__(self) -> str:
        return f"b{self.rows}x{self.columns}"


Granularity = Tensor | Channel | Token | Group | Block


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How an array [..., out, in] is quantized. Frozen and hashable: static under jit.

    `zero_point="integer"` makes an integer element asymmetric (SPEC 1): the range of a group, always including 0, is
    spread over codes 0 … 2^b−1, and one code stands for zero.

    With a block type of ggml as its element, scales and zero points lie inside the blocks, and `scale` is unused.
    """

    element: Element
    granularity: Granularity = field(default_factory=Channel)
    scale: ScaleFormat = field(default_factory=FloatScale)
    zero_point: Literal["none", "integer"] = "none"

    def __post_init__(self) -> None:
        if isinstance(self.element, GGMLBlock):
            whole = Group(self.element.elements), FloatScale(), "none"
            if (self.granularity, self.scale, self.zero_point) != whole:
                raise InputError(f"{self.element.name} fixes its blocks and scales: it takes no other parts; drop them")
            return
        if self.zero_point == "integer" and not isinstance(self.element, Int):
            raise InputError(f"{self.element.name} with a zero point: only int2 … int8 can be asymmetric; drop `asym`")
        if self.zero_point == "integer" and not isinstance(self.scale, FloatScale):
            raise InputError(f"a zero point with scales in {self.scale.name}: use fp32, bf16, fp16 or e4m3 scales")
        if self.zero_point == "integer" and self.element != Int(self.element.bits):
            raise InputError(f"{self.element.name} is `restricted` and asymmetric at once: choose one")
        if isinstance(self.scale, PowerOfTwoScale) and isinstance(self.element, Codebook):
            raise InputError(f"{self.element.name} with e8m0 scales: a codebook has no exponent; use a float scale")

    @property
    def block(self) -> GGMLBlock | None:
        """The block type of ggml that it is; None where elements have codes and scales of their own."""
        return self.element if isinstance(self.element, GGMLBlock) else None

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that share a scale. Raises InputError where they exceed the matrix and cannot be padded."""
        return (1, self.block.elements) if self.block is not None else self.granularity.tile(rows, columns)

    @property
    def bits_per_weight(self) -> float:
        """Bits an element takes at rest with its scales and zero points, in the limit of a large matrix.

        `core.qtensor.stored_bytes` counts one of a given shape, padding included.
        """
        if self.block is not None:
            return self.block.bits_per_weight
        bits = float(self.element.bits)
        if isinstance(self.granularity, Group | Block):
            rows, columns = self.granularity.tile(1 << 30, 1 << 30)
            zero_point = self.element.bits if self.zero_point == "integer" else 0
            bits += (self.scale.bits + zero_point) / (rows * columns)
        return bits

    def __str__(self) -> str:
        return _spell(self)


def scheme(spec: str | Scheme) -> Scheme:
    """Parses a spec string; a `Scheme` passes through.

    Raises:
        InputError: the string is malformed; the message names the part and lists what is allowed.
    """
    if isinstance(spec, Scheme):
        return spec
    head, *tokens = spec.strip().split(":")
    element, granularity, scale = _head(head, spec)
    if tokens and isinstance(element, GGMLBlock):
        raise InputError(f"scheme {spec!r}: {head} fixes its blocks and scales: drop {':'.join(tokens)!r}")
    zero_point: Literal["none", "integer"] = "none"
    seen: dict[str, str] = {}
    for token in tokens:
        kind = _kind(token, spec)
        if kind in seen:
            raise InputError(f"scheme {spec!r}: {seen[kind]!r} and {token!r} both give the {kind}; keep one")
        seen[kind] = token
        if kind == "granularity":
            granularity = _granularity(token)
        elif kind == "scale":
            scale = _SCALES[token]
        elif token == "asym":
            zero_point = "integer"
        elif isinstance(element, Int):
            element = Int(element.bits, "restricted" if token == "restricted" else "full")
        else:
            raise InputError(f"scheme {spec!r}: {token!r} is for integers, {element.name} has one convention; drop it")
    return Scheme(element=element, granularity=granularity, scale=scale, zero_point=zero_point)


def with_group(spec: Scheme, group: int) -> Scheme:
    """The same scheme with groups of another size."""
    return Scheme(element=spec.element, granularity=Group(group), scale=spec.scale, zero_point=spec.zero_point)


_MX = Group(32), PowerOfTwoScale()

# name -> element, granularity and scale it brings along. Blocks and scales: OCP MX 1.0, table 1; NVFP4: SPEC 2.
PRESETS: dict[str, tuple[Element, Granularity, ScaleFormat]] = {
    "mxfp4": (ELEMENTS["fp4_e2m1"], *_MX),
    "mxfp6_e2m3": (ELEMENTS["fp6_e2m3"], *_MX),
    "mxfp6_e3m2": (ELEMENTS["fp6_e3m2"], *_MX),
    "mxfp8_e4m3": (ELEMENTS["fp8_e4m3"], *_MX),
    "mxfp8_e5m2": (ELEMENTS["fp8_e5m2"], *_MX),
    "mxint8": (Int(8, "restricted"), *_MX),
    "nvfp4": (ELEMENTS["fp4_e2m1"], Group(16), NestedScale()),
}
_DEFAULT_GRANULARITY: dict[str, Granularity] = {"nf4": Group(64)}  # the block of bitsandbytes; otherwise one a channel

_ALIASES = {"fp8": "fp8_e4m3", "fp4": "fp4_e2m1", "mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3"}

_SCALES: dict[str, ScaleFormat] = {
    "fp32": FloatScale("fp32"),
    "bf16": FloatScale("bf16"),
    "fp16": FloatScale("fp16"),
    "e4m3": FloatScale("e4m3"),
    "nested": NestedScale(),
    "dq": DoubleQuantizedScale(),
    "e8m0": PowerOfTwoScale("floor"),
    "floor": PowerOfTwoScale("floor"),
    "even": PowerOfTwoScale("even"),
    "ceil": PowerOfTwoScale("ceil"),
    "rceil": PowerOfTwoScale("rceil"),
}
_GRANULARITIES: dict[str, Granularity] = {"tensor": Tensor(), "channel": Channel(), "token": Token()}
_GROUP = re.compile(r"g(-?\d+)")
_BLOCK = re.compile(r"b(-?\d+)x(-?\d+)")
_CODEBOOK = re.compile(r"codebook\((.*)\)")


def scheme_names() -> list[str]:
    """Every word a spec string can begin with."""
    return [*ELEMENTS, *(name for name in PRESETS if name not in ELEMENTS), *GGML_BLOCKS, *_ALIASES, "codebook(…)"]


def _head(head: str, spec: str) -> tuple[Element, Granularity, ScaleFormat]:
    name = _ALIASES.get(head, head)
    if name in PRESETS:
        return PRESETS[name]
    if name in GGML_BLOCKS:
        return GGML_BLOCKS[name], Group(GGML_BLOCKS[name].elements), FloatScale()
    if name in ELEMENTS:
        return ELEMENTS[name], _DEFAULT_GRANULARITY.get(name, Channel()), FloatScale()
    if match := _CODEBOOK.fullmatch(name):
        try:
            values = tuple(float(word) for word in match[1].split("/"))
        except ValueError:
            raise InputError(f"scheme {spec!r}: a codebook is numbers with slashes, as codebook(-1/0/1)") from None
        return Codebook(values), Channel(), FloatScale()
    raise InputError(f"scheme {spec!r}: unknown element {head!r}; there are {', '.join(scheme_names())}")


def _kind(token: str, spec: str) -> str:
    if token in _GRANULARITIES or _GROUP.fullmatch(token) or _BLOCK.fullmatch(token):
        return "granularity"
    if token in _SCALES:
        return "scale"
    if token in ("asym", "full", "restricted"):
        return "convention"
    raise InputError(
        f"scheme {spec!r}: unknown part {token!r}; allowed are tensor, channel, token, gN, bRxC, "
        f"asym, full, restricted, and for scales {', '.join(_SCALES)}"
    )


def _granularity(token: str) -> Granularity:
    if match := _GROUP.fullmatch(token):
        return Group(int(match[1]))
    if match := _BLOCK.fullmatch(token):
        return Block(int(match[1]), int(match[2]))
    return _GRANULARITIES[token]


def _spell(spec: Scheme) -> str:
    element = spec.element
    if isinstance(element, GGMLBlock):
        return element.name
    for name, (preset, granularity, scale) in PRESETS.items():
        if element == preset and type(spec.granularity) is type(granularity) and type(spec.scale) is type(scale):
            head, parts = name, [] if spec.granularity == granularity else [str(spec.granularity)]
            parts += _scale_words(spec.scale, default=scale)
            return ":".join([head, *parts])
    if isinstance(element, Codebook) and ELEMENTS.get(element.name) != element:
        head = f"codebook({'/'.join(repr(value) for value in element.values)})"
    else:
        head = element.name
    words = [str(spec.granularity)]
    if spec.zero_point == "integer":
        words.append("asym")
    elif isinstance(element, Int) and element.convention == "restricted":
        words.append("restricted")
    return ":".join([head, *words, *_scale_words(spec.scale, default=FloatScale())])


def _scale_words(scale: ScaleFormat, *, default: ScaleFormat) -> list[str]:
    if scale == default:
        return []
    if isinstance(scale, PowerOfTwoScale):
        return ["e8m0" if scale.mode == "floor" else scale.mode]
    return [scale.name]
