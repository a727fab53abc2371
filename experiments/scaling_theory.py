"""What quantize, evaluation, sweep and QAT multiply, read and hold, by a decoder's sizes; and a paper estimate from it.

Operations, with P weights in the blocks' matrices, T tokens in windows of w, V · d in the head:

    pass         2·P·T + 4·heads·head dim·layers·T·(w+1)/2        head    2·V·d·T
    evaluation   pass + head
    sweep        (1 + cells)·pass + (1 + 2·cells)·head            cells are compared with the reference: two heads each
    QAT          3·(pass + head)                                  a step; no teacher, nothing rematerialized
    quantize     2·pass + Σ 2·T·in² + Σ in³/3 + Σ out·in²         GPTQ: statistics and replay, Gram matrices and their
                                                                  factors (one an input), then each matrix's columns

Bytes held beside the runtime, b a float's bytes:

    evaluation   b·(P' + w·row)              sweep   b·(2·P' + T·d + w·row)       P' with embeddings and head
    QAT          28·P' + b·T·layers·(row + 2·heads·w), row = 4·d + q, k, v + 3·inner: weights, the model's own copy,
                 gradients, two moments, fake-quantized weights and their masks; what the backward pass needs
    quantize     b·(2·weights of a block + 2·T·d + w·row) + 8·Σ in² of a block: Gram matrices and their factors
                 + b·P', the checkpoint's pages: mapped, counted in the resident set, dropped where memory is short

Least seconds on a device: each part the longer of its operations / rate and its bytes / bandwidth, the bytes of a pass
being the weights, once a window (jquant/hardware/roofline.py has the same for prefill and decoding). The estimate is
that times how much longer the measured runs took on their own device than its roofline allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jquant.hardware.devices import Device
from jquant.hardware.model_shape import ModelShape
from jquant.hardware.roofline import usable_bytes

STAGES = ("quantize", "evaluation", "sweep", "QAT")
WINDOW = 256
# Of GPTQ on a GPU: all of the 7 s that it took on an H100, compiled, for the 150,000 columns of SmolLM2-135M.
COLUMN_SECONDS = 47e-6


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a stage runs over."""

    tokens: int  # of calibration, of evaluation, or of a training step
    cells: int = 1  # of a sweep
    window: int = WINDOW


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that is multiplied, and what must be read for it."""

    operations: float
    read: float = 0.0  # weights, or gradients and moments
    exact: bool = False  # in float32 whatever the floats are


def parts(stage: str, shape: ModelShape, load: Load) -> dict[str, Part]:
    """By name."""
    windows = load.tokens / load.window
    seen = load.tokens * (load.window + 1) / 2
    attention = 4 * shape.num_heads * shape.head_dim * shape.num_layers * seen
    once = Part(operations=2 * shape.block_weights * load.tokens + attention, read=shape.block_weights * windows)
    head = 2 * shape.vocab_size * shape.hidden_size * load.tokens
    if stage == "evaluation":
        return {"passes": once, "head": Part(operations=head)}
    if stage == "sweep":
        passes = 1 + load.cells
        return {
            "passes": Part(operations=passes * once.operations, read=passes * once.read),
            "rounding": Part(operations=0, read=2 * load.cells * shape.block_weights),
            "head": Part(operations=(1 + 2 * load.cells) * head),
        }
    if stage == "QAT":
        return {
            "passes": Part(operations=3 * once.operations, read=3 * shape.block_weights),
            "head": Part(operations=3 * head),
            "optimizer": Part(operations=0, read=7 * shape.parameters),  # weight, gradient, moments; three are written
        }
    layers = shape.num_layers
    squares = sum(width**2 for width in _inputs(shape))
    return {
        "passes": Part(operations=2 * once.operations, read=2 * once.read),
        "Gram matrices": Part(operations=layers * 2 * load.tokens * squares),
        "factors": Part(operations=layers * sum(width**3 for width in _inputs(shape)) / 3, exact=True),
        "columns": Part(operations=layers * sum(out * width**2 for out, width in _matrices(shape)), exact=True),
    }


def held_bytes(stage: str, shape: ModelShape, load: Load, *, float_bytes: int = 4, mapped: bool = True) -> float:
    """Beside the runtime and what is constant in it; `mapped` with a quantized checkpoint's own pages."""
    row = 4 * shape.hidden_size + (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    row += 3 * shape.intermediate_size
    states = float_bytes * load.tokens * shape.hidden_size
    window = float_bytes * load.window * row
    weights = float_bytes * shape.parameters
    if stage == "evaluation":
        return weights + window
    if stage == "sweep":
        return 2 * weights + states + window
    if stage == "QAT":
        kept = row + 2 * shape.num_heads * load.window
        return 28 * shape.parameters + float_bytes * load.tokens * shape.num_layers * kept
    block = shape.block_weights / shape.num_layers
    gram = 8 * sum(width**2 for width in _inputs(shape))
    return 2 * float_bytes * block + gram + 2 * states + window + (weights if mapped else 0)


def least_seconds(
    stage: str, shape: ModelShape, load: Load, *, rate: float, exact_rate: float, bandwidth: float, float_bytes: int
) -> float:
    """The roofline: operations a second in the model's floats and in float32, and bytes a second."""
    seconds = 0.0
    for part in parts(stage, shape, load).values():
        size = 4 if part.exact or stage == "QAT" else float_bytes
        seconds += max(part.operations / (exact_rate if part.exact else rate), part.read * size / bandwidth)
    return seconds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a stage on paper."""

    stage: str
    devices: int
    gigabytes: float  # held, of all devices together
    least_hours: float  # by the roofline
    hours: float  # times the measured factor, and for GPTQ the time of its columns


def estimate(stage: str, shape: ModelShape, load: Load, device: Device, *, factor: float) -> Estimate:
    """A stage on as few devices (a power of two) as hold it, which share it evenly; bfloat16, sums in float32.

    GPTQ's columns come one after another and do not fill a GPU: COLUMN_SECONDS for each stand beside the rest. Left out
    are links between devices and reading the checkpoint.

    Args:
        factor: by how much measured runs of the stage exceed the roofline of the device they ran on.
    """
    held = held_bytes(stage, shape, load, float_bytes=2, mapped=False)
    each, bandwidth = usable_bytes(device), device.bandwidth_gb_s
    rates = [device.rate(name) for name in ("bf16", "fp32")]
    assert each is not None
    assert bandwidth is not None
    assert rates[0] is not None
    assert rates[1] is not None
    devices = 2 ** max(0, math.ceil(math.log2(held / each)))
    seconds = least_seconds(
        stage,
        shape,
        load,
        rate=rates[0] * devices,
        exact_rate=rates[1] * devices,
        bandwidth=bandwidth.value * 1e9 * devices,
        float_bytes=2,
    )
    return Estimate(
        stage=stage,
        devices=devices,
        gigabytes=held / 1e9,
        least_hours=seconds / 3600,
        hours=(factor * seconds + (_columns(shape) * COLUMN_SECONDS if stage == "quantize" else 0)) / 3600,
    )


def _columns(shape: ModelShape) -> int:
    return shape.num_layers * sum(width for _, width in _matrices(shape))


def _inputs(shape: ModelShape) -> list[int]:
    """Widths of the inputs of a block that have a Gram matrix of their own: of q, k, v; of o; of gate, up; of down."""
    return [shape.hidden_size, shape.num_heads * shape.head_dim, shape.hidden_size, shape.intermediate_size]


def _matrices(shape: ModelShape) -> list[tuple[int, int]]:
    """(outputs, inputs) of a block's matrices."""
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    return [(heads, hidden), (keys, hidden), (keys, hidden), (hidden, heads), *[(inner, hidden)] * 2, (hidden, inner)]
