"""The catalog of number formats: what each can represent, what it costs, where it runs natively, and who says so.

Numbers about a format are computed from the format itself; only facts about hardware are written down, each with its
source. "Native" means that matrix units multiply operands in that format; anything else is decoded first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import RenderableType
from rich.table import Table

from jquant.core.formats import ELEMENTS, GGML_BLOCKS, Codebook, Element, Float, Int
from jquant.core.scheme import PRESETS, Scheme, scheme

PTX = "NVIDIA PTX ISA 9, mma and tcgen05.mma operand types"
AMPERE = "NVIDIA A100 Tensor Core GPU Architecture, 2020, table 3"
HOPPER = "NVIDIA H100 Tensor Core GPU Architecture, 2022: no int4 in its tensor cores"
CDNA3 = "AMD Instinct MI300 CDNA 3 ISA reference, MFMA instructions"
CDNA4 = "AMD Instinct CDNA 4 ISA reference, MFMA scale instructions"
INTEL = "Intel 64 and IA-32 SDM, AVX512_VNNI and AMX-INT8"
ARM = "Arm ARM DDI 0487, FEAT_I8MM"
TPU = "Google Cloud TPU v4, v5e and v6e system architecture"
JAX_TPU = "jax 0.10.2, pallas TPU hardware table"
GAUDI = "Intel Gaudi 3 AI Accelerator White Paper, 2024"
OCP_MX = "OCP Microscaling Formats (MX) 1.0, 2023, section 5"
OCP_FP8 = "OCP 8-bit Floating Point (OFP8) 1.0, 2023"
ML_DTYPES = "ml_dtypes 0.6, float8 types"
NVFP4_SOURCE = "NVIDIA, Introducing NVFP4, 2025; compressed-tensors 0.20"
QLORA = "Dettmers et al., QLoRA, arXiv 2305.14314"
BFLOAT16 = "Google Cloud TPU: the bfloat16 numerical format; ml_dtypes 0.6"
INT_SOURCE = "Jacob et al., arXiv 1712.05877; compressed-tensors 0.20"
GGML = "ggml: ggml-common.h and docs/gguf.md, 2025"

_BLACKWELL = "NVIDIA Blackwell"
_INT8 = ("NVIDIA Turing+", "AMD MI100+", "Intel VNNI/AMX", "Arm i8mm", "TPU v4, v5e, v5p, v6e")


@dataclass(frozen=True, kw_only=True)
class FormatEntry:
    """One format. Ranges are of the element before scaling."""

    name: str  # a spec string begins with it
    kind: str  # "integer", "float", "codebook", "block format"
    bits: int  # of one element
    exponent_bits: int | None
    mantissa_bits: int | None
    largest: float
    smallest: float  # smallest positive value
    levels: int
    example: str  # spec string whose cost is given
    bits_per_weight: float  # of the example, scales included, in the limit of a large matrix
    native: tuple[str, ...]  # hardware that multiplies it; empty: decoded first
    sources: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def catalog() -> list[FormatEntry]:
    """The wide floats that weights come in, all element formats, the block formats made of them, then ggml's."""
    elements = [_entry(name, element, _example(name)) for name, element in ELEMENTS.items()]
    blocks = [_entry(name, preset[0], scheme(name), kind="block format") for name, preset in PRESETS.items()]
    ggml = [_entry(name, block, scheme(name), kind="block format") for name, block in GGML_BLOCKS.items()]
    return [*_wide_floats(), *elements, *blocks, _entry("nf4:dq", ELEMENTS["nf4"], scheme("nf4:g64:dq")), *ggml]


