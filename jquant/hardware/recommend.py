"""Which scheme and method for a model on a device: those that fit and keep the loss, fastest first, and why not others.

    rejected   it does not fit, its expected loss exceeds what is allowed or is not known, or its inputs are in a format
               that the device does not multiply, so that quantizing them costs accuracy and gains nothing
    latency    one request at a time as asked: least seconds for prompt and output
    throughput each candidate with the batch, from the one asked in powers of two, that gives most tokens a second and
               still fits

Equally fast ones, to three digits, stand in the order of their loss. Times are the bounds of roofline.py; losses are
either the user's own sweep of this model, or else this project's of another one, which each line then says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from jquant.core.errors import InputError
from jquant.core.scheme import Scheme, scheme
from jquant.hardware.devices import Device
from jquant.hardware.expected_loss import ExpectedLoss
from jquant.hardware.model_shape import ModelShape
from jquant.hardware.roofline import (
    Load,
    Memory,
    Numerics,
    Time,
    decode,
    memory,
    multiplied_in,
    native_name,
    prefill,
    usable_bytes,
)

First = Literal["latency", "throughput"]
MAX_BATCH = 256  # of a search for throughput
FLOAT = "float"  # the scheme of the model as it is, as sweeps name it


@dataclass(frozen=True)
class Candidate:
    """A scheme by a method, both as sweeps name them: "int8:channel" by "smoothquant@int8:token"."""

    scheme: str
    method: str

    @cached_property
    def weights(self) -> Scheme | None:
        return None if self.scheme == FLOAT else scheme(self.scheme)

    @cached_property
    def inputs(self) -> Scheme | None:
        _, at, spec = self.method.partition("@")
        return scheme(spec) if at else None

    @property
    def key(self) -> tuple[str, str]:
        """What a loss is looked up by: the canonical scheme, and the method."""
        steps, at, _ = self.method.partition("@")
        method = f"{steps}@{self.inputs}" if at else steps
        return (FLOAT if self.weights is None else str(self.weights)), method

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed."""
        return any(name in self.method for name in ("gptq", "awq", "smoothquant"))

    def __str__(self) -> str:
        return self.scheme if self.method in ("rtn", "none") else f"{self.scheme} by {self.method}"


