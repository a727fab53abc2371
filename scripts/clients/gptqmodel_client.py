# pyright: reportMissingImports=false
"""GPTQModel by way of transformers, with kernels that compile nothing and compute as asked.

What it chooses itself on CPUs with AVX512-BF16 is a kernel in C++ that compiles for minutes when it first runs, and
multiplies inputs of float32 by decoded weights as these do. Of what is chosen here `torch.compile` would compile the
decoding of each shape: TORCH_COMPILE_DISABLE=1 keeps it from that, to the same results.

Its layers hold scales in float16 whatever the model's dtype, so a decoded weight is rounded to float16;
`in_float32` has them decode, and multiply, in float32.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig


def load(path: Path) -> Any:
    """The model with float32 activations, as transformers loads it."""
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    config, backend = (AwqConfig, "awq_torch_aten") if said["quant_method"] == "awq" else (GPTQConfig, "gptq_torch")
    choice = config(bits=said["bits"])
    choice.backend = backend  # past a check that knows only some of GPTQModel's names
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # of which the backend is taken
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, device_map="cpu", quantization_config=choice
        )


def packed_layers(model: Any) -> dict[str, Any]:
    """By name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "qweight")}


def in_float32(model: Any) -> None:
    for layer in packed_layers(model).values():
        layer.float()


def decoded(layer: Any) -> torch.Tensor:
    """Its weight [out, in], by its own code and in the dtype of its scales."""
    if hasattr(layer, "awq_weight_dequantize"):
        return layer.awq_weight_dequantize("cpu", layer.scales.dtype).T
    return layer.dequantize_weight().T
