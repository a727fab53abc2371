"""Record a tiny random model of every family but Llama, and its float32 logits from transformers.

    ORACLE scripts/goldens/families.py [--out tests/goldens] [NAME ...]

family_NAME.gguf is the same model as llama.cpp's converter lays it out, by hand through gguf-py's writer and its table
of tensor names (there is none for OPT, which llama.cpp does not know); its logits are golden.npz's `gguf_logits`.

Each folder family_NAME/ holds the checkpoint in float16, as transformers saves it, and golden.npz: `tokens` [2, 96],
`logits` float32 [2, 96, vocab], `meta`, a JSON string with the oracle, its version, and how far the logits move when a
feature is switched off, so that no test passes without it. Windows are 24 positions, a quarter of the text.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SEED = 11
LENGTH = 96
WINDOW = 24
STD = 0.15
SLIDING, FULL = "sliding_attention", "full_attention"
SHARED: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}
ROTARY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


# family -> settings, and what each switched-off feature changes
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "mistral": (
        {**ROTARY, "head_dim": 8, "sliding_window": WINDOW, "rope_parameters": rope(1e4)},
        {"window": {"sliding_window": None}},
    ),
    "qwen2": (
        {
            **ROTARY,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "layer_types": [FULL, SLIDING, SLIDING],
            "rope_parameters": rope(1e6),
            "tie_word_embeddings": True,
        },
        {"window": {"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL] * 3}},
    ),
    "qwen3": (
        {**ROTARY, "head_dim": 16, "rope_parameters": rope(1e6), "tie_word_embeddings": True},
        {"theta": {"rope_parameters": rope(1e4)}},
    ),
    "qwen3_moe": (
        {
            **ROTARY,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "rope_parameters": rope(1e6),
        },
        {"normalize": {"norm_topk_prob": False}, "experts": {"num_experts_per_tok": 1}},
    ),
    "mixtral": (
        {
            **ROTARY,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": None,
            "rope_parameters": rope(1e6),
        },
        {"experts": {"num_experts_per_tok": 2}},
    ),
    "gemma2": (
        {
            **ROTARY,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
            "rope_parameters": rope(1e4),
        },
        {
            "window": {"layer_types": [FULL] * 3},
            "attention_softcap": {"attn_logit_softcapping": None},
            "logit_softcap": {"final_logit_softcapping": None},
            "query_scale": {"query_pre_attn_scalar": 16},
        },
    ),
    "gemma3_text": (
        {
            **ROTARY,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": [SLIDING, FULL, SLIDING],
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                SLIDING: rope(1e4),
            },
        },
        {
            "window": {"layer_types": [FULL] * 3},
            "local_theta": {
                "rope_parameters": {
                    FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    SLIDING: rope(1e6),
                }
            },
            "query_scale": {"query_pre_attn_scalar": 16},
        },
    ),
    "phi3": (
        {**ROTARY, "sliding_window": WINDOW, "rope_parameters": rope(1e4)},
        {"window": {"sliding_window": None}},
    ),
    "opt": (
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        {"activation": {"activation_function": "gelu"}},
    ),
    "gpt2": (
        {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128},
        {"activation": {"activation_function": "relu"}},
    ),
}

# family -> GGUF's architecture
GGUF = {
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
NO_WINDOW_IN_GGUF = ("qwen2",)  # llama.cpp knows no window there
PATTERNS = {"gemma2": [SLIDING, FULL, SLIDING], "gemma3_text": [SLIDING] * 3}  # fixed in llama.cpp: 1 in 2, 5 in 6


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the goldens of the families.")
    parser.add_argument("names", nargs="*", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "tests" / "goldens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        record(name, arguments.out / f"family_{name}")


def record(name: str, folder: Path) -> None:
    settings, switches = FAMILIES[name]
    model = random_model(name, settings)
    generator = torch.Generator().manual_seed(SEED + 1)
    tokens = torch.randint(3, settings["vocab_size"], (2, LENGTH), generator=generator)
    logits = model(tokens).logits
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert (reloaded(tokens).logits - logits).abs().max() < 1e-6 * logits.abs().max(), name
    moves = {"weights_and_biases": moved_by_biases(model, tokens, logits)}
    for switch, changes in switches.items():
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(settings | SHARED | changes))).eval()
        other.load_state_dict(model.state_dict())
        moves[switch] = (other(tokens).logits - logits).abs().max().item()
    meta = {
        "oracle": "transformers",
        "version": importlib.metadata.version("transformers"),
        "torch": torch.__version__,
        "function": "AutoModelForCausalLM(tokens).logits, float32, eager attention, CPU",
        "config": settings,
        "seed": SEED,
        "moves": {key: round(value, 4) for key, value in moves.items()},
    }
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        meta=np.array(json.dumps(meta)),
    )
    if name in GGUF:
        write_gguf(name, folder)
    print(name, meta["moves"], f"logit std {logits.std():.2f}", sorted(path.name for path in folder.iterdir()))


def random_model(name: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(settings | SHARED))).eval()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if ("norm" in key or "ln_" in key) and key.endswith("weight"):
            low, high = (-0.5, 0.5) if name.startswith("gemma") else (0.5, 1.5)
            parameter.uniform_(low, high)
        else:
            parameter.normal_(0.0, STD)
        parameter.copy_(parameter.to(torch.float16))
    return model


def moved_by_biases(model: Any, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """The least change of a largest logit when one vector (a bias or a norm's weight) of the middle block is moved."""
    least = float("inf")
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 and ".1." in key and "k_proj.bias" not in key:  # softmax does not see a key's bias
            before = parameter.clone()
            parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))  # a constant would vanish in a LayerNorm
            least = min(least, (model(tokens).logits - logits).abs().max().item())
            parameter.copy_(before)
    return least


