"""What a sweep leaves behind, as values: one `Cell` a measured scheme and method, one `Sweep` for the folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measured cell of a sweep. Everything but `seconds_*` is a function of the cell's definition.

    Bits per weight count what the packed arrays hold (codes, scales, zero points, second-level scales) over the
    quantized matrices alone; `model_bytes` counts the whole model with its unquantized tensors as stored in memory.
    """

    id: str  # hash of what defines the cell; the file's name
    scheme: str  # canonical spec string, e.g. "int4:g128"; "float" is the reference
    method: str  # "rtn", "gptq", "awq+gptq", ...; "none" for the reference
    element: str  # "int4", "fp4_e2m1", "nf4", ...
    granularity: str  # "tensor", "channel", "group", "block"
    group_size: int | None  # elements that share one scale along the input axis; None where it is not a group
    bits_per_weight: float  # over the quantized matrices
    quantized_bytes: int  # bytes of the quantized matrices
    model_bytes: int  # bytes of the whole model
    mse: float  # weight error over all quantized matrices, pooled: mean of (W − Ŵ)²
    mae: float
    max_error: float
    sqnr_db: float  # 10·log10(ΣW² / Σ(W − Ŵ)²)
    cosine: float
    perplexity: float
    nll: float  # nats a token
    stderr: float  # of nll, over windows
    kl: float  # KL(reference ‖ quantized), nats a token
    kl_stderr: float
    top1: float  # share of positions whose arg-max token is the reference's
    top1_stderr: float
    tokens_scored: int
    seconds_quantize: float
    seconds_evaluate: float

    def as_json(self) -> dict[str, Any]:
        """Plain values, in the order of the fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Cell:
        """The inverse of `as_json`. Raises TypeError where a field is missing or unknown."""
        return cls(**record)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A folder of cells: what they share (`manifest`), the float reference, and the cells in grid order."""

    manifest: dict[str, Any]  # model, text, protocol, environment: see sweep/store.py
    reference: Cell
    cells: tuple[Cell, ...]
