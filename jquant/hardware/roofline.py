"""Memory and least time of a decoder on devices: what bandwidth, multiplication and links allow at best.

Memory of one of n devices, tensor-parallel (weights and inner activations cut n ways, the residual stream whole):

    weights      (block matrices · bits of the scheme + embeddings, head, norms · bits of floats) / 8n
    KV cache     2 · kv heads · head dim · cached positions · batch · bits of its scheme / 8·min(n, kv heads)
    activations  tokens at once · (4·hidden + (q, k, v + 3·inner) / n) · bytes of floats + batch · vocabulary · 4 / n
    usable       a share of what is built in (USABLE): the rest is for runtime, workspace, fragmentation and system

Time, each part the longer of what it multiplies and what it reads, parts one after another:

    block matrices   max(2 · weights a token meets · tokens / rate,  bytes of weights touched / bandwidth)
    attention        max(4 · heads · head dim · Σ positions seen / rate of floats,  bytes of the cache / bandwidth)
    head             max(2 · vocabulary · hidden · rows / rate of floats,  its bytes / bandwidth)
    links            2 all-reduces a block of tokens · hidden floats: 2·(n−1)/n · bytes / link, nothing overlapped

Rate and bandwidth are those of all devices together; where they outnumber the kv heads, they read copies of the cache.
Prefill takes all tokens of the prompt through the blocks, in pieces that each read the weights once, and one row a
sequence through the head; a decode step takes one token a sequence. A prompt of p tokens sees p·(p+1)/2 positions.

Scores of attention are taken not to be stored, decoding of packed weights to happen on the way from memory, and experts
to be chosen evenly. Not counted: launch of kernels, start-up of a transfer, what peaks are never reached. So times are
bounds from below; `scripts/bench_roofline.py` prints by how much a run of ours exceeds them.

Reference: Williams et al., Roofline, CACM 52(4), 2009; Pope et al., Efficiently Scaling Transformer Inference,
2211.05102, 2 and 3; 2·(n−1)/n: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69(2), 2009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jquant.core.errors import InputError
from jquant.core.formats import Float, Int
from jquant.core.scales import NestedScale, PowerOfTwoScale
from jquant.core.scheme import Group, Scheme
from jquant.hardware.devices import Device, Kind
from jquant.hardware.model_shape import ModelShape

# Share of the memory that weights, cache and activations may take. GPUs: vLLM's default, --gpu-memory-utilization 0.9.
# Unified: Metal's recommendedMaxWorkingSetSize is some 75 % (gpustack issue 1375). CPU: our assumption.
USABLE: dict[Kind, float] = {"gpu": 0.9, "tpu": 0.9, "accelerator": 0.9, "unified": 0.75, "cpu": 0.8}

Bound = Literal["bandwidth", "rate", "links", "unknown rate"]


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What is stored in how many bits, and what is multiplied in what."""

    weights: Scheme | None = None  # of the block matrices; None: floats
    inputs: Scheme | None = None  # of the block matrices' inputs; None: floats
    cache: Scheme | None = None  # of keys and values; None: floats
    float_bits: int = 16

    def __post_init__(self) -> None:
        if self.float_bits not in (16, 32):
            raise InputError(f"floats of {self.float_bits} bits: give 16 or 32")
        if self.inputs is not None and self.weights is None:
            raise InputError(f"inputs in {self.inputs} and weights in floats: quantize the weights, too")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is run: `batch` sequences of `prompt` tokens, each followed by `output` new ones."""

    batch: int = 1
    prompt: int = 2048
    output: int = 256
    chunk: int | None = None  # tokens of prompts at once, of all sequences together; None: all

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "output"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: it must be at least 1")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk {self.chunk}: it must be at least 1 token")

    @property
    def context(self) -> int:
        """Positions that a sequence has in the end."""
        return self.prompt + self.output


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device."""

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations


