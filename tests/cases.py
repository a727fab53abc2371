"""The tables that every law runs over. A new format or scheme is one row here."""

from __future__ import annotations

from jquant.core.formats import ELEMENTS
from jquant.core.scheme import PRESETS

CODEBOOKS = (
    "codebook(-1.0/0.25):g32",
    "codebook(-1.0/0.0/0.5):g16",
    f"codebook({'/'.join(str((i - 19) / 20) for i in range(40))}):g32",
    f"codebook({'/'.join(str((i - 127) / 128) for i in range(256))}):channel",
)

# Block types of ggml, one for each way of encoding: of the others core/test_ggml.py sees every byte. They have no codes
# and scales of their own; laws about these are not about them.
BLOCK_SCHEMES = ("q4_0", "q5_1", "q8_0", "q3_k", "q4_k", "iq4_nl", "ggml_nvfp4")

# Every element alone; then every granularity, scale format and convention on elements where it matters.
SCHEMES = (
    *(f"{name}:g32" for name in ELEMENTS),
    *(name for name in PRESETS),
    *(f"{name}:{mode}" for name in ("mxfp4", "mxfp6_e3m2", "mxint8") for mode in ("even", "ceil", "rceil")),
    *(f"int{bits}:g32:asym" for bits in range(2, 9)),
    *(f"int{bits}:channel:restricted" for bits in range(2, 9)),
    *(f"int4:{where}" for where in ("tensor", "channel", "token", "g16", "g50", "b8x32", "b10x30")),
    *(f"int4:{where}:asym" for where in ("tensor", "channel", "g50", "b10x30")),
    *(f"int4:g32:{scale}" for scale in ("fp32", "bf16", "fp16", "e4m3", "nested", "dq", "e8m0")),
    *(f"int8:b8x32:asym:{scale}" for scale in ("bf16", "fp16")),
    "fp8_e4m3:b8x32",
    "fp8_e5m2:tensor:bf16",
    "nf4:g64:dq",
    "nf4:g50",
    "int4:tensor:e4m3",
    "fp6_e2m3:g16:nested",
    *CODEBOOKS,
    *BLOCK_SCHEMES,
)
