"""How time and memory of quantize, evaluation, sweep and QAT grow with layers, width, tokens and cells.

Command:   python -m experiments.scaling --out DIR     (goes on where an earlier call was stopped; needs jquant[report])
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scaling_measure import config
from experiments.scaling_plot import write_plot
from experiments.scaling_theory import STAGES, Load, estimate, held_bytes, least_seconds
from jquant.core.errors import InputError
from jquant.hardware.devices import find_device
from jquant.io.atomic import replacing
from jquant.io.json_file import as_text, read_json_if_there
from jquant.models.published import find_published
from jquant.models.shape import model_shape

AXES: dict[str, tuple[int, ...]] = {
    "layers": (1, 2, 4, 8),
    "width": (128, 256, 512, 768),
    "tokens": (512, 1024, 2048, 4096),
    "cells": (1, 2, 4, 8),
}
MODELS, DEVICES = ("llama-3-70b", "llama-3-405b"), ("h100-sxm", "b200", "mi300x")
# What the paper estimate runs: GPTQ's calibration of 128 × 2,048 tokens, WikiText-2, a sweep of 24 cells over 8,192
# tokens (the demo's), and QAT on 100 million tokens.
PAPER = {"quantize": 262_144, "evaluation": 290_000, "sweep": 8_192, "QAT": 100_000_000}
PAPER_STEP = 1_048_576  # tokens of a training step
PAPER_WINDOW, PAPER_CELLS = 2_048, 24


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one measurement; the defaults are those that the other axes are measured at."""

    layers: int = 4
    width: int = 512
    tokens: int = 1024
    cells: int = 2

    def shape(self) -> Any:
        return model_shape(config(self.layers, self.width), name="scaled", source="made here")

    def load(self) -> Load:
        return Load(tokens=self.tokens, cells=self.cells)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One stage along one axis: what was measured, and what theory has at the same points."""

    stage: str
    axis: str
    points: tuple[int, ...]
    seconds: tuple[float, ...]
    least: tuple[float, ...]  # seconds by the roofline of this machine
    megabytes: tuple[float, ...]
    held: tuple[float, ...]  # megabytes by theory

    def exponents(self) -> tuple[float, float]:
        """Of time: of the straight line through logarithms, as measured and as theory has it at the same points."""
        return _exponent(self.points, self.seconds), _exponent(self.points, self.least)

    def memory_slope(self) -> float | None:
        """Of measured memory over theory's, 1 where they grow alike; None where theory has it constant."""
        if max(self.held) < 1.01 * min(self.held):
            return None
        return float(np.polyfit(self.held, self.megabytes, 1)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is missing, writes scaling.json and scaling.png, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of figures and the plot")
    out = parser.parse_args(arguments).out
    measured = _Measured(out)
    device = measured.device()
    found = [series(stage, axis, measured, device) for stage in STAGES for axis in AXES if axis_of(stage, axis)]
    factors = {stage: factor(stage, found) for stage in STAGES}
    paper = estimates(factors)
    record = {
        "device": device,
        "series": [
            dataclasses.asdict(each) | {"exponents": each.exponents(), "memory_slope": each.memory_slope()}
            for each in found
        ],
        "factors": factors,
        "estimates": paper,
    }
    with replacing(out / "scaling.json") as file:
        file.write(as_text(record).encode())
    write_plot(found, out / "scaling.png")
    print("\n".join([*_slope_table(found), "", *_factor_lines(factors, device), "", *_paper_table(paper)]))
    return 0


def axis_of(stage: str, axis: str) -> bool:
    """Whether the stage has it: cells are a sweep's alone."""
    return axis != "cells" or stage == "sweep"


def series(stage: str, axis: str, measured: _Measured, device: dict[str, float]) -> Series:
    """Measures, or reads, a stage along an axis."""
    sizes = [dataclasses.replace(Sizes(), **{axis: value}) for value in AXES[axis]]
    found = [measured(stage, each) for each in sizes]
    return Series(
        stage=stage,
        axis=axis,
        points=AXES[axis],
        seconds=tuple(each["seconds"] for each in found),
        least=tuple(
            least_seconds(
                stage,
                each.shape(),
                each.load(),
                rate=device["rate"],
                exact_rate=device["rate"],
                bandwidth=device["bandwidth"],
                float_bytes=4,
            )
            for each in sizes
        ),
        megabytes=tuple(each["bytes"] / 1e6 for each in found),
        held=tuple(held_bytes(stage, each.shape(), each.load()) / 1e6 for each in sizes),
    )


def factor(stage: str, found: Sequence[Series]) -> float:
    """By how much the stage exceeds the roofline at the largest width, where little is spent on anything else."""
    widest = next(each for each in found if (each.stage, each.axis) == (stage, "width"))
    return widest.seconds[-1] / widest.least[-1]


def estimates(factors: dict[str, float]) -> list[dict[str, Any]]:
    """Of each model on each device, stage by stage."""
    rows = []
    for name in MODELS:
        published = find_published(name)
        assert published is not None
        shape = model_shape(published.config, name=name, source=published.source)
        for device in DEVICES:
            for stage in STAGES:
                tokens = min(PAPER[stage], PAPER_STEP) if stage == "QAT" else PAPER[stage]
                load = Load(tokens=tokens, cells=PAPER_CELLS, window=PAPER_WINDOW)
                one = estimate(stage, shape, load, find_device(device), factor=factors[stage])
                repeats = PAPER[stage] / tokens
                rows.append(
                    {
                        "model": name,
                        "device": device,
                        **dataclasses.asdict(one),
                        "least_hours": one.least_hours * repeats,
                        "hours": one.hours * repeats,
                    }
                )
    return rows


class _Measured:
    """The folder's figures; what is missing is measured, each in a process of its own."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file = out / "measured.json"
        out.mkdir(parents=True, exist_ok=True)
        self._figures: dict[str, Any] = read_json_if_there(self._file) or {}

    def __call__(self, stage: str, sizes: Sizes) -> dict[str, float]:
        model = self._out / "models" / f"{sizes.layers}x{sizes.width}"
        asked = {"stage": stage, "model": str(model), **dataclasses.asdict(sizes)}
        key = " ".join([stage, *(f"{name} {value}" for name, value in dataclasses.asdict(sizes).items())])
        if key not in self._figures and not model.exists():
            _child({**asked, "stage": "model"}, self._out)
        return self._keep(key, asked)

    def device(self) -> dict[str, float]:
        """Operations and bytes a second of processor time."""
        return self._keep("device", {"stage": "device"})

    def _keep(self, key: str, asked: dict[str, Any]) -> dict[str, float]:
        if key not in self._figures:
            self._figures[key] = _child(asked, self._out)
            print(f"{key}: {self._figures[key]}", file=sys.stderr, flush=True)
            with replacing(self._file) as file:
                file.write(as_text(self._figures).encode())
        return self._figures[key]


def _child(asked: dict[str, Any], out: Path) -> dict[str, float]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str((out / "compiled").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # What is freed goes back to the system, so that the resident set is what is in use.
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        "MALLOC_TRIM_THRESHOLD_": "1000000",
    }
    command = [sys.executable, "-m", "experiments.scaling_measure", json.dumps(asked)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise InputError(f"measuring {asked} failed: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def _exponent(points: Sequence[float], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(points), np.log(values), 1)[0])


def _slope_table(found: Sequence[Series]) -> list[str]:
    lines = [f"{'':22}{'time ~ size^':>12}{'theory':>8}{'MB a MB of theory':>20}   first and last point"]
    for each in found:
        (time, theory), memory = each.exponents(), each.memory_slope()
        grown = "constant" if memory is None else f"{memory:.2f}"
        lines.append(
            f"{f'{each.stage}, {each.axis}':22}{time:12.2f}{theory:8.2f}{grown:>20}   "
            f"{each.seconds[0]:.2f} … {each.seconds[-1]:.2f} s, {each.megabytes[0]:,.0f} … {each.megabytes[-1]:,.0f} MB"
        )
    return lines


def _factor_lines(factors: dict[str, float], device: dict[str, float]) -> list[str]:
    shown = ", ".join(f"{stage} {value:.1f}" for stage, value in factors.items())
    return [
        f"a core: {device['rate'] / 1e9:.0f}e9 operations and {device['bandwidth'] / 1e9:.0f} GB a second",
        f"times its roofline at the largest width: {shown}",
    ]


def _paper_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{'on paper':14}{'device':10}" + "".join(f"{stage:>24}" for stage in STAGES)]
    for name in MODELS:
        for device in DEVICES:
            cells = [row for row in rows if (row["model"], row["device"]) == (name, device)]
            shown = "".join(
                f"{_hours(row['hours'])} on {row['devices']} ({row['gigabytes']:,.0f} GB)".rjust(24) for row in cells
            )
            lines.append(f"{name:14}{device:10}{shown}")
    return lines


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.0f} d"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


if __name__ == "__main__":
    sys.exit(main())
