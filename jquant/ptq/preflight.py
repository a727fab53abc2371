"""What a run will take, worked out before it starts.

operations   2 · weights · tokens of forward passes, 2 · in² · tokens a distinct input of Gram matrices, and the
             columns of GPTQ: about 2 · out · in² a layer, and 2/3 · in³ + in³ a factor
memory       two blocks, the embedding and the output projection, which may stand beside them; the states of all
             calibration tokens at the block's entrance and at its layers; and the Gram matrix of the widest layer, in
             whose place its factor is made, with what making it takes
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jquant.core.errors import InputError
from jquant.kernels.dispatch import on_cpu
from jquant.nn.mesh import AXES, DATA, axis_size
from jquant.nn.placement import CUTTING
from jquant.nn.surgery import Path
from jquant.ptq.block import rule_needs_data
from jquant.ptq.methods import SOLVERS
from jquant.ptq.recipe import Rule

_SHARE = 0.9  # of the free memory that a run may plan with


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Before the run; seconds rest on a product measured now, and leave out what compiling takes, once a run."""

    operations: float
    seconds: float
    weight_bytes: int
    activation_bytes: int  # go to disk where the store is there
    statistic_bytes: int
    available_bytes: int | None  # None where the platform does not say

    def needed(self, *, on_disk: bool) -> int:
        """Bytes of memory at the peak."""
        return self.weight_bytes + self.statistic_bytes + (0 if on_disk else self.activation_bytes)

    def check(self, *, on_disk: bool) -> None:
        """Raises InputError where the run cannot fit."""
        needed = self.needed(on_disk=on_disk)
        if self.available_bytes is not None and needed > _SHARE * self.available_bytes:
            advice = "quantize fewer windows" if on_disk else "keep activations on disk (--spill), or use fewer windows"
            raise InputError(
                f"the run needs {needed / 1e9:.1f} GB ({self.weight_bytes / 1e9:.1f} of weights, "
                f"{self.activation_bytes / 1e9:.1f} of activations, {self.statistic_bytes / 1e9:.1f} of statistics), "
                f"{self.available_bytes / 1e9:.1f} GB are free: {advice}"
            )

    def __str__(self) -> str:
        return (
            f"{self.operations / 1e12:.1f} TFLOP, about {_duration(self.seconds)} beyond compiling; "
            f"memory {self.needed(on_disk=False) / 1e9:.1f} GB, {self.activation_bytes / 1e9:.1f} of them activations"
        )


def estimate(
    rules: Mapping[Path, Rule],
    shapes: Mapping[Path, tuple[int, ...]],
    *,
    tokens: int,
    itemsize: int = 4,
    mesh: Mesh | None = None,
) -> Estimate:
    """Of quantizing layers of these shapes by these rules, with so many calibration tokens.

    On a mesh memory is that of one device, and devices share the work.
    """
    needs_data = any(map(rule_needs_data, rules.values()))
    blocks: dict[str, list[Path]] = {}
    for path in shapes:
        if path.startswith("blocks."):
            blocks.setdefault(path.split(".")[1], []).append(path)
    operations = 0.0
    for path, rule in rules.items():
        *stack, rows, columns = shapes[path]
        copies = math.prod(stack)
        operations += 2 * copies * rows * columns**2  # errors in the report
        if SOLVERS[rule.method.name].needs_gram:
            operations += copies * (2 * rows * columns**2 + 5 / 3 * columns**3)
    widest = max((shapes[path] for path in rules), key=lambda shape: shape[-1])
    largest = max((sum(math.prod(shapes[path]) for path in paths) for paths in blocks.values()), default=0)
    outer = sum(math.prod(shape) for path, shape in shapes.items() if not path.startswith("blocks."))
    activations = 0
    if needs_data:
        inner = [shapes[path] for path in next(iter(blocks.values()), [])]
        inputs = {shape[-1] for shape in inner}
        operations += len(blocks) * tokens * (2 * sum(math.prod(s) for s in inner) + sum(2 * n * n for n in inputs))
        activations = tokens * itemsize * (2 * min(inputs, default=0) + sum(sorted(inputs)))
    seconds = operations / _rate()
    return Estimate(
        operations=operations,
        seconds=seconds / axis_size(mesh, *AXES),
        weight_bytes=(2 * largest + outer) * itemsize // axis_size(mesh, *CUTTING),
        activation_bytes=activations // axis_size(mesh, DATA),
        statistic_bytes=int(4 * (1.5 if on_cpu() else 4) * math.prod(widest[:-2]) * widest[-1] ** 2)
        + 6 * 4 * math.prod(widest) // axis_size(mesh, *CUTTING),
        available_bytes=_available(1 if mesh is None else len(mesh.local_devices)),
    )


def _rate() -> float:
    """Operations a second of one float32 product, measured."""
    x = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    started = time.perf_counter()
    product(x).block_until_ready()
    return 2 * 1024**3 / (time.perf_counter() - started)


def _available(devices: int) -> int | None:
    """Free bytes of a device that the arrays will lie on; on CPU so many share what is free."""
    if not on_cpu():
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    try:
        for line in FilePath("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // devices
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // devices
    except (OSError, ValueError, AttributeError):
        return None


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