CANDIDATES = tuple(
    Candidate(spec, method)
    for spec, method in (
        (FLOAT, "none"),
        ("int8:channel:fp16", "rtn"),
        ("int8:channel", "rtn@int8:token"),
        ("int8:channel", "smoothquant@int8:token"),
        ("fp8_e4m3:channel:fp16", "rtn"),
        ("fp8_e4m3:channel", "rtn@fp8_e4m3:token"),
        ("fp8_e4m3fnuz:channel", "rtn@fp8_e4m3fnuz:token"),
        ("mxfp8_e4m3", "rtn"),
        ("mxfp8_e4m3", "rtn@mxfp8_e4m3"),
        ("q8_0", "rtn"),
        ("q5_0", "rtn"),
        ("int4:g128:fp16", "gptq"),
        ("int4:g128:asym:fp16", "gptq"),
        ("int4:g128:asym:fp16", "awq"),
        ("int4:g64:asym:fp16", "gptq"),
        ("int4:g64:asym:fp16", "hqq"),
        ("nf4:g64:dq", "rtn"),
        ("nvfp4", "gptq"),
        ("nvfp4", "rtn@nvfp4"),
        ("mxfp4", "gptq"),
        ("mxfp4", "rtn@mxfp4"),
        ("q4_0", "rtn"),
        ("q4_k", "rtn"),
        ("iq4_nl", "rtn"),
        ("int3:g64:asym:fp16", "gptq"),
        ("int2:g64:asym:fp16", "gptq"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What is asked."""

    shape: ModelShape
    device: Device
    devices: int = 1
    load: Load = dataclasses.field(default_factory=Load)
    max_loss_percent: float = 5.0
    first: First = "latency"
    cache: Scheme | None = None  # of keys and values; None: floats of 16 bits
    memory_gb: float | None = None  # of one device, where the table does not say or something else is built in

    def __post_init__(self) -> None:
        if self.first not in get_args(First):
            raise InputError(f"first {self.first!r}: it must be {' or '.join(get_args(First))}")
        if self.devices < 1:
            raise InputError(f"devices {self.devices}: it must be at least 1")
        if not self.max_loss_percent >= 0:
            raise InputError(f"max loss {self.max_loss_percent:g} %: it must be 0 or more")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise InputError(f"memory of {self.memory_gb:g} GB: it must be positive")
        if self.load.context > self.shape.max_length:
            raise InputError(
                f"{self.load.prompt} prompt tokens and {self.load.output} new ones exceed the {self.shape.max_length} "
                f"that {self.shape.name} was made for: ask for fewer"
            )
        if self.usable is None:
            raise InputError(
                f"device {self.device.name}: its memory is what is built in; say how much with --memory, in GB"
            )

    @cached_property
    def usable(self) -> float | None:
        """Bytes of one device that weights, cache and activations may take."""
        return usable_bytes(self.device, memory_gb=self.memory_gb)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A candidate that fits and keeps the loss."""

    candidate: Candidate
    bits_per_weight: float
    batch: int
    memory: Memory  # of each device
    prefill: Time | None  # None: the device's rate is not known
    decode: Time
    seconds: float  # a batch of requests takes, prompt and output
    tokens_per_second: float  # of output, all sequences together, prefill included
    loss: ExpectedLoss
    multiplied_in: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A candidate, and why not."""

    candidate: Candidate
    reasons: tuple[str, ...]
    devices_needed: int | None = None  # where memory is the only reason, how many devices would have enough


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Options, best first, and what was rejected."""

    constraints: Constraints
    options: tuple[Option, ...]
    rejections: tuple[Rejection, ...]
    caveats: tuple[str, ...]  # what a reader must know about device and losses

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        asked = self.constraints
        return {
            "model": {"name": asked.shape.name, "parameters": asked.shape.parameters, "source": asked.shape.source},
            "device": asked.device.as_json(),
            "devices": asked.devices,
            "usable_bytes_per_device": asked.usable,
            "load": dataclasses.asdict(asked.load),
            "max_loss_percent": asked.max_loss_percent,
            "first": asked.first,
            "cache": None if asked.cache is None else str(asked.cache),
            "options": [_option_json(option) for option in self.options],
            "rejected": [
                {"scheme": each.candidate.scheme, "method": each.candidate.method, "reasons": list(each.reasons)}
                for each in self.rejections
            ],
            "caveats": list(self.caveats),
        }


def recommend(
    asked: Constraints,
    losses: Mapping[tuple[str, str], ExpectedLoss],
    *,
    candidates: Sequence[Candidate] = CANDIDATES,
    caveats: Sequence[str] = (),
    unmeasured: str = "",
) -> Recommendation:
    """Ranks the candidates.

    Args:
        asked: model, devices, load and what loss is allowed.
        losses: by canonical scheme and method (`Candidate.key`).
        candidates: what to choose among.
        caveats: about where the losses come from.
        unmeasured: what to do about candidates that have no loss, as a sentence.
    """
    options, rejections = [], []
    for candidate in candidates:
        found = _judge(candidate, asked, losses.get(candidate.key))
        (options if isinstance(found, Option) else rejections).append(found)
    unknown = any(candidate.key not in losses and candidate.scheme != FLOAT for candidate in candidates)
    speed = {"latency": lambda option: 1 / option.seconds, "throughput": lambda option: option.tokens_per_second}
    options.sort(key=lambda option: (-_rounded(speed[asked.first](option)), option.loss.percent))
    return Recommendation(
        constraints=asked,
        options=tuple(options),
        rejections=tuple(rejections),
        caveats=(*_device_caveats(asked), *caveats, *([unmeasured] if unmeasured and unknown else [])),
    )


def _judge(candidate: Candidate, asked: Constraints, loss: ExpectedLoss | None) -> Option | Rejection:
    reasons, enough = [], None
    numerics = Numerics(weights=candidate.weights, inputs=candidate.inputs, cache=asked.cache)
    used = memory(asked.shape, numerics, asked.load, devices=asked.devices)
    assert asked.usable is not None
    if used.total > asked.usable:
        enough = _enough(numerics, asked)
        reasons.append(_too_large(asked, used, enough))
    if candidate.scheme == FLOAT:
        loss = ExpectedLoss(percent=0.0, source="the model as it is")
    if loss is None:
        reasons.append("its loss is not known")
    elif not loss.percent <= asked.max_loss_percent:
        reasons.append(f"loses {loss.percent:.3g} %, and {asked.max_loss_percent:g} % are allowed ({loss.source})")
    if (foreign := _not_native(candidate, asked.device)) is not None:
        reasons.append(foreign)
    if reasons or loss is None:
        only_memory = len(reasons) == 1 and loss is not None
        return Rejection(candidate=candidate, reasons=tuple(reasons), devices_needed=enough if only_memory else None)
    load = asked.load if asked.first == "latency" else _best_load(numerics, asked)
    return _option(candidate, numerics, load, asked, loss)


def _option(candidate: Candidate, numerics: Numerics, load: Load, asked: Constraints, loss: ExpectedLoss) -> Option:
    first, step = _times(numerics, load, asked)
    seconds = (0.0 if first is None else first.total) + load.output * step.total
    bits = numerics.float_bits if candidate.weights is None else candidate.weights.bits_per_weight
    return Option(
        candidate=candidate,
        bits_per_weight=float(bits),
        batch=load.batch,
        memory=memory(asked.shape, numerics, load, devices=asked.devices),
        prefill=first,
        decode=step,
        seconds=seconds,
        tokens_per_second=load.batch * load.output / seconds,
        loss=loss,
        multiplied_in=multiplied_in(numerics, asked.device),
        notes=_notes(candidate, numerics, asked.device),
    )


def _times(numerics: Numerics, load: Load, asked: Constraints) -> tuple[Time | None, Time]:
    first = prefill(asked.shape, numerics, load, asked.device, devices=asked.devices)
    step = decode(asked.shape, numerics, load, asked.device, devices=asked.devices)
    return (None if asked.device.rate(asked.device.float_format) is None else first), step


def _best_load(numerics: Numerics, asked: Constraints) -> Load:
    """The load with the batch of most tokens a second that fits."""
    best, most, batch = asked.load, 0.0, asked.load.batch
    while batch <= max(MAX_BATCH, asked.load.batch):
        load = dataclasses.replace(asked.load, batch=batch)
        assert asked.usable is not None
        if memory(asked.shape, numerics, load, devices=asked.devices).total > asked.usable:
            break
        first, step = _times(numerics, load, asked)
        rate = batch * load.output / ((0.0 if first is None else first.total) + load.output * step.total)
        if rate > most:
            best, most = load, rate
        batch *= 2
    return best


def _enough(numerics: Numerics, asked: Constraints) -> int | None:
    """How many devices have enough memory; None where not even 64 have."""
    usable = asked.usable
    assert usable is not None
    return next((n for n in range(asked.devices + 1, 65) if _total(numerics, asked, n) <= usable), None)


def _too_large(asked: Constraints, used: Memory, enough: int | None) -> str:
    usable = asked.usable
    assert usable is not None
    would = f"{enough} devices would do" if enough else "64 devices would not do"
    return (
        f"needs {_gb(used.total)} a device ({_gb(used.weights)} weights, {_gb(used.cache)} KV cache, "
        f"{_gb(used.activations)} activations) of {_gb(usable)} usable; {would}"
    )


def _total(numerics: Numerics, asked: Constraints, devices: int) -> float:
    return memory(asked.shape, numerics, asked.load, devices=devices).total


def _not_native(candidate: Candidate, device: Device) -> str | None:
    """Why quantized inputs gain nothing on this device; None where they do, or are floats."""
    if candidate.inputs is None or candidate.weights is None:
        return None
    floats = device.float_format
    if multiplied_in(Numerics(weights=candidate.weights, inputs=candidate.inputs), device) != floats:
        return None
    name = native_name(candidate.inputs)
    if name == "fp8" and device.native("fp8fnuz"):
        return f"the fp8 of {device.name} is the fnuz kind (e4m3 to 240), not OCP's (to 448): take fp8_e4m3fnuz"
    narrow = [rate for rate in device.rates if rate not in ("fp32", "bf16", "fp16")]
    return (
        f"{device.name} does not multiply {name or candidate.inputs} but {', '.join(narrow) or 'floats only'}: decoded "
        f"to {floats} first, quantized inputs cost accuracy and gain nothing"
    )


def _notes(candidate: Candidate, numerics: Numerics, device: Device) -> tuple[str, ...]:
    notes = []
    product = multiplied_in(numerics, device)
    if candidate.weights is not None and candidate.inputs is None:
        notes.append(f"weights are decoded to {product} on the way: memory and bandwidth gain, multiplication does not")
    elif candidate.inputs is not None:
        assumed = "" if device.rate(product) else f"; how fast has no source: as {device.float_format} is assumed"
        notes.append(f"codes are multiplied as {product}, natively{assumed}")
    if candidate.needs_data:
        notes.append("learns from calibration text")
    return tuple(notes)


def _device_caveats(asked: Constraints) -> list[str]:
    device = asked.device
    found = ["Times are least times: peaks of the data sheet, nothing lost to kernels or their launch."]
    if device.name.startswith("local"):
        found = ["Times are least times, from the bandwidth and rates that were measured here."]
    found[0] += (
        " Our own decoder on two CPU cores takes 2.1 times as long to prefill and 3 to 6 times as long to decode the "
        "demo (scripts/bench_roofline.py)."
    )
    if device.rate(device.float_format) is None:
        found.append(
            f"No rate of multiplication with a source is known for {device.name}: no time of prefill is given, and "
            "tokens a second count decoding alone, by bandwidth."
        )
    if asked.devices > 1:
        found.append(
            f"{asked.devices} devices are tensor-parallel; two all-reduces a block go over "
            + (
                f"links of {device.link_gb_s.value:g} GB/s one way, not overlapped, their start-up not counted."
                if device.link_gb_s is not None
                else "links whose speed is not known: they are not counted."
            )
        )
    if asked.cache is not None:
        found.append(f"What keys and values in {asked.cache} cost is not among the losses: measure that, too.")
    if device.note:
        found.append(f"{device.name}: {device.note}")
    return found


def _option_json(option: Option) -> dict[str, Any]:
    return {
        "scheme": option.candidate.scheme,
        "method": option.candidate.method,
        "bits_per_weight": option.bits_per_weight,
        "batch": option.batch,
        "memory_bytes_per_device": {**dataclasses.asdict(option.memory), "total": option.memory.total},
        "prefill_seconds": None if option.prefill is None else option.prefill.total,
        "prefill_bound": None if option.prefill is None else option.prefill.bound,
        "decode_seconds_per_token": option.decode.total,
        "decode_bound": option.decode.bound,
        "seconds": option.seconds,
        "tokens_per_second": option.tokens_per_second,
        "loss_percent": option.loss.percent,
        "loss_source": option.loss.source,
        "multiplied_in": option.multiplied_in,
        "notes": list(option.notes),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g} GB"
