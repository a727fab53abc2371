"""The coverage report: of every linear layer what was done to it, and what that cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jquant.nn.surgery import Path


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized layer. Errors are squared and relative: ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration data X.

    Without data they are of the weight alone. W is the weight as transforms left it.
    """

    path: Path
    method: str
    scheme: str
    activation: str | None
    transforms: tuple[str, ...]
    shape: tuple[int, ...]
    bits_per_weight: float
    on_data: bool  # errors are of the output, not of the weight
    rounding_error: float  # of rounding to nearest
    error: float  # of the method
    damping: float  # λ that GPTQ's factor took, relative to the mean diagonal; 0 where there is none
    fallback: bool  # the method could not work on this layer and rounded to nearest
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> LayerReport:
        """The inverse of `as_json`."""
        values = {**record, "transforms": tuple(record["transforms"]), "shape": tuple(record["shape"])}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TransformReport:
    """One place of one block that a transform rescaled. Losses are relative to scales of 1."""

    path: Path  # of the producer
    transform: str
    consumers: tuple[Path, ...]
    choice: float  # AWQ's exponent r or SmoothQuant's α; NaN where nothing was better than scales of 1
    before: float
    after: float

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TransformReport:
        """The inverse of `as_json`, and of strict JSON, which has null for NaN."""
        numbers = {
            name: float("nan") if record[name] is None else record[name] for name in ("choice", "before", "after")
        }
        return cls(**{**record, **numbers, "consumers": tuple(record["consumers"])})


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Every linear layer of the model: what was quantized, and what was left alone."""

    layers: tuple[LayerReport, ...]
    transforms: tuple[TransformReport, ...]
    left_alone: tuple[Path, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "layers": [layer.as_json() for layer in self.layers],
            "transforms": [each.as_json() for each in self.transforms],
            "left_alone": list(self.left_alone),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Coverage:
        """The inverse of `as_json`."""
        return cls(
            layers=tuple(map(LayerReport.from_json, record["layers"])),
            transforms=tuple(map(TransformReport.from_json, record["transforms"])),
            left_alone=tuple(record["left_alone"]),
            seconds=record["seconds"],
        )

    @property
    def fallbacks(self) -> tuple[Path, ...]:
        """Layers that a method could not work on; they are rounded to nearest."""
        return tuple(layer.path for layer in self.layers if layer.fallback)

    def summary(self) -> str:
        """One line for people."""
        done = ", ".join(f"{count} by {what}" for what, count in Counter(map(_done, self.layers)).items())
        text = f"{len(self.layers)} layers: {done}; {len(self.left_alone)} left alone"
        if self.fallbacks:
            text += f"; {len(self.fallbacks)} FELL BACK to rounding: {', '.join(self.fallbacks[:5])}"
        return text


def layer_lines(layers: Sequence[LayerReport]) -> list[str]:
    """For each layer its path, relative error, and seconds: of layers that were solved together, each an equal part."""
    longest = max((len(layer.path) for layer in layers), default=0)
    return [
        f"{layer.path:<{longest}}  loss {layer.error:.2e}  {layer.seconds:.2f} s"
        + ("  FELL BACK to rounding" if layer.fallback else "")
        for layer in layers
    ]


def render(coverage: Coverage) -> Any:
    """What rich prints: a table for each method and scheme, one row a layer. Narrow terminals fold paths first; no
    figure is cut."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    alike: dict[str, list[LayerReport]] = {}
    for layer in coverage.layers:
        alike.setdefault(_kind(layer), []).append(layer)
    longest = max((len(layer.path) for layer in coverage.layers), default=0)
    parts: list[Any] = []
    for kind, layers in alike.items():
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("layer".ljust(longest), overflow="fold")
        for name in ("bits", "error rtn", "error", "of rtn", "damping", "seconds"):
            table.add_column(name, justify="right", overflow="fold")
        for layer in layers:
            share = layer.error / layer.rounding_error if layer.rounding_error > 0 else 1.0
            table.add_row(
                Text(layer.path),
                f"{layer.bits_per_weight:.2f}",
                f"{layer.rounding_error:.2e}",
                f"{layer.error:.2e}",
                f"{share:.2f}",
                f"{layer.damping:g}" if layer.damping else "",
                f"{layer.seconds:.2f}",
            )
        parts += ["", Text(f"{len(layers)} by {kind}", style="bold"), table]
    return Group(*parts[1:])


def _done(layer: LayerReport) -> str:
    method = "+".join((*layer.transforms, layer.method))
    return f"{method} to {layer.scheme}" + ("" if layer.activation is None else f" with inputs in {layer.activation}")


def _kind(layer: LayerReport) -> str:
    fallback = "; FELL BACK to rounding" if layer.fallback else ""
    return f"{_done(layer)}; errors of the {'outputs' if layer.on_data else 'weights'}{fallback}"
