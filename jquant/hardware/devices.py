"""The table of devices: memory, bandwidth, rates of multiplication by format, each figure with its document and date.

Rates are dense (sheets often print twice as much, for weights of which half are zeros) and peaks, with accumulation in
float32 or int32 where a sheet tells accumulators apart. A format that stands among a device's rates is native: its
matrix units, or for a CPU its dot-product instructions, multiply operands in it; anything else is decoded first. A rate
of None is of a format that is native and for which the maker publishes no figure. All were looked up in November 2026.

Longer than house style allows: it is a table, and a row has to be read beside its neighbours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jquant.core.errors import InputError

# Formats that multiply natively somewhere. "fp8" is OCP's (e4m3 to 448, e5m2); "fp8fnuz" has no −0 and no infinity, its
# e4m3 ends at 240, and its codes mean half of what OCP's mean (ml_dtypes, float8_e4m3fnuz).
RATE_NAMES = (
    "fp32", "bf16", "fp16", "fp8", "fp8fnuz", "int8", "int4", "mxfp8", "mxfp6", "mxfp4", "nvfp4",
)  # fmt: skip
Kind = Literal["gpu", "tpu", "accelerator", "unified", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A document, and when it was published or last looked up."""

    title: str
    date: str

    def __str__(self) -> str:
        return f"{self.title} ({self.date})"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of a device, and who says so."""

    value: float
    source: Source


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device: a card, of a TPU a chip, of a CPU a socket."""

    name: str
    family: str
    kind: Kind
    memory_gb: Figure | None  # 1e9 bytes; None: what is built in differs
    bandwidth_gb_s: Figure | None
    rates: Mapping[str, Figure | None]  # 1e12 operations a second by native format; None: not published
    link_gb_s: Figure | None = None  # to its like, one way, all links together
    note: str = ""
    seen_as: tuple[str, ...] = ()  # JAX's device_kind, in lower case

    def native(self, name: str) -> bool:
        """Whether operands in this format, one of RATE_NAMES, are multiplied without decoding."""
        return name in self.rates

    def rate(self, name: str) -> float | None:
        """Operations a second, or None where it is not native or not known."""
        figure = self.rates.get(name)
        return None if figure is None else 1e12 * figure.value

    @property
    def float_format(self) -> str:
        """What decoded weights are multiplied in: bf16 where it is native, else float32."""
        return "bf16" if "bf16" in self.rates else "fp32"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "family": self.family,
            "kind": self.kind,
            "memory_gb": _figure_json(self.memory_gb),
            "bandwidth_gb_s": _figure_json(self.bandwidth_gb_s),
            "link_gb_s": _figure_json(self.link_gb_s),
            "rates_tera": {name: _figure_json(figure) for name, figure in self.rates.items()},
            "note": self.note,
        }


