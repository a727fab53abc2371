"""What a diagnosis runs. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.core.errors import InputError
from jquant.core.options import Names


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Finds which layers lose, outliers, faults, and the best use of a budget of bits.

    A float MODEL is rounded one layer at a time. A quantized one is compared with --reference, layer by layer.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A float model to quantize, or a quantized one that disappoints."""
    reference: str | None = None
    """Of a quantized MODEL: the float one that it was made from."""
    scheme: str = "int4:g64:fp16"
    """The scheme whose loss is measured layer by layer."""
    bits: float | None = None
    """A budget of bits a weight, scales included: finds the best scheme for each layer."""
    schemes: Names = ("int3:g64:fp16", "int4:g64:fp16", "int5:g64:fp16", "int6:g64:fp16")
    """Schemes that layers may take within the budget."""
    method: str = "rtn"
    """How the recipe of the budget chooses codes: rtn, gptq, … Sensitivities are of rounding."""
    recipe_out: Path | None = None
    """File for that recipe, for `jquant quantize --recipe`."""
    text: str = "pydoc:calibration"
    """Text to measure on; judge the result on another."""
    window: int = 128
    """Tokens in a window."""
    windows: int = 3
    """How many windows; every layer and scheme runs on all of them."""
    out: Path | None = None
    """Folder for diagnosis.json and diagnosis.html."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the unquantized weights and of computation."""

    def __post_init__(self) -> None:
        if self.bits is not None and self.reference is not None:
            raise InputError("a budget is for a float model: name that one as MODEL, without --reference")
        if self.recipe_out is not None and self.bits is None:
            raise InputError("--recipe-out needs a budget: give --bits, as --bits 4.25")
        if self.windows < 1:
            raise InputError(f"windows {self.windows}: it must be at least 1")
