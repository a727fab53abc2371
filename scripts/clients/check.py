# pyright: reportMissingImports=false
"""Loads what `write_cases.py` wrote with the tools it is for, and compares logits; exit code 1 where one is off.

    CLIENT_PYTHON scripts/clients/check.py DIR [FORMAT …]

Differences are the largest over all logits, relative to the largest logit. Where inputs are quantized, a value next to
a tie rounds as the last bits of what comes before it fall, and one code shows in the logits: the bar is wider there.
bitsandbytes multiplies 4-bit weights in bfloat16 on CPU, so there its own decoded weights are compared with ours
instead. GPTQ and AWQ need gptqmodel, which compiles for minutes when it first runs.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

TOKENS = torch.arange(24).reshape(2, 12)
BARS = {
    "compressed-tensors": 1e-4,
    "hf": 1e-4,
    "gguf": 1e-4,
    "bitsandbytes": 0.0,
    "gptq": 2e-3,
    "gptq_v2": 2e-3,
    "awq": 2e-3,
}
QUANTIZED_INPUTS = 5e-2
CLIENTS = {"bitsandbytes": "bitsandbytes", "gptq": "gptqmodel", "gptq_v2": "gptqmodel", "awq": "gptqmodel"}


def main() -> int:
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    transformers.logging.set_verbosity_error()
    failed = 0
    for case in sorted(path for path in folder.iterdir() if (path / "logits.npy").exists()):
        format = case.name.split("-", 1)[1]
        format = next(name for name in sorted(BARS, key=len, reverse=True) if format.startswith(f"{name}-"))
        if wanted and format not in wanted:
            continue
        client = CLIENTS.get(format)
        if client is not None and not _installed(client):
            print(f"{case.name:60} {client} is not installed: not checked")
            continue
        difference = _difference(case, format)
        bar = QUANTIZED_INPUTS if case.name.count("-") > 3 and format == "compressed-tensors" else BARS[format]
        passed = difference <= bar
        failed += not passed
        print(f"{case.name:60} {difference:.1e}  {'' if passed else 'above ' + str(bar)}", flush=True)
    names = ("transformers", "torch", "compressed-tensors", "bitsandbytes", "gguf", "gptqmodel")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if _installed(name)))
    return 1 if failed else 0


def _difference(case: Path, format: str) -> float:
    options: dict[str, Any] = {"gguf_file": "model.gguf"} if format == "gguf" else {}
    model = AutoModelForCausalLM.from_pretrained(case, dtype=torch.float32, **options)
    decoded = _decoded_difference(case, model) if format == "bitsandbytes" else None  # a forward pass packs them anew
    with torch.no_grad():
        theirs = model(TOKENS).logits.float().numpy()
    model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    if decoded is not None:
        return decoded
    ours = np.load(case / "logits.npy")
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


def _decoded_difference(case: Path, model: Any) -> float:
    import bitsandbytes
    from safetensors.torch import load_file

    stored = load_file(case / "model.safetensors")
    worst = 0.0
    for name, layer in model.named_modules():
        if not hasattr(layer, "weight") or not hasattr(layer.weight, "quant_state"):
            continue
        theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        packed = stored[f"{name}.weight"].reshape(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1).long()
        scale = stored[f"{name}.weight.absmax"]
        if scale.dtype == torch.uint8:
            state = layer.weight.quant_state
            scale = (
                stored[f"{name}.weight.nested_quant_map"][scale.long()].reshape(-1)
                * stored[f"{name}.weight.nested_absmax"].repeat_interleave(256)[: scale.numel()]
                + state.offset
            )
        ours = stored[f"{name}.weight.quant_map"][codes].reshape(scale.numel(), -1) * scale[:, None]
        worst = max(worst, float((theirs.reshape(-1) - ours.reshape(-1)).abs().max()))
    return worst


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
