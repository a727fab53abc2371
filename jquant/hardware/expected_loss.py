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
    "lose less at the same bits (GPTQ, 2210.17323, tables 3 and 4). A difference of 1 % is noise: the two kinds of "
    "fp8, whose grids are all but the same, differ by that. Sweep your model and give --results."
)
FLOAT_PERPLEXITY = 14.602

# scheme, method, perplexity
MEASURED: tuple[tuple[str, str, float], ...] = (
    ("int8:channel:fp16", "rtn", 14.693),
    ("int8:channel", "rtn@int8:token", 15.162),
    ("int8:channel", "smoothquant@int8:token", 14.719),
    ("fp8_e4m3:channel:fp16", "rtn", 14.806),
    ("fp8_e4m3:channel", "rtn@fp8_e4m3:token", 15.033),
    ("fp8_e4m3fnuz:channel", "rtn@fp8_e4m3fnuz:token", 14.843),
    ("mxfp8_e4m3", "rtn", 15.128),
    ("q8_0", "rtn", 14.629),
    ("q5_0", "rtn", 16.088),
    ("int4:g128:fp16", "gptq", 15.428),
    ("int4:g128:asym:fp16", "gptq", 15.172),
    ("int4:g128:asym:fp16", "awq", 17.217),
    ("int4:g64:asym:fp16", "gptq", 15.183),
    ("int4:g64:asym:fp16", "hqq", 20.643),
    ("nf4:g64:dq", "rtn", 19.129),
    ("nvfp4", "gptq", 15.026),
    ("mxfp4", "gptq", 16.364),
    ("q4_0", "rtn", 18.073),
    ("iq4_nl", "rtn", 17.498),
    ("int3:g64:asym:fp16", "gptq", 17.450),
    ("int2:g64:asym:fp16", "gptq", 44.185),
)
PRIOR: dict[tuple[str, str], ExpectedLoss] = {
    (str(scheme(spec)), method): ExpectedLoss(percent=100 * (perplexity / FLOAT_PERPLEXITY - 1), source=SOURCE)
    for spec, method, perplexity in MEASURED
}
