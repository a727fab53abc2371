"""What a diagnosis found, and what follows: the record that reports are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jquant.evaluation.allocate import Allocation, Move
from jquant.evaluation.faults import Finding
from jquant.evaluation.outliers import LayerOutliers
from jquant.evaluation.sensitivity import LayerSensitivity


class Variant(NamedTuple):
    """A change for all layers at once, measured on the whole model."""

    scheme: str
    bits_per_weight: float
    kl: float
    per_bit: float  # KL that it gains over the base for a bit a weight; inf where it gains and costs none


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything measured; `base` is the scheme that `layers` are of, empty where they are a quantized model's own."""

    base: str
    layers: tuple[LayerSensitivity, ...]
    outliers: tuple[LayerOutliers, ...]
    findings: tuple[Finding, ...]
    variants: tuple[Variant, ...]  # the base first
    moves: tuple[Move, ...]
    allocation: Allocation | None
    measured_allocation: float  # KL of the allocation in the whole model, on the same text; NaN without one
    facts: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "base": self.base,
            "layers": [dataclasses.asdict(each) for each in self.layers],
            "outliers": [dataclasses.asdict(each) for each in self.outliers],
            "findings": [dataclasses.asdict(each) for each in self.findings],
            "variants": [each._asdict() for each in self.variants],
            "moves": [each._asdict() for each in self.moves],
            "allocation": None
            if self.allocation is None
            else {
                "bits_per_weight": self.allocation.bits_per_weight,
                "predicted": self.allocation.predicted,
                "measured": self.measured_allocation,
                "schemes": self.allocation.schemes,
            },
            **self.facts,
        }


def ranked(diagnosis: Diagnosis, count: int = 10) -> list[LayerSensitivity]:
    """The layers that lose most."""
    return sorted(diagnosis.layers, key=lambda each: -each.kl)[:count]
