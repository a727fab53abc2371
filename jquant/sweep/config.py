"""What a sweep runs. No jax here: the command line reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.core.errors import InputError
from jquant.core.options import Names, Sizes


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Measures a grid of quantization schemes and methods on one model: weight error, size, perplexity, KL, top-1."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """`demo`, the path of a GGUF file or a Hugging Face folder, or a hub id."""
    schemes: Names
    """Spec strings: int4:g64,nf4:g64,mxfp4,…"""
    out: Path
    """Folder of results; a folder of the same sweep is completed, not overwritten."""
    groups: Sizes = ()
    """Group sizes to combine with every scheme; without them schemes stand as written."""
    methods: Names = ("rtn",)
    """How codes are chosen: rtn, rtn-mse, gptq, hqq, and after AWQ's scaling awq, awq+gptq; each for every scheme.
    With an @ layers quantize their inputs too: rtn@int8:token, smoothquant@int8:token."""
    calibration: str = "pydoc:calibration"
    """Text that gptq, awq and smoothquant learn from, a source as for --text; of datasets the train split.
    It must not share passages with the text.
    Statistics are of the float model, once for all cells; in jquant quantize a layer sees those before it quantized."""
    calibration_windows: int = 32
    """How many windows of it, as long as those of the text."""
    text: str = "pydoc"
    """A file, a folder or the name of a text; `pydoc` comes with Python."""
    window: int = 512
    """Tokens in a window."""
    windows: int | None = 8
    """How many windows; None for the whole text."""
    stride: int | None = None
    """Tokens from one window to the next; by default the window: no overlap."""
    batch: int | None = None
    """Windows a forward pass; by default 1 on CPU, 8 elsewhere."""
    layers: Names = (r"^blocks\.",)
    """Regular expressions: which linear layers are quantized."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the unquantized weights and of computation."""
    report: bool = True
    """Write plots and the HTML report (needs jquant[report]); tables are always written."""
    executor: Literal["local", "ray"] = "local"
    """Where cells are computed: in this process, or by workers on a Ray cluster (needs jquant[ray])."""
    ray_address: str | None = None
    """Of the cluster: HOST:PORT, ray://HOST:PORT, or auto for one that runs on this machine; by default RAY_ADDRESS,
    else one is started on this machine for this sweep."""
    cpus_per_cell: int | None = None
    """Cores that Ray sets aside for a worker, and threads that it uses; by default 1."""
    gpus_per_cell: float | None = None
    """GPUs that Ray sets aside for a worker: 1, a share of one, or 0 for CPUs; to be said where the cluster has any."""
    memory_per_cell: float | None = None
    """GB of main memory that Ray sets aside for a worker; by default twice the model's and one; 0 for none."""

    def __post_init__(self) -> None:
        if not self.schemes:
            raise InputError("schemes: none given; name at least one, as in --schemes int4:g64,nf4:g64")
        if not self.methods:
            raise InputError("methods: none given; name at least one, as in --methods rtn,gptq")
        if self.calibration_windows < 1:
            raise InputError(f"calibration-windows {self.calibration_windows}: it must be at least 1")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch {self.batch}: it must be at least 1 window")
        for size in self.groups:
            if size < 1:
                raise InputError(f"groups: {size} is no group size; each must be at least 1")
        self._check_executor()

    def _check_executor(self) -> None:
        for name in ("ray_address", "cpus_per_cell", "gpus_per_cell", "memory_per_cell"):
            if self.executor != "ray" and getattr(self, name) is not None:
                raise InputError(f"{name.replace('_', '-')}: is for workers on Ray: add --executor ray or leave it out")
        if self.cpus_per_cell is not None and self.cpus_per_cell < 1:
            raise InputError(f"cpus-per-cell {self.cpus_per_cell}: it must be at least 1")
        if self.gpus_per_cell is not None and not 0 <= self.gpus_per_cell <= 1:
            raise InputError(
                f"gpus-per-cell {self.gpus_per_cell:g}: a cell runs on one device: give 1, a share of one, or 0 for CPU"
            )
        if self.memory_per_cell is not None and not 0 <= self.memory_per_cell < math.inf:
            raise InputError(f"memory-per-cell {self.memory_per_cell:g}: it must be a number of GB, or 0")
