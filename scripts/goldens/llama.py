"""Record tiny random Llamas and their float32 logits from transformers.

Run in the oracle environment: ORACLE_PYTHON scripts/goldens/llama.py [--out tests/goldens]

    llama_a/  grouped queries 4/2, untied, bfloat16, sharded with an index; config.json as transformers 5 writes it
    llama_b/  tied embeddings, head_dim above hidden/heads, Llama 3 rope scaling, float32; config.json as published
    llama_c/  one key-value head, biases everywhere, linear rope scaling, float16; config.json as published
    llama_b.gguf  llama_b with float16 matrices, rows of Q and K permuted and rope_freqs.weight as llama.cpp writes them

Each folder holds golden.npz: `tokens` int32 [2, 96], `logits` float32 [2, 96, vocab], `meta`, a JSON string with the
oracle, its version, and how far the logits move when a feature is switched off, so that no test passes without it.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 7
LENGTH = 96
STD = 0.15  # at width 64 attention scores and logits come out with a standard deviation near 1
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHARED: dict[str, Any] = {
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
MODELS: dict[str, dict[str, Any]] = {
    "a": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "b": {
        "vocab_size": 80,
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3},
    },
    "c": {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    },
}
STORED = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16}
# llama_b's weights are float16 values stored as float32, so that its GGUF twin with float16 matrices is the same model.
ROUNDED = {"a": torch.bfloat16, "b": torch.float16, "c": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the Llama goldens.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "tests" / "goldens")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    for name, settings in MODELS.items():
        model = random_model(settings, ROUNDED[name])
        tokens = torch.randint(
            0, settings["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(SEED + 1)
        )
        logits = model(tokens).logits
        folder = out / f"llama_{name}"
        save(model, folder, STORED[name], published_config=name != "a")
        reloaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        assert torch.equal(reloaded(tokens).logits, logits), name
        meta = describe(model, settings, tokens, logits)
        np.savez_compressed(
            folder / "golden.npz",
            tokens=tokens.numpy().astype(np.int32),
            logits=logits.numpy(),
            meta=np.array(json.dumps(meta)),
        )
        print(folder.name, json.dumps(meta["moves"]), f"logit std {logits.std():.2f}")
        if name == "b":
            write_gguf(model, out / "llama_b.gguf")


def random_model(settings: dict[str, Any], rounded: torch.dtype) -> Any:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**settings, **SHARED)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0.0, STD)
        parameter.copy_(parameter.to(rounded))
    return model


def save(model: Any, folder: Path, stored: torch.dtype, *, published_config: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.to(stored).save_pretrained(folder, max_shard_size="80KB" if stored == torch.bfloat16 else "1GB")
    model.to(torch.float32)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)
    if published_config:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = rope | ({"type": kind} if kind == "linear" else {"rope_type": kind})
        config["torch_dtype"] = config.pop("dtype")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def describe(model: Any, settings: dict[str, Any], tokens: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    """The record, with the largest change of a logit when one feature is taken away."""

    def moved(**changes: Any) -> float:
        other = LlamaForCausalLM(LlamaConfig(**(settings | SHARED | changes))).eval()
        other.load_state_dict(model.state_dict(), strict=False)
        return round((other(tokens).logits - logits).abs().max().item(), 4)

    with torch.no_grad():
        plain_rope = {"rope_type": "default", "rope_theta": settings["rope_parameters"]["rope_theta"]}
        moves = {
            "rms_norm_eps": moved(rms_norm_eps=1e-2),
            "rope_theta": moved(rope_parameters=plain_rope | {"rope_theta": 2e4}),
        }
        if settings["rope_parameters"]["rope_type"] != "default":
            moves["rope_scaling"] = moved(rope_parameters=plain_rope)
        if settings.get("attention_bias"):
            moves["attention_bias"] = moved(attention_bias=False)
            moves["mlp_bias"] = moved(mlp_bias=False)
        earlier = tokens.clone()
        earlier[:, 0] = (earlier[:, 0] + 1) % settings["vocab_size"]
        changed = model(earlier).logits
        moves["first_token_on_last_logits"] = round((changed - logits)[:, -1].abs().max().item(), 4)
    versions = {package: importlib.metadata.version(package) for package in ("transformers", "torch", "gguf")}
    return {
        "oracle": "transformers",
        "version": versions["transformers"],
        "environment": versions,
        "function": "LlamaForCausalLM(tokens).logits, float32, eager attention, CPU",
        "config": settings,
        "seed": SEED,
        "script": "scripts/goldens/llama.py",
        "moves": moves,
    }


def write_gguf(model: Any, path: Path) -> None:
    """llama.cpp's convert_hf_to_gguf.py for a Llama without a tokenizer, by hand through gguf-py's writer."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("llama_b")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer.add_tensor("rope_freqs.weight", rope_factors(config))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied: llama.cpp reads token_embd.weight again
            continue
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = interleaved(array, heads if "q_proj" in name else kv_heads)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        writer.add_tensor(target, array.astype(np.float16 if array.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs (0, d/2), (1, d/2 + 1), ..."""
    rows, columns = weight.shape
    return np.ascontiguousarray(
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def rope_factors(config: Any) -> np.ndarray:
    """What llama.cpp divides each rotary frequency by, float32 [head_dim / 2]."""
    rope = config.rope_parameters
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / config.head_dim)
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


if __name__ == "__main__":
    with torch.no_grad():
        main()
