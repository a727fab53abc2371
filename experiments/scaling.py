"""How time and memory of quantize, evaluation, sweep and QAT grow with layers, width, tokens and cells.

Command:   python -m experiments.scaling --out DIR     (goes on where an earlier call was stopped; needs jquant[report]
           and jquant[qat]; Linux). Writes scaling.json and scaling.png, as experiments/scaling.png
Cost:      43 measurements, each a process of its own: 23 minutes on two cores that others kept busy (load 10), a good
           part of it compiling; 2 GB of memory
Model:     Llamas with random weights over bytes, 4 blocks of width 512 unless that is what changes; 1,024 tokens in
           windows of 256, sweeps of 2 cells. quantize: GPTQ to int4:g64, streamed from disk to disk; evaluation:
           perplexity; sweep: round to nearest, with the reference; QAT: a step of AdamW on all weights, int4:g64
Theory:    operations and bytes of experiments/scaling_theory.py, at the same points: its exponents are not whole where
           parts of other growth are added. Memory is compared as MB measured for each MB of theory, ideally 1
Expected:  exponents of layers and tokens as in theory. Those of width lie below it while matrices are small, where what
           grows with blocks and not with width counts too: from 512 to 768 evaluation grows with 1.8 (2.0), sweep with
           1.5, QAT with 1.9, quantize with 2.1 (2.2). GPTQ hardly grows with tokens: its columns and the search of
           their ranges, which theory leaves out, do not depend on them
Measured:  2026-11-26, CPU (2 cores of an AMD EPYC, busy otherwise: processor time, all threads together; jax 0.10.2)

                          time ~ size^  theory   MB a MB of theory   first and last point
    quantize, layers              0.97    1.00                1.69   1.18 … 8.87 s, 325 … 480 MB
    quantize, width               1.33    2.07                1.33   0.91 … 10.14 s, 223 … 591 MB
    quantize, tokens              0.25    0.87                5.26   3.99 … 6.71 s, 354 … 434 MB
    evaluation, layers            0.92    0.98                0.86   0.12 … 0.80 s, 136 … 207 MB
    evaluation, width             1.43    1.92                1.00   0.06 … 0.84 s, 117 … 251 MB
    evaluation, tokens            1.00    1.00            constant   0.21 … 1.65 s, 142 … 146 MB
    sweep, layers                 0.82    0.98                0.95   0.68 … 3.63 s, 202 … 372 MB
    sweep, width                  1.19    1.91                0.95   0.44 … 3.57 s, 186 … 435 MB
    sweep, tokens                 0.72    0.99                1.35   1.25 … 5.67 s, 254 … 264 MB
    sweep, cells                  0.70    0.73            constant   1.32 … 5.51 s, 247 … 374 MB
    QAT, layers                   1.00    0.98                1.17   0.38 … 3.07 s, 325 … 1,527 MB
    QAT, width                    1.68    1.92                1.01   0.16 … 3.20 s, 329 … 1,452 MB
    QAT, tokens                   1.05    0.98                1.68   0.74 … 6.70 s, 717 … 1,876 MB

           A core reached 92e9 operations and 17 GB a second; at width 768 quantize took 3.9 times its roofline,
           evaluation 1.2, sweep 1.7, QAT 1.5. A sweep's memory grows with cells where theory has none: presumably by
           the programs that each scheme compiles
On paper:  the roofline of a device times those factors, in bfloat16, on as few devices (a power of two) as hold it, and
           47 µs for each of GPTQ's columns (of an H100, taken for the others too). 128 × 2,048 calibration tokens,
           290,000 tokens of evaluation, a sweep of 24 cells over 8,192, QAT on 100 million tokens, 16,384 a pass. No
           links, no disks, and factors of a CPU, which comes nearer its peak than a GPU: an order of magnitude, and
           rather too little

                            quantize             evaluation              sweep                    QAT
    70B   h100-sxm   14.1 min on 1 (21 GB)  0.4 min on 2 (142 GB)   0.2 min on 4 (283 GB)    17.9 min on 64 (3,001 GB)
    70B   b200        9.6 min on 1          0.4 min on 1            0.2 min on 2             15.7 min on 32
    70B   mi300x     11.3 min on 1          0.6 min on 1            0.3 min on 2             26.8 min on 32
    405B  h100-sxm    1.3 h on 1 (60 GB)    0.3 min on 16 (813 GB)  0.2 min on 32 (1,625 GB) 25.8 min on 256 (14,535 GB)
    405B  b200       49.4 min on 1          0.3 min on 8            0.1 min on 16            22.7 min on 128
    405B  mi300x     55.0 min on 1          0.4 min on 8            0.2 min on 16            38.5 min on 128
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
# Tokens of the paper estimate: GPTQ's calibration of 128 × 2,048, WikiText-2, a sweep of 24 cells over as many as the
# demo's, and QAT on 100 million, 16,384 a forward pass.
PAPER = {"quantize": 262_144, "evaluation": 290_000, "sweep": 8_192, "QAT": 100_000_000}
PAPER_STEP = 16_384
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
    lines = [f"{'on paper':14}{'device':10}" + "".join(f"{stage:>27}" for stage in STAGES)]
    for name in MODELS:
        for device in DEVICES:
            cells = [row for row in rows if (row["model"], row["device"]) == (name, device)]
            shown = [f"{_hours(row['hours'])} on {row['devices']} ({row['gigabytes']:,.0f} GB)" for row in cells]
            lines.append(f"{name:14}{device:10}" + "".join(f"{each:>27}" for each in shown))
    return lines


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.0f} d"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


if __name__ == "__main__":
    sys.exit(main())