def render(entries: list[FormatEntry]) -> RenderableType:
    """The catalog as a table for a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title, justify in (
        ("format", "left"),
        ("bits", "right"),
        ("e/m", "right"),
        ("largest", "right"),
        ("smallest", "right"),
        ("levels", "right"),
        ("bits/w", "right"),
        ("native in", "left"),
    ):
        # A number that is cut in two reads as another number.
        table.add_column(title, justify=justify, no_wrap=title != "native in")  # type: ignore[arg-type]
    for entry in entries:
        split = "" if entry.exponent_bits is None else f"{entry.exponent_bits}/{entry.mantissa_bits}"
        table.add_row(
            entry.name,
            str(entry.bits),
            split,
            f"{entry.largest:g}",
            f"{entry.smallest:.4g}",
            str(entry.levels) if entry.levels < 1e6 else f"{entry.levels:.2e}",
            f"{entry.bits_per_weight:.3f}",
            ", ".join(entry.native) or "–",
        )
    table.caption = (
        "bits/w: of a weight with its scales; in which scheme, and every line's sources: jquant formats --json"
    )
    table.caption_justify = "left"
    return table


def _entry(name: str, element: Element, example: Scheme, *, kind: str | None = None) -> FormatEntry:
    levels = element.levels()
    native, sources = _FACTS[name]
    return FormatEntry(
        name=name,
        kind=kind or _kind(element),
        bits=element.bits,
        exponent_bits=element.exponent_bits if isinstance(element, Float) else None,
        mantissa_bits=element.mantissa_bits if isinstance(element, Float) else None,
        largest=float(np.max(np.abs(levels))),
        smallest=float(np.min(levels[levels > 0])),
        levels=len(levels),
        example=str(example),
        bits_per_weight=example.bits_per_weight,
        native=native,
        sources=sources,
    )


def _wide_floats() -> list[FormatEntry]:
    """What checkpoints store before quantization. Levels are the finite values, −0 and 0 being one."""
    entries = []
    for name, dtype, native, source in _WIDE:
        info = ml_dtypes.finfo(dtype)
        entries.append(
            FormatEntry(
                name=name,
                kind="float",
                bits=info.bits,
                exponent_bits=info.nexp,
                mantissa_bits=info.nmant,
                largest=float(info.max),
                smallest=float(info.smallest_subnormal),
                levels=2 * (2**info.nexp - 1) * 2**info.nmant - 1,
                example=name,
                bits_per_weight=float(info.bits),
                native=native,
                sources=(source,),
            )
        )
    return entries


def _kind(element: Element) -> str:
    return "integer" if isinstance(element, Int) else "codebook" if isinstance(element, Codebook) else "float"


def _example(name: str) -> Scheme:
    element = ELEMENTS[name]
    if name == "nf4":
        return scheme("nf4:g64")
    return scheme(f"{name}:channel" if element.bits == 8 or isinstance(element, Float) else f"{name}:g128:fp16")


_FP8_OCP = ("NVIDIA Ada, Hopper, Blackwell", "AMD MI350", "Intel Gaudi 2, 3", "TPU v6e")
_FP8_FNUZ = ("AMD MI300",)
_MX_NATIVE = (_BLACKWELL, "AMD MI350")

_WIDE = (
    ("fp32", np.dtype(np.float32), ("all",), "IEEE 754-2019, binary32"),
    ("fp16", np.dtype(np.float16), ("NVIDIA Volta+", "AMD MI100+", "Apple M1+"), "IEEE 754-2019, binary16"),
    ("bf16", np.dtype(ml_dtypes.bfloat16), ("NVIDIA Ampere+", "AMD MI100+", "Intel AMX", "TPU"), BFLOAT16),
)

# format -> hardware whose matrix units take it, sources
_FACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "int2": ((), (INT_SOURCE,)),
    "int3": ((), (INT_SOURCE,)),
    "int4": (("NVIDIA Turing, Ampere, Ada", "TPU v5e, v5p, v6e"), (INT_SOURCE, PTX, AMPERE, HOPPER, JAX_TPU)),
    "int5": ((), (INT_SOURCE,)),
    "int6": ((), (INT_SOURCE,)),
    "int7": ((), (INT_SOURCE,)),
    "int8": (_INT8, (INT_SOURCE, PTX, CDNA3, INTEL, ARM, TPU, JAX_TPU)),
    "fp8_e4m3": (_FP8_OCP, (OCP_FP8, PTX, CDNA4, GAUDI, JAX_TPU)),
    "fp8_e5m2": (_FP8_OCP, (OCP_FP8, PTX, CDNA4, GAUDI, JAX_TPU)),
    "fp8_e4m3fnuz": (_FP8_FNUZ, (ML_DTYPES, CDNA3)),
    "fp8_e5m2fnuz": (_FP8_FNUZ, (ML_DTYPES, CDNA3)),
    "fp8_e3m4": ((), (ML_DTYPES,)),
    "fp6_e2m3": (_MX_NATIVE, (OCP_MX, PTX, CDNA4)),
    "fp6_e3m2": (_MX_NATIVE, (OCP_MX, PTX, CDNA4)),
    "fp4_e2m1": (_MX_NATIVE, (OCP_MX, PTX, CDNA4)),
    "nf4": ((), (QLORA,)),
    "nf4:dq": ((), (QLORA,)),
    "mxfp4": (_MX_NATIVE, (OCP_MX, PTX, CDNA4)),
    "mxfp6_e2m3": (_MX_NATIVE, (OCP_MX, PTX, CDNA4)),
    "mxfp6_e3m2": (_MX_NATIVE, (OCP_MX, PTX, CDNA4)),
    "mxfp8_e4m3": (_MX_NATIVE, (OCP_MX, PTX, CDNA4)),
    "mxfp8_e5m2": (_MX_NATIVE, (OCP_MX, PTX, CDNA4)),
    "mxint8": ((), (OCP_MX,)),
    "nvfp4": ((_BLACKWELL,), (NVFP4_SOURCE, PTX)),
    **dict.fromkeys(GGML_BLOCKS, ((), (GGML,))),
}
