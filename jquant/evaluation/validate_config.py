"""What a validation runs. No jax here: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jquant.core.errors import InputError
from jquant.core.options import Names
from jquant.evaluation.benchmark_options import BenchmarkOptions


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Judges a quantized model by its reference: perplexity, KL, benchmarks, noise. Exit code 1 when it fails."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """The quantized model: a folder of `jquant quantize` or `jquant qat`, or any other MODEL."""
    reference: str | None = None
    """The MODEL to judge it by: the float one that it was made from."""
    scheme: str | None = None
    """Round the linear layers of MODEL's blocks to this scheme first, as int4:g64."""
    text: str | None = "pydoc"
    """A file, a folder or the name of a text for perplexity and KL; None for benchmarks alone."""
    window: int = 512
    """Tokens in a window."""
    windows: int | None = 16
    """How many windows; None for the whole text."""
    batch: int | None = None
    """Windows a forward pass; by default 1 on CPU, 8 elsewhere."""
    benchmark: Annotated[BenchmarkOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=BenchmarkOptions)
    """Run on both models."""
    results: Names = ()
    """Files of `jquant eval --json` on MODEL, to be read in the place of running anything."""
    reference_results: Names = ()
    """The same of the reference."""
    require: Names = ("mmlu", "hellaswag", "gsm8k", "humaneval", "ifeval")
    """Benchmarks without which nothing passes; by default the guide's. An empty text requires none."""
    threshold: Names = ()
    """Shares of the score that may be lost, as mmlu=0.03,arc_easy=0.05, beside the guide's; 0.05 for others."""
    max_perplexity_increase: float = 0.05
    """The share by which perplexity may rise."""
    max_kl: float | None = None
    """Nats a token that the model may diverge in the mean; by default it is reported and not judged."""
    certain: bool = False
    """Pass only what is surely within its threshold: the whole 95 % interval, not the measured value alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the unquantized weights and of computation."""
    out: Path | None = None
    """Folder for validation.json, validation.md and validation.html."""

    def __post_init__(self) -> None:
        if bool(self.results) != bool(self.reference_results):
            raise InputError("results are compared in pairs: give both --results and --reference-results")
        if self.results and self.benchmark.tasks:
            raise InputError("give either --tasks to run, or --results that were run before")
        if not self.results and self.reference is None:
            raise InputError("nothing to judge by: give --reference MODEL, or result files of both models")
        self.thresholds()

    def thresholds(self) -> dict[str, float]:
        """Those given, by benchmark. Raises InputError where one is no NAME=SHARE."""
        found = {}
        for word in self.threshold:
            name, equals, value = word.partition("=")
            try:
                found[name] = float(value)
            except ValueError:
                equals = ""
            if not equals or not name:
                raise InputError(f"threshold {word!r}: write NAME=SHARE, as mmlu=0.03")
        return found