@dataclass(frozen=True, kw_only=True)
class Time:
    """Least seconds of a pass, part by part. With an unknown rate only what is read and sent is counted."""

    matrices: float
    attention: float
    head: float
    links: float
    bound: Bound  # of the largest part

    @property
    def total(self) -> float:
        return self.matrices + self.attention + self.head + self.links


def memory(shape: ModelShape, numerics: Numerics, load: Load, *, devices: int = 1) -> Memory:
    """Bytes that each of `devices` holds while the load runs."""
    float_bytes = numerics.float_bits / 8
    block_bytes = shape.block_weights * _weight_bits(numerics) / 8
    others = (shape.embedding_weights + shape.other_parameters) * float_bytes
    tokens = min(load.batch * load.prompt, load.chunk or load.batch * load.prompt)
    inner = max(1, shape.experts_per_token) * shape.intermediate_size * (3 if shape.gated else 2)
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    row = 4 * shape.hidden_size + (heads + inner) / devices
    return Memory(
        weights=(block_bytes + others) / devices,
        cache=load.batch * _cache_bytes(shape, numerics, load.context) / min(devices, shape.num_kv_heads),
        activations=tokens * row * float_bytes + load.batch * shape.vocab_size * 4 / devices,
    )


def usable_bytes(device: Device, *, memory_gb: float | None = None) -> float | None:
    """What weights, cache and activations may take of one device, or of `memory_gb` in its place; None: not known."""
    if memory_gb is None and device.memory_gb is not None:
        memory_gb = device.memory_gb.value
    return None if memory_gb is None else USABLE[device.kind] * memory_gb * 1e9


def prefill(shape: ModelShape, numerics: Numerics, load: Load, device: Device, *, devices: int = 1) -> Time:
    """Least time until all prompts have been read and each sequence has its first token."""
    tokens = load.batch * load.prompt
    pieces = math.ceil(tokens / (load.chunk or tokens))
    seen = load.batch * _causal_positions(shape, load.prompt)
    piece = min(load.prompt, load.chunk or load.prompt)  # of one sequence, whose cache each piece reads
    ends = [min(start + piece, load.prompt) for start in range(0, load.prompt, piece)]
    read = load.batch * sum(_cache_bytes(shape, numerics, end) for end in ends)
    touched = pieces * shape.touched_weights(tokens / pieces)
    return _time(shape, numerics, device, devices, tokens=tokens, touched=touched, seen=seen, read=read, load=load)


def decode(
    shape: ModelShape, numerics: Numerics, load: Load, device: Device, *, devices: int = 1, context: float | None = None
) -> Time:
    """Least time of a step that gives each sequence one token, by default halfway through the output."""
    context = load.prompt + load.output / 2 if context is None else context
    seen = load.batch * shape.cached_positions(context)
    read = load.batch * _cache_bytes(shape, numerics, context)
    touched = shape.touched_weights(load.batch)
    return _time(shape, numerics, device, devices, tokens=load.batch, touched=touched, seen=seen, read=read, load=load)


def native_name(spec: Scheme) -> str | None:
    """Which of devices.RATE_NAMES multiplies operands of this scheme as codes; None: nothing does."""
    element, scale = spec.element, spec.scale
    if isinstance(element, Int):
        return f"int{element.bits}" if element.bits in (4, 8) and not isinstance(scale, PowerOfTwoScale) else None
    if not isinstance(element, Float):
        return None
    if isinstance(scale, PowerOfTwoScale):
        micro = spec.granularity == Group(32) and element.bits in (4, 6, 8) and "fnuz" not in element.name
        return f"mxfp{element.bits}" if micro else None
    if element.name == "fp4_e2m1":
        return "nvfp4" if isinstance(scale, NestedScale) and spec.granularity == Group(16) else None
    if element.name in ("fp8_e4m3", "fp8_e5m2"):
        return "fp8"
    return "fp8fnuz" if element.name in ("fp8_e4m3fnuz", "fp8_e5m2fnuz") else None


