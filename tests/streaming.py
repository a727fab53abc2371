"""Quantizes a checkpoint in a process of its own and says what memory that took: python -m tests.streaming FOLDER …

FOLDER holds a Llama that `write_deep` made. Printed as JSON: bytes resident before and at most, and whether the weights
in floats would have had room.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np

WINDOWS, WINDOW = 4, 128  # of calibration data


def block_bytes(hidden: int) -> int:
    """Of a block in float32."""
    return 4 * (4 * hidden * hidden + 3 * hidden * 4 * hidden)


def write_deep(folder: Path, layers: int, hidden: int) -> None:
    """A random Llama in bfloat16, a file a block and one for the rest."""
    from jquant.io.safetensors import write_safetensors
    from jquant.models.save import tokenizer_files
    from tests.tiny_checkpoint import byte_tokenizer

    folder.mkdir()
    rng, inner = np.random.default_rng(0), 4 * hidden

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)

    ones = np.ones(hidden, ml_dtypes.bfloat16)
    files = {"outer": {"model.embed_tokens.weight": random(257, hidden), "model.norm.weight": ones}}
    for layer in range(layers):
        place, block = f"model.layers.{layer}.", {}
        for name in ("q", "k", "v", "o"):
            block[f"{place}self_attn.{name}_proj.weight"] = random(hidden, hidden)
        for name in ("gate", "up"):
            block[f"{place}mlp.{name}_proj.weight"] = random(inner, hidden)
        block[f"{place}mlp.down_proj.weight"] = random(hidden, inner)
        block |= {f"{place}{name}_layernorm.weight": ones for name in ("input", "post_attention")}
        files[f"block-{layer}"] = block
    for name, tensors in files.items():
        write_safetensors(folder / f"{name}.safetensors", tensors)
    index = {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": 257, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu"}
    config |= {"rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in tokenizer_files(byte_tokenizer()).items():
        (folder / name).write_bytes(content)


def main(folder: Path, out: Path, room: int, method: str) -> None:
    """Quantizes with so many bytes of memory beyond what the process has once jax has started."""
    import jax.numpy as jnp

    from jquant.data.blocks import Windows
    from jquant.models.checkpoint import open_checkpoint
    from jquant.ptq.recipe import one_rule
    from jquant.quantization_run import quantize_checkpoint

    jnp.ones(8).block_until_ready()
    cap = _status("VmData") + room
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    before, most, done = _status("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)  # or an error would leave it, and the process, running
    watcher.start()
    checkpoint = open_checkpoint(folder)
    tokens = np.random.default_rng(0).integers(0, 256, (WINDOWS, WINDOW)).astype(np.int32)
    scored = np.ones((WINDOWS, WINDOW - 1), bool)
    data = (
        None
        if method == "rtn"
        else Windows(tokens=tokens, scored=scored, stride=WINDOW, total_tokens=tokens.size, sha256="random")
    )
    quantize_checkpoint(checkpoint, one_rule(method, "int4:g64"), out, calibration=data)
    done.set()
    watcher.join()
    try:
        whole = np.ones(checkpoint.config.num_layers * block_bytes(checkpoint.config.hidden_size), np.uint8).nbytes
    except MemoryError:
        whole = None
    print(json.dumps({"before": before, "most": most[0], "whole": whole}))


def _status(name: str) -> int:
    """Bytes that the system says of this process: RssAnon, its own memory without mapped files; VmData, what of that it
    has asked for."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
