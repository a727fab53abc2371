# pyright: reportMissingImports=false
"""Loads what `write_cases.py` wrote with the tools it is for, and compares logits; exit code 1 where one is off.

    CLIENT_PYTHON scripts/clients/check.py DIR [FORMAT …]

Differences are the largest over all logits, relative to the largest logit. Where inputs are quantized, a value next to
a tie rounds as the last bits of what comes before it fall, and one code shows in the logits: the bar is wider there.
bitsandbytes multiplies 4-bit weights in bfloat16 on CPU, so there its own decoded weights are compared with ours
instead. llama.cpp rounds inputs to 8 bits wherever weights are blocks: only of a float file are its logits those of
exact arithmetic. GPTQModel rounds decoded weights to float16: so it is compared with our logits of weights rounded so,
and then, set to decode in float32, with our logits; weights that it decodes, either way, are ours to the bit.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from llama_cpp import LlamaCpp, perplexity
from transformers import AutoModelForCausalLM

TOKENS = torch.arange(24).reshape(2, 12)
BARS = {
    "compressed-tensors": 1e-4,
    "hf": 1e-4,
    "gguf": 1e-4,
    "bitsandbytes": 0.0,
    "gptq": 1e-4,
    "gptq_v2": 1e-4,
    "awq": 1e-4,
}
QUANTIZED_INPUTS = 5e-2
LLAMA_CPP = 6e-2  # of random weights: it rounds the inputs of every product to 8 bits
PERPLEXITY = 5e-3  # beside ours with inputs rounded as it rounds them
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
            print(f"{case.name:60} {client} is not installed")
            failed += 1
            continue
        if client == "gptqmodel":
            failed += _gptqmodel(case, BARS[format])
            continue
        bar = QUANTIZED_INPUTS if case.name.count("-") > 3 and format == "compressed-tensors" else BARS[format]
        failed += _judge(case.name, _difference(case, format), bar)
        if format == "gguf":
            failed += _judge(f"{case.name}, llama.cpp", _llama_cpp_difference(case), LLAMA_CPP)
    if not wanted or "gguf" in wanted:
        for case in sorted(path for path in folder.iterdir() if (path / "said.json").exists()):
            failed += _whole_model(case)
        failed += _sentencepiece(folder / "sentencepiece")
    names = ("transformers", "torch", "compressed-tensors", "bitsandbytes", "gguf", "gptqmodel", "xllamacpp")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if _installed(name)))
    return 1 if failed else 0


def _judge(name: str, difference: float, bar: float) -> bool:
    """Prints the difference; whether it is above the bar."""
    print(f"{name:60} {difference:.1e}  {'' if difference <= bar else f'above {bar}'}", flush=True)
    return difference > bar


def _difference(case: Path, format: str) -> float:
    options: dict[str, Any] = {"gguf_file": "model.gguf"} if format == "gguf" else {}
    folder = case / "model" if (case / "model").is_dir() else case
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    decoded = _decoded_difference(case, model) if format == "bitsandbytes" else None  # a forward pass packs them anew
    tokens = torch.from_numpy(np.load(case / "tokens.npy")).long() if (case / "tokens.npy").exists() else TOKENS
    theirs = _torch_logits(model, tokens)
    model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    return _relative(theirs, case) if decoded is None else decoded


def _gptqmodel(case: Path, bar: float) -> int:
    import gptqmodel_client as client
    from safetensors.torch import load_file

    stored = load_file(case / "decoded" / "model.safetensors")
    with redirect_stdout(io.StringIO()):  # it tells of its kernels
        model = client.load(case)
        layers = client.packed_layers(model)
        ours = {name: stored[f"{name}.weight"] for name in layers}
        rounded = _torch_logits(model, TOKENS)
        apart = max(_apart(client.decoded(layer), ours[name].half()) for name, layer in layers.items())
        client.in_float32(model)
        exact = _torch_logits(model, TOKENS)
        apart = max(apart, *(_apart(client.decoded(layer), ours[name]) for name, layer in layers.items()))
        model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    failed = _judge(case.name, _relative(exact, case), bar)
    failed += _judge(f"{case.name}, decoded weights", apart if len(layers) == 14 else np.inf, 0.0)
    failed += _judge(f"{case.name}, in float16", _relative(rounded, case, "logits_float16.npy"), bar)
    print(f"{'  and beside ours in float32':60} {_relative(rounded, case):.1e}")
    return failed


def _apart(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return float((theirs.double() - ours.double()).abs().max()) if theirs.dtype == ours.dtype else np.inf


def _torch_logits(model: Any, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(tokens).logits.float().numpy()


def _relative(theirs: np.ndarray, case: Path, file: str = "logits.npy") -> float:
    ours = np.load(case / file)
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


def _llama_cpp_difference(case: Path) -> float:
    model = LlamaCpp(case / "model.gguf")
    return _relative(np.stack([model.logits(row) for row in TOKENS.numpy()]), case)


def _whole_model(case: Path) -> int:
    """Perplexity and greedy tokens of llama.cpp beside ours."""
    said, model = json.loads((case / "said.json").read_text()), LlamaCpp(case / "model.gguf")
    theirs = perplexity(model, np.load(case / "windows.npy"))
    difference = theirs / said["perplexity_as_llama_cpp"] - 1
    failed = _judge(f"{case.name}, llama.cpp's perplexity", abs(difference), PERPLEXITY)
    print(f"{'  and with our inputs in floats':60} {abs(theirs / said['perplexity'] - 1):.1e}")
    same = len(said["greedy"]) == 32 and model.continues(said["prompt"], said["greedy"])
    print(f"{case.name + ', 32 greedy tokens':60} {'the same' if same else 'others'}", flush=True)
    return failed + (not same)


def _sentencepiece(case: Path) -> int:
    """llama.cpp's own tokenizer on texts, beside ours."""
    said, model = json.loads((case / "tokens.json").read_text()), LlamaCpp(case / "model.gguf")
    ids = [model.encode(text) for text in said["texts"]]
    others = [text for text, mine, other in zip(said["texts"], said["ids"], ids, strict=True) if mine != other]
    print(
        f"{case.name + ', ids of ' + str(len(ids)) + ' texts':60} {len(others)} differ {others[:3] if others else ''}"
    )
    return len(others) > 0


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