def multiplied_in(numerics: Numerics, device: Device) -> str:
    """The format that block matrices are multiplied in on this device: that of the codes if both operands are codes of
    one kind that is native, int8 for narrower integers against int8, else floats after decoding."""
    floats = "fp32" if numerics.float_bits == 32 else device.float_format
    if numerics.weights is None or numerics.inputs is None:
        return floats
    weights, inputs = native_name(numerics.weights), native_name(numerics.inputs)
    if weights == "int4" and inputs == "int8":
        weights = "int8"
    return weights if weights is not None and weights == inputs and device.native(weights) else floats


def _time(
    shape: ModelShape,
    numerics: Numerics,
    device: Device,
    devices: int,
    *,
    tokens: int,
    touched: float,
    seen: float,
    read: float,
    load: Load,
) -> Time:
    if devices < 1:
        raise InputError(f"devices {devices}: it must be at least 1")
    if device.bandwidth_gb_s is None:
        raise InputError(f"device {device.name}: its bandwidth is not known; measure it: jquant hardware --measure")
    bandwidth = devices * device.bandwidth_gb_s.value * 1e9
    float_bytes = numerics.float_bits / 8
    floats = device.rate("fp32" if numerics.float_bits == 32 else device.float_format)
    rate = device.rate(multiplied_in(numerics, device)) or floats  # no narrower format that is native is slower
    head = shape.vocab_size * shape.hidden_size
    small = shape.other_parameters * float_bytes
    read *= devices / min(devices, shape.num_kv_heads)  # devices that share a head of keys and values read all of it
    parts = {
        "matrices": _part(
            2.0 * shape.active_weights * tokens, rate, touched * _weight_bits(numerics) / 8 + small, bandwidth, devices
        ),
        "attention": _part(4.0 * shape.num_heads * shape.head_dim * seen, floats, read, bandwidth, devices),
        "head": _part(2.0 * head * load.batch, floats, head * float_bytes, bandwidth, devices),
    }
    sent = 2 * shape.num_layers * tokens * shape.hidden_size * float_bytes * 2 * (devices - 1) / devices
    link = None if device.link_gb_s is None else device.link_gb_s.value * 1e9
    links = sent / link if link else 0.0
    largest = max(parts.values(), key=lambda part: part[0])
    return Time(
        **{name: seconds for name, (seconds, _) in parts.items()},
        links=links,
        bound="links" if links > largest[0] else largest[1],
    )


def _part(operations: float, rate: float | None, read: float, bandwidth: float, devices: int) -> tuple[float, Bound]:
    """The longer of multiplying and reading, and which it is."""
    reading = read / bandwidth
    if rate is None:
        return reading, "unknown rate"
    multiplying = operations / (rate * devices)
    return (multiplying, "rate") if multiplying > reading else (reading, "bandwidth")


def _weight_bits(numerics: Numerics) -> float:
    return numerics.float_bits if numerics.weights is None else numerics.weights.bits_per_weight


def _cache_bytes(shape: ModelShape, numerics: Numerics, context: float) -> float:
    """Keys and values of one sequence. A scale a token is one a head, as caches have it."""
    if numerics.cache is None:
        bits = float(numerics.float_bits)
    elif isinstance(numerics.cache.granularity, Group) or numerics.cache.block is not None:
        bits = numerics.cache.bits_per_weight
    else:
        bits = numerics.cache.element.bits + numerics.cache.scale.bits / shape.head_dim
    return 2 * shape.num_kv_heads * shape.head_dim * shape.cached_positions(context) * bits / 8


def _causal_positions(shape: ModelShape, tokens: int) -> float:
    """Σ over blocks and tokens of a prompt of the positions that a token sees."""
    full = (shape.num_layers - len(shape.windows)) * tokens * (tokens + 1) / 2
    windowed = sum(
        tokens * (tokens + 1) / 2 if tokens <= window else window * (window + 1) / 2 + (tokens - window) * window
        for window in shape.windows
    )
    return full + windowed