def find_device(name: str) -> Device:
    """The device of this name, in any case, as `h100-sxm`.

    Raises:
        InputError: it is unknown; the message has the nearest name and lists all that are known.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in DEVICES:
        return DEVICES[wanted]
    near = [known for known in DEVICES if wanted and known.startswith(wanted)]
    near = near or difflib.get_close_matches(wanted, DEVICES, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ";"
    raise InputError(f"device {name!r} is unknown{hint} known are {', '.join(DEVICES)}")


def device_of_kind(device_kind: str) -> Device | None:
    """The row of what JAX calls a device (`jax.Device.device_kind`), or None.

    Names are compared as a whole: A10 and A100, L4 and L40, H100 and H100 NVL, a card and a MIG slice of it, TPU v4 and
    v4 lite begin alike and are not alike. Only AMD's words for a module and for a card passed through are left off.
    """
    seen = device_kind.strip().lower().removesuffix(" oam").removesuffix(" vf")
    return next((device for device in DEVICES.values() if seen in device.seen_as), None)


def render(devices: list[Device]) -> RenderableType:
    """The devices as a table for a terminal; of one alone all figures with their sources."""
    return _details(devices[0]) if len(devices) == 1 else _overview(devices)


def _overview(devices: list[Device]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    columns = ("fp32", "bf16", "fp8", "int8", "int4", "fp4")
    for title in ("device", "GB", "GB/s", *columns):
        table.add_column(title, justify="left" if title == "device" else "right", no_wrap=True)
    table.add_column("native formats", justify="left")
    for device in devices:
        rates = [
            _cell(device, "fp8", "fp8fnuz") if name == "fp8" else
            _cell(device, "nvfp4", "mxfp4") if name == "fp4" else _cell(device, name)
            for name in columns
        ]  # fmt: skip
        sizes = [_number(device.memory_gb), _number(device.bandwidth_gb_s)]
        table.add_row(device.name, *sizes, *rates, ", ".join(device.rates))
    table.caption = (
        "Peak dense rates in 1e12 operations a second. –: not native, decoded first. ?: no figure found with a source. "
        "fp8fnuz: largest 240 where OCP's e4m3 has 448. Sources: jquant hardware NAME, or --json"
    )
    table.caption_justify = "left"
    return table


def _details(device: Device) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    figures = {
        "memory": (device.memory_gb, "GB"),
        "bandwidth": (device.bandwidth_gb_s, "GB/s"),
        "to its like, one way": (device.link_gb_s, "GB/s"),
        **{name: (figure, "e12 operations/s") for name, figure in device.rates.items()},
    }
    for name, (figure, unit) in figures.items():
        table.add_row(name, "no figure found with a source" if figure is None else f"{figure.value:.5g} {unit}")
    said: dict[Source, list[str]] = {}
    for name, (figure, _) in figures.items():
        if figure is not None:
            said.setdefault(figure.source, []).append(name)
    absent = [name for name in RATE_NAMES if name not in device.rates]
    after = [f"Not native, decoded first: {', '.join(absent)}."] if absent else []
    after += [device.note] if device.note else []
    after += [f"{', '.join(names)}: {source}" for source, names in said.items()]
    return Group(Text(f"{device.name}: {device.family}"), table, *map(Text, after))


def _cell(device: Device, *names: str) -> str:
    for name in names:
        if device.native(name):
            return _number(device.rates[name])
    return "–"


def _number(figure: Figure | None) -> str:
    return "?" if figure is None else f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"


def _figure_json(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    return {"value": figure.value, "source": figure.source.title, "date": figure.source.date}


# Sources --------------------------------------------------------------------------------------------------------------


def _source(title: str, date: str) -> Source:
    return Source(title=title, date=date)


_LOOKED_UP = "looked up 2026-11"
_GA100 = _source("NVIDIA A100 Tensor Core GPU Architecture, table 1", "2020")
_A100 = _source("NVIDIA A100 Tensor Core GPU data sheet", "2021-06")
_GH100 = _source("NVIDIA H100 Tensor Core GPU Architecture, table 3", "2022")
_H100 = _source("NVIDIA H100 Tensor Core GPU data sheet", "2023")
_H200 = _source("NVIDIA H200 Tensor Core GPU data sheet, halved where with sparsity", "2024")
_BLACKWELL = _source("NVIDIA Blackwell data sheet, GB200 NVL72 and HGX B200, halved where with sparsity", "2025")
_A10 = _source("NVIDIA A10 Tensor Core GPU data sheet", "2021")
_L4 = _source("NVIDIA L4 Tensor Core GPU data sheet, halved where with sparsity", "2023")
_L40S = _source("NVIDIA L40S data sheet", "2023")
_GA102 = _source("NVIDIA Ampere GA102 GPU Architecture, appendix A", "2020")
_AD102 = _source("NVIDIA Ada GPU Architecture, appendix A, float32 accumulation", "2022")
_GB202 = _source("NVIDIA RTX Blackwell GPU Architecture, appendix A, float32 accumulation", "2025")
_PCIE = _source("PCI Express: 16 lanes of generation 4 or 5, as the card's data sheet says", "2022")
_MI250X = _source("AMD Instinct MI250X data sheet", "2021-11")
_MI300X = _source("AMD Instinct MI300X data sheet", "2023-12")
_MI325X = _source("AMD Instinct MI325X data sheet", "2024-10")
_MI355X = _source("AMD Instinct MI355X data sheet, rounded there", "2025-06")
_CDNA4 = _source("AMD CDNA 4 Architecture White Paper: seven links of 76.8 GB/s one way", "2025")
_GAUDI2 = _source("Intel Gaudi 2 in the Intel Gaudi 3 AI Accelerator White Paper, comparison table", "2024-04")
_GAUDI3 = _source("Intel Gaudi 3 AI Accelerator White Paper, HL-325L", "2024-04")
_APPLE_M2 = _source("Apple, M2 Ultra announcement and Mac Studio (2023) specifications", "2023-06")
_APPLE_M4 = _source("Apple, M4 Max announcement and MacBook Pro (2024) specifications", "2024-10")
_SPR = _source("Intel Xeon Platinum 8480+ product page: 56 cores, 2.0 GHz base, 8 channels DDR5-4800", _LOOKED_UP)
_SPR_RATE = _source(
    "worked out: 56 cores × 2.0 GHz base × operations a cycle of AMX (bf16 1,024, int8 2,048) and AVX-512 (64) in "
    "Intel 64 Architectures Optimization Reference Manual",
    "2023",
)
_ICX = _source("Intel Xeon Platinum 8380 product page: 40 cores, 2.3 GHz base, 8 channels DDR4-3200", _LOOKED_UP)
_ICX_RATE = _source(
    "worked out: 40 cores × 2.3 GHz base × operations a cycle of AVX-512 (fp32 64, VNNI int8 256) in Intel 64 "
    "Architectures Optimization Reference Manual",
    "2023",
)
_GENOA = _source("AMD EPYC 9654 product page: 96 cores, 2.4 GHz base, 12 channels DDR5-4800", _LOOKED_UP)
_GENOA_RATE = _source(
    "worked out: 96 cores × 2.4 GHz base × operations a cycle (fp32 32, VNNI int8 128: 256-bit data paths) in AMD "
    "Software Optimization Guide for Zen 4, 57647",
    "2023",
)
_GRAVITON4 = _source("AWS re:Invent 2023 and AnandTech 21172: 96 Neoverse V2, 12 channels DDR5-5600", "2023-11")
_TPU_V4 = _source("Google Cloud, TPU v4 system architecture", _LOOKED_UP)
_TPU_V4_LINKS = _source("Jouppi et al., TPU v4, 2304.01433, table 4: six links of 50 GB/s", "2023")
_TPU_V5E = _source("Google Cloud, TPU v5e system architecture", _LOOKED_UP)
_TPU_V5P = _source("Google Cloud, TPU v5p system architecture", _LOOKED_UP)
_TPU_V6E = _source("Google Cloud, TPU v6e system architecture", _LOOKED_UP)
_JAX_TPU = _source("jax 0.10.2, pallas TPU hardware table (tpu_info)", "2026")
_GIB = 2**30 / 1e9  # what Google's pages give the memory of v4 and v5p in


# Rows -----------------------------------------------------------------------------------------------------------------

Entry = float | tuple[float, Source] | None


def _device(name: str, family: str, kind: Kind, source: Source, **given: Any) -> Device:
    """A row: figures are of `source` where they do not bring their own."""

    def figure(entry: Entry) -> Figure | None:
        if entry is None:
            return None
        value, said = entry if isinstance(entry, tuple) else (entry, source)
        return Figure(value=float(value), source=said)

    rates: dict[str, Entry] = given.pop("rates")
    return Device(
        name=name,
        family=family,
        kind=kind,
        memory_gb=figure(given.pop("memory")),
        bandwidth_gb_s=figure(given.pop("bandwidth")),
        link_gb_s=figure(given.pop("link", None)),
        rates={rate: figure(rates[rate]) for rate in RATE_NAMES if rate in rates},
        **given,
    )


_HOPPER_RATES = {"fp32": 66.9, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "int8": 1978.9}
_AMPERE_RATES = {"fp32": 19.5, "bf16": 312, "fp16": 312, "int8": 624, "int4": 1248}
_NO_INT4 = "Its tensor cores multiply no int4: 4-bit integers are decoded first."
_NO_FP8 = "Its tensor cores multiply no fp8."
_FNUZ = "Its fp8 is the fnuz kind (e4m3 to 240): codes of OCP fp8 must be converted, and scales doubled."
_APPLE_NOTE = (
    "Memory is shared with the system: Metal lets the GPU have some 75 % of it. Apple publishes no rate of "
    "multiplication, so prefill is not predicted; measure it with jquant hardware --measure"
)
_CPU_NOTE = "Memory is what is built in. Rates are at the base clock, all cores busy."

_ROWS = (
    _device(
        "h100-sxm", "NVIDIA Hopper", "gpu", _GH100,
        memory=80, bandwidth=(3350, _H100), link=(450, _H100), rates=_HOPPER_RATES, note=_NO_INT4,
        seen_as=("nvidia h100 80gb hbm3",),
    ),
    _device(
        "h100-pcie", "NVIDIA Hopper", "gpu", _GH100,
        memory=80, bandwidth=(2000, _H100), link=(300, _H100), note=f"{_NO_INT4} The link is a bridge of two cards.",
        rates={"fp32": 51.2, "bf16": 756, "fp16": 756, "fp8": 1513, "int8": 1513},
        seen_as=("nvidia h100 pcie",),
    ),
    _device(
        "h200", "NVIDIA Hopper", "gpu", _H200,
        memory=141, bandwidth=4800, link=450, note=_NO_INT4, seen_as=("nvidia h200",),
        rates={"fp32": (67, _H200), "bf16": 989.5, "fp16": 989.5, "fp8": 1979, "int8": 1979},
    ),
    _device(
        "b200", "NVIDIA Blackwell", "gpu", _BLACKWELL,
        memory=180, bandwidth=7700, link=900, note=_NO_INT4, seen_as=("nvidia b200",),
        rates={
            "fp32": 75, "bf16": 2250, "fp16": 2250, "fp8": 4500, "int8": 4500, "mxfp8": 4500, "mxfp6": 4500,
            "mxfp4": 9000, "nvfp4": 9000,
        },
    ),
    _device(
        "gb200", "NVIDIA Blackwell", "gpu", _BLACKWELL,
        memory=186, bandwidth=8000, link=900, note=f"One GPU of the superchip, which has two. {_NO_INT4}",
        rates={
            "fp32": 80, "bf16": 2500, "fp16": 2500, "fp8": 5000, "int8": 5000, "mxfp8": 5000, "mxfp6": 5000,
            "mxfp4": 10000, "nvfp4": 10000,
        },
        seen_as=("nvidia gb200",),
    ),
    _device(
        "a100-40gb", "NVIDIA Ampere", "gpu", _GA100,
        memory=40, bandwidth=1555, link=300, rates=_AMPERE_RATES, note=_NO_FP8, seen_as=("nvidia a100-sxm4-40gb",),
    ),
    _device(
        "a100-80gb", "NVIDIA Ampere", "gpu", _A100,
        memory=80, bandwidth=2039, link=300, rates=_AMPERE_RATES, note=f"The SXM module. {_NO_FP8}",
        seen_as=("nvidia a100-sxm4-80gb", "nvidia a100-sxm-80gb"),
    ),
    _device(
        "a10", "NVIDIA Ampere", "gpu", _A10,
        memory=24, bandwidth=600, link=(32, _PCIE), note=_NO_FP8, seen_as=("nvidia a10",),
        rates={"fp32": 31.2, "bf16": 125, "fp16": 125, "int8": 250, "int4": 500},
    ),
    _device(
        "l4", "NVIDIA Ada", "gpu", _L4,
        memory=24, bandwidth=300, link=(32, _PCIE), seen_as=("nvidia l4",),
        rates={"fp32": 30.3, "bf16": 121, "fp16": 121, "fp8": 242.5, "int8": 242.5, "int4": None},
    ),
    _device(
        "l40s", "NVIDIA Ada", "gpu", _L40S,
        memory=48, bandwidth=864, link=(32, _PCIE), seen_as=("nvidia l40s",),
        rates={"fp32": 91.6, "bf16": 362, "fp16": 362, "fp8": 733, "int8": 733, "int4": 733},
    ),
    _device(
        "rtx-3090", "NVIDIA Ampere", "gpu", _GA102,
        memory=24, bandwidth=936, link=(56.2, _GA102), note=_NO_FP8,
        rates={"fp32": 35.6, "bf16": 71, "fp16": 71, "int8": 284, "int4": 568}, seen_as=("nvidia geforce rtx 3090",),
    ),
    _device(
        "rtx-4090", "NVIDIA Ada", "gpu", _AD102,
        memory=24, bandwidth=1008, link=(32, _PCIE), seen_as=("nvidia geforce rtx 4090",),
        rates={"fp32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "int8": 660.6, "int4": 1321.2},
    ),
    _device(
        "rtx-5090", "NVIDIA Blackwell", "gpu", _GB202,
        memory=32, bandwidth=1792, link=(64, _PCIE), note=_NO_INT4, seen_as=("nvidia geforce rtx 5090",),
        rates={
            "fp32": 104.8, "bf16": 209.5, "fp16": 209.5, "fp8": 419, "int8": 838, "mxfp8": None, "mxfp6": None,
            "mxfp4": 1676, "nvfp4": 1676,
        },
    ),
    _device(
        "mi250x", "AMD CDNA 2", "gpu", _MI250X,
        memory=128, bandwidth=3277, note="Two dies of 64 GB, which JAX sees as two devices. It multiplies no fp8.",
        rates={"fp32": 95.7, "bf16": 383, "fp16": 383, "int8": 383},
        seen_as=("amd instinct mi250x", "amd instinct mi250x / mi250"),
    ),
    _device(
        "mi300x", "AMD CDNA 3", "gpu", _MI300X,
        memory=192, bandwidth=5300, link=448, note=_FNUZ, seen_as=("amd instinct mi300x",),
        rates={"fp32": 163.4, "bf16": 1307.4, "fp16": 1307.4, "fp8fnuz": 2614.9, "int8": 2614.9},
    ),
    _device(
        "mi325x", "AMD CDNA 3", "gpu", _MI325X,
        memory=256, bandwidth=6000, link=448, note=_FNUZ, seen_as=("amd instinct mi325x",),
        rates={"fp32": 163.4, "bf16": 1307.4, "fp16": 1307.4, "fp8fnuz": 2614.9, "int8": 2614.9},
    ),
    _device(
        "mi355x", "AMD CDNA 4", "gpu", _MI355X,
        memory=288, bandwidth=8000, link=(537.6, _CDNA4), note="Its fp8 is OCP's.", seen_as=("amd instinct mi355x",),
        rates={
            "fp32": 157.3, "bf16": 2500, "fp16": 2500, "fp8": 5000, "int8": 5000, "mxfp8": 5000, "mxfp6": 10000,
            "mxfp4": 10000,
        },
    ),
    _device(
        "gaudi2", "Intel Gaudi", "accelerator", _GAUDI2,
        memory=96, bandwidth=2450, link=262.5, rates={"fp32": None, "bf16": 432, "fp16": None, "fp8": 865},
        note="Its e4m3 ends at 240, as its own software scales for (INC, float8_e4m3 on Gaudi 2).",
    ),
    _device(
        "gaudi3", "Intel Gaudi", "accelerator", _GAUDI3,
        memory=128, bandwidth=3700, link=525, rates={"fp32": None, "bf16": 1835, "fp16": None, "fp8": 1835},
        note="fp8 multiplies no faster than bf16: it saves memory and bandwidth.",
    ),
    _device(
        "m2-ultra", "Apple Silicon", "unified", _APPLE_M2,
        memory=192, bandwidth=800, rates={"fp32": None, "bf16": None, "fp16": None}, note=_APPLE_NOTE,
        seen_as=("apple m2 ultra",),
    ),
    _device(
        "m4-max", "Apple Silicon", "unified", _APPLE_M4,
        memory=128, bandwidth=546, rates={"fp32": None, "bf16": None, "fp16": None}, note=_APPLE_NOTE,
        seen_as=("apple m4 max",),
    ),
    _device(
        "xeon-8480", "Intel Xeon, Sapphire Rapids (AMX)", "cpu", _SPR,
        memory=None, bandwidth=307.2, note=_CPU_NOTE,
        rates={"fp32": (7.17, _SPR_RATE), "bf16": (114.7, _SPR_RATE), "int8": (229.4, _SPR_RATE)},
    ),
    _device(
        "xeon-8380", "Intel Xeon, Ice Lake (VNNI)", "cpu", _ICX,
        memory=None, bandwidth=204.8, note=_CPU_NOTE,
        rates={"fp32": (5.89, _ICX_RATE), "int8": (23.55, _ICX_RATE)},
    ),
    _device(
        "epyc-9654", "AMD EPYC, Zen 4 (VNNI, AVX512-BF16)", "cpu", _GENOA,
        memory=None, bandwidth=460.8, note=_CPU_NOTE,
        rates={"fp32": (7.37, _GENOA_RATE), "bf16": None, "int8": (29.5, _GENOA_RATE)},
    ),
    _device(
        "graviton4", "Arm Neoverse V2 (i8mm, bf16)", "cpu", _GRAVITON4,
        memory=None, bandwidth=537.6, rates={"fp32": None, "bf16": None, "int8": None}, note=_CPU_NOTE,
    ),
    _device(
        "tpu-v4", "Google TPU", "tpu", _TPU_V4,
        memory=32 * _GIB, bandwidth=1200, link=(300, _TPU_V4_LINKS), seen_as=("tpu v4",),
        rates={"fp32": None, "bf16": 275, "int8": 275},
        note="int8 multiplies no faster than bf16: it saves memory and bandwidth.",
    ),
    _device(
        "tpu-v5e", "Google TPU", "tpu", _TPU_V5E,
        memory=(17.2, _JAX_TPU), bandwidth=819, link=200, seen_as=("tpu v5 lite", "tpu v5e"),
        rates={"fp32": None, "bf16": 197, "int8": 393, "int4": (788, _JAX_TPU)},
    ),
    _device(
        "tpu-v5p", "Google TPU", "tpu", _TPU_V5P,
        memory=95 * _GIB, bandwidth=2765, link=600, seen_as=("tpu v5p", "tpu v5"),
        rates={"fp32": None, "bf16": 459, "int8": (918, _JAX_TPU), "int4": (1840, _JAX_TPU)},
    ),
    _device(
        "tpu-v6e", "Google TPU", "tpu", _TPU_V6E,
        memory=(34.4, _JAX_TPU), bandwidth=1638, link=400, seen_as=("tpu v6 lite", "tpu v6e"),
        rates={"fp32": None, "bf16": 918, "fp8": (920, _JAX_TPU), "int8": 1836, "int4": (3680, _JAX_TPU)},
        note="fp8 multiplies no faster than bf16: it saves memory and bandwidth.",
    ),
)  # fmt: skip
DEVICES = {device.name: device for device in _ROWS}
