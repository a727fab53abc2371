"""What schemes and methods may be expected to lose where nothing was measured on the model itself.

The figures are this project's own, of one small model: `experiments/recommendation_prior.py`, 2026-11-25, CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from jquant.core.scheme import scheme


@dataclass(frozen=True, kw_only=True)
class ExpectedLoss:
    """A loss and where it is from."""

    percent: float  # increase of perplexity over the float model's
    source: str


SOURCE = "measured on SmolLM2-135M (experiments/recommendation_prior.py)"
CAVEAT = (
    "Losses are of SmolLM2-135M on 4,096 tokens of Python's documentation, not of this model: larger models usually "
    "lose less at the same bits (GPTQ, 2210.17323, tables 3 and 4). Sweep your model and give --results."
)
FLOAT_PERPLEXITY = 14.602

# scheme, method, perplexity
MEASURED: tuple[tuple[str, str, float], ...] = (("int8:channel:fp16", "rtn", 14.693),)
PRIOR: dict[tuple[str, str], ExpectedLoss] = {
    (str(scheme(spec)), method): ExpectedLoss(percent=100 * (perplexity / FLOAT_PERPLEXITY - 1), source=SOURCE)
    for spec, method, perplexity in MEASURED
}
