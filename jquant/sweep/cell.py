"""One cell: quantize the weights, measure their error and size, evaluate the model with the decoded values.

The model is evaluated on dequantized weights put into the float model: that is what a packed layer computes with, bit
for bit, and one compiled program then serves every scheme. Only layers that quantize their inputs are packed ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
from flax import nnx

from jquant.core.metrics import summarize
from jquant.core.qtensor import stored_bytes
from jquant.core.scheme import Group
from jquant.data.blocks import Windows
from jquant.evaluation.result import Perplexity
from jquant.evaluation.scoring import Reference, evaluate
from jquant.models.decoder import Decoder
from jquant.models.save import model_bytes
from jquant.nn.linear import ExpertLinear, Linear
from jquant.ptq.source import share
from jquant.sweep.grid import Point
from jquant.sweep.quantize import quantize_in_place
from jquant.sweep.results import Cell
from jquant.sweep.statistics import Statistics

FLOAT = "float"
NUMERICS = 8  # raised when a change moves numbers of cells: cells of another value are not mixed with these


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What all cells share: the float model, the layers to quantize, the windows, and the reference on them."""

    model: Decoder
    layers: dict[str, Linear | ExpertLinear]
    windows: Windows
    reference: Reference


def measure(
    subject: Subject,
    point: Point,
    cell_id: str,
    *,
    statistics: Statistics | None = None,
    progress: Callable[[int], None] | None = None,
) -> Cell:
    """Runs one cell; `statistics` is for methods that learn from data."""
    started = time.perf_counter()
    scheme = point.scheme
    model = cast(Decoder, share(subject.model))
    sums = quantize_in_place(model, list(subject.layers), point, statistics)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    quantized = time.perf_counter()
    found = evaluate(
        model, subject.windows, reference=subject.reference, batch=subject.reference.batch, progress=progress
    )
    evaluated = time.perf_counter()
    assert found.divergence is not None
    error = summarize(*sums)
    weights = [layer.weight.get_value() for layer in subject.layers.values()]
    shapes = Counter(weight.shape for weight in weights)
    # Once a shape: the bytes are found by tracing, and tracing for each layer takes longer than rounding it.
    packed = sum(count * stored_bytes(scheme, shape) for shape, count in shapes.items())
    floats = sum(weight.nbytes for weight in weights)
    return Cell(
        id=cell_id,
        scheme=str(scheme),
        method=point.method,
        element=scheme.element.name,
        granularity=type(scheme.granularity).__name__.lower(),
        group_size=scheme.granularity.size if isinstance(scheme.granularity, Group) else None,
        bits_per_weight=8 * packed / sum(weight.size for weight in weights),
        quantized_bytes=packed,
        model_bytes=model_bytes(subject.model) - floats + packed,
        **error._asdict(),
        perplexity=found.perplexity.value,
        nll=found.perplexity.nll,
        stderr=found.perplexity.stderr,
        kl=found.divergence.kl.value,
        kl_stderr=found.divergence.kl.stderr,
        top1=found.divergence.top1.value,
        top1_stderr=found.divergence.top1.stderr,
        tokens_scored=subject.windows.tokens_scored,
        seconds_quantize=quantized - started,
        seconds_evaluate=evaluated - quantized,
    )


def reference_cell(subject: Subject, perplexity: Perplexity, cell_id: str, seconds: float) -> Cell:
    """The float model as a cell: no error, no divergence from itself."""
    weights = [layer.weight.get_value() for layer in subject.layers.values()]
    held = sum(weight.nbytes for weight in weights)
    return Cell(
        id=cell_id,
        scheme=FLOAT,
        method="none",
        element=str(weights[0].dtype),
        granularity="tensor",
        group_size=None,
        bits_per_weight=8 * held / sum(weight.size for weight in weights),
        quantized_bytes=held,
        model_bytes=model_bytes(subject.model),
        mse=0.0,
        mae=0.0,
        max_error=0.0,
        sqnr_db=float("inf"),
        cosine=1.0,
        perplexity=perplexity.value,
        nll=perplexity.nll,
        stderr=perplexity.stderr,
        kl=0.0,
        kl_stderr=0.0,
        top1=1.0,
        top1_stderr=0.0,
        tokens_scored=subject.windows.tokens_scored,
        seconds_quantize=0.0,
        seconds_evaluate=seconds,
    )
