"""How fast devices multiply bf16 matrices on paper, and what memory they have: what an estimate of training time needs.

Rates are dense (data sheets often print twice as much, for weights of which half are zeros), with float32 accumulation.
A figure of a row is from the source in that row; all were looked up in November 2026.
"""

from __future__ import annotations

from dataclasses import dataclass

from jquant.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TrainingDevice:
    """One device: a card, or of a TPU a chip."""

    name: str
    bf16_tflops: float  # dense, peak
    memory_gb: float  # 1e9 bytes
    source: str


def training_device(name: str) -> TrainingDevice:
    """The device of this name, in lower case as `h100-sxm`.

    Raises:
        InputError: it is unknown; the message lists those that are known.
    """
    wanted = name.strip().lower()
    if wanted not in TRAINING_DEVICES:
        raise InputError(
            f"device {name!r} is unknown; known are {', '.join(TRAINING_DEVICES)}. For another give the rate of your "
            "own training step, in TFLOP/s (--tflops)"
        )
    return TRAINING_DEVICES[wanted]


# name, dense bf16 TFLOP/s, GB, source. Where a sheet gives rates with sparsity alone they are halved here.
_ROWS = (
    ("a100-40gb", 312, 40, "NVIDIA A100 Tensor Core GPU data sheet, 2021"),
    ("a100-80gb", 312, 80, "NVIDIA A100 Tensor Core GPU data sheet, 2021"),
    ("h100-sxm", 989.4, 80, "NVIDIA H100 Tensor Core GPU Architecture, 2022, table 3"),
    ("h100-pcie", 756, 80, "NVIDIA H100 Tensor Core GPU Architecture, 2022, table 3"),
    ("h200", 989.5, 141, "NVIDIA H200 Tensor Core GPU data sheet, 2024: 1,979 with sparsity"),
    ("b200", 2250, 180, "NVIDIA DGX B200 data sheet, 2024: 8 cards, 36 PFLOP/s with sparsity, 1,440 GB"),
    ("l4", 121, 24, "NVIDIA L4 data sheet, 2023: 242 with sparsity"),
    ("l40s", 362, 48, "NVIDIA L40S data sheet, 2023"),
    ("rtx-3090", 71, 24, "NVIDIA Ampere GA102 GPU Architecture, 2020, appendix A"),
    ("rtx-4090", 165.2, 24, "NVIDIA Ada GPU Architecture, 2022, appendix A"),
    ("mi250x", 383, 128, "AMD Instinct MI250X data sheet, 2021"),
    ("mi300x", 1307.4, 192, "AMD Instinct MI300X data sheet, 2023"),
    ("mi325x", 1307.4, 256, "AMD Instinct MI325X data sheet, 2024"),
    ("gaudi2", 432, 96, "Intel Gaudi 2 white paper, 2022"),
    ("gaudi3", 1835, 128, "Intel Gaudi 3 white paper, 2024"),
    ("tpu-v4", 275, 32, "Google Cloud, TPU v4 system architecture"),
    ("tpu-v5e", 197, 16, "Google Cloud, TPU v6e system architecture, table v5e against v6e"),
    ("tpu-v5p", 459, 95, "Google Cloud, TPU v5p system architecture"),
    ("tpu-v6e", 918, 32, "Google Cloud, TPU v6e system architecture, table v5e against v6e"),
)
TRAINING_DEVICES = {
    name: TrainingDevice(name=name, bf16_tflops=tflops, memory_gb=memory, source=source)
    for name, tflops, memory, source in _ROWS
}
