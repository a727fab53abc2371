"""What a quantization run does. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.core.errors import InputError
from jquant.core.options import Names
from jquant.io.process_options import ProcessOptions

WINDOWS, WINDOW = 32, 512  # of calibration text, and tokens in each, where nothing is asked for


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantizes a model by a recipe and saves it packed; eval and generate load the folder."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """`demo`, the path of a GGUF file or a Hugging Face folder, or a hub id."""
    out: Path
    """A new folder; it appears whole or not at all. The same command goes on where an earlier one was stopped."""
    recipe: str | None = None
    """A preset (gptq-int4-g128, awq-int4-g128, smoothquant-w8a8, fp8, nf4, q4_k_m, …) or a YAML file of rules."""
    scheme: str | None = None
    """In the place of a recipe: one scheme for all `layers`, as int4:g64:asym."""
    method: str = "rtn"
    """With `scheme`: rtn, rtn-mse, gptq or hqq; transforms before it, as awq+gptq.
    After an @ comes the scheme of the layers' inputs, as smoothquant@int8:token."""
    layers: Names = (r"^blocks\.",)
    """With `scheme`: regular expressions of the layers to quantize."""
    calibration: str = "pydoc:calibration"
    """What methods learn from: a file, a folder, pydoc, wikitext, c4, pile, openplatypus, or recommended (the guide's).
    Datasets give their train split, unless as wikitext:validation."""
    calibration_windows: int | None = None
    """How many windows of it, from its start; by default 32, or what is recommended where that is asked for."""
    window: int | None = None
    """Tokens in a window; by default 512, or what is recommended."""
    batch: int | None = None
    """Windows a forward pass, which divide the windows; by default 1 on CPU, up to 8 elsewhere."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations, and of the tensors that stay unquantized."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Of calibration: bfloat16 rounds their factors, which is faster on CPUs that have instructions for it."""
    spill: bool = False
    """Keep activations on disk: for models whose activations do not fit in memory."""
    mesh: str = ""
    """Devices by axis, as `data=2,tensor=4`: windows over data, rows of weights over fsdp and tensor."""
    hosts: Annotated[ProcessOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ProcessOptions)
    """Several processes."""
    coverage: bool = False
    """Print what was done to every layer; the folder's coverage.json always says so."""
    verbose: bool = False
    """Print each layer's loss and time as its block is done; else those of the last block stand under the bar."""

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.scheme is None):
            raise InputError("give either --recipe NAME|FILE, or --scheme SPEC (with --method)")
        if self.calibration_windows is not None and self.calibration_windows < 1:
            raise InputError(f"calibration-windows {self.calibration_windows}: at least 1")