def write_gguf(name: str, folder: Path) -> None:
    """The checkpoint of `folder` as GGUF; where GGUF fixes what the config may choose, logits are recorded again."""
    config = json.loads((folder / "config.json").read_text())
    changes: dict[str, Any] = {}
    if name in NO_WINDOW_IN_GGUF:
        changes = {"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL] * 3}
    if name in PATTERNS:
        # llama.cpp scales scores by head_dim; only the 27B models have another scalar.
        changes = {"layer_types": PATTERNS[name], "query_pre_attn_scalar": config["head_dim"]}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", config=AutoConfig.from_pretrained(folder, **changes)
    )
    path = folder.with_name(f"family_{name}.gguf")
    architecture = GGUF[name]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    hidden, heads = (
        config.get("hidden_size", config.get("n_embd")),
        config.get("num_attention_heads", config.get("n_head")),
    )
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    kv_heads = config.get("num_key_value_heads", heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config.get("max_position_embeddings", config.get("n_positions")))
    writer.add_embedding_length(hidden)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(config.get("intermediate_size", 4 * hidden))
    writer.add_head_count(heads)
    if name == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        rope_parameters = config["rope_parameters"]
        writer.add_rope_freq_base(rope_parameters.get(FULL, rope_parameters)["rope_theta"])
        if name == "gemma3_text":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope_parameters[FULL]["factor"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("sliding_window") and name not in NO_WINDOW_IN_GGUF:
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    names = gguf.get_tensor_name_map(architecture, blocks)
    for key, array in stored_tensors(folder, config, heads, kv_heads, name).items():
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert target is not None, key
        writer.add_tensor(target, np.ascontiguousarray(array.astype(np.float32 if array.ndim == 1 else np.float16)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.chmod(0o644)
    recorded = np.load(folder / "golden.npz")
    logits = model(torch.from_numpy(recorded["tokens"]).long()).logits.numpy()
    np.savez_compressed(folder / "golden.npz", **{key: recorded[key] for key in recorded}, gguf_logits=logits)


def stored_tensors(folder: Path, config: dict[str, Any], heads: int, kv_heads: int, name: str) -> dict[str, np.ndarray]:
    """By Hugging Face names, changed as convert_hf_to_gguf.py changes them; experts stacked under their merged name."""
    from safetensors.numpy import load_file

    tensors: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for key, array in sorted(load_file(folder / "model.safetensors").items(), key=lambda item: natural(item[0])):
        if name.startswith("gemma") and key.endswith("norm.weight"):
            array = array.astype(np.float32) + 1
        if name == "gpt2" and array.ndim == 2 and ".h." in key:
            array = array.T
        if name in ("mistral", "mixtral") and ("q_proj" in key or "k_proj" in key):
            array = interleaved(array, heads if "q_proj" in key else kv_heads)
        if ".experts." in key:
            before, _, after = key.partition(".experts.")
            experts.setdefault(f"{before}.experts.{after.split('.', 1)[1]}", []).append(array)
        elif not (key == "lm_head.weight" and config.get("tie_word_embeddings")):
            tensors[key] = array
    return tensors | {key: np.stack(arrays) for key, arrays in experts.items()}


def natural(key: str) -> list[Any]:
    """Sorts expert 10 after expert 9."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in key.split(".")]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs (0, d/2), (1, d/2 + 1), ..."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    with torch.no_grad():
        main()
