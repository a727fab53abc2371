"""A decoder to a GGUF file that llama.cpp runs: its names, its metadata, its order of rows.

What is packed in a block type of ggml is written as it is; floats stay floats. A model quantized with the recipe
`q4_k_m` so becomes the file of that name.

Reference: llama.cpp, gguf-py's `constants.py` and `tensor_mapping.py`, convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.qtensor import QTensor
from jquant.core.scheme import Scheme
from jquant.io.gguf_write import Tensor, write_gguf
from jquant.io.tokenizer_gguf import tokenizer_to_gguf
from jquant.models.checkpoint import Checkpoint
from jquant.models.config import ModelConfig
from jquant.models.families import config_from_gguf
from jquant.models.stream import StreamedModel
from jquant.models.tensor_names import Placement, gguf_placements
from jquant.nn.install import activations_of, tensors_of

ARCHITECTURES = {  # Hugging Face's word -> GGUF's
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
_FLOATS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
# llama.h, enum llama_ftype: what most of the file is.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "MXFP4": 38,
}


def export_gguf(checkpoint: Checkpoint, path: str | Path, *, dtype: str = "float32") -> None:
    """Writes a checkpoint to one GGUF file, a block at a time; it appears whole or not at all.

    Args:
        checkpoint: opened; packed layers in block types of ggml (q4_0 … q6_k, iq4_nl, ggml_mxfp4), or floats.
        path: of a file that does not exist yet.
        dtype: of float matrices ("float32", "float16", "bfloat16"); vectors stay float32.

    Raises:
        InputError: a layer is packed otherwise (the nearest type is named), the family or the tokenizer has no GGUF, or
            the file exists or cannot be written.
    """
    path, config = Path(path), checkpoint.config
    if path.exists():
        raise InputError(f"{path}: exists; choose another --out, or remove it first")
    if config.architecture not in ARCHITECTURES:
        raise InputError(f"a {config.architecture} model has no GGUF here; there are {', '.join(ARCHITECTURES)}")
    streamed = StreamedModel(checkpoint)
    _check_says_all(config, tensors_of(streamed.abstract))
    metadata = metadata_of(config, checkpoint.path.stem) | tokenizer_to_gguf(checkpoint.tokenizer(), config.vocab_size)
    metadata["general.quantization_version"] = 2
    metadata["general.file_type"] = _file_type(checkpoint)
    write_gguf(path, metadata, _tensors(streamed, config, np.dtype(dtype)))


def metadata_of(config: ModelConfig, name: str) -> dict[str, Any]:
    """The fields that say what the model is; `config_from_gguf` reads them."""
    architecture = ARCHITECTURES[config.architecture]
    eps = "layer_norm_rms_epsilon" if config.norm == "rms" else "layer_norm_epsilon"
    said: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        f"attention.{eps}": float(config.norm_eps),
        "vocab_size": config.vocab_size,
    }
    if config.positions == "rope":
        said |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(config.rope_theta),
        }
    if config.num_experts:
        said |= {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token}
        if architecture == "qwen3moe":
            said["expert_feed_forward_length"] = config.intermediate_size
    if config.window is not None:
        said["attention.sliding_window"] = config.window
    if config.local_rope_theta is not None:
        said["rope.freq_base_swa"] = float(config.local_rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling.factor)}
    for field, value in (
        ("attn_logit_softcapping", config.attention_softcap),
        ("final_logit_softcapping", config.logit_softcap),
    ):
        if value is not None:
            said[field] = float(value)
    general = {"general.architecture": architecture, "general.type": "model", "general.name": name}
    return general | {f"{architecture}.{field}": value for field, value in said.items()}


def _check_says_all(config: ModelConfig, tensors: Mapping[str, Any]) -> None:
    """Raises InputError where the metadata, read back, would be those of another model."""
    placements = gguf_placements(ARCHITECTURES[config.architecture])
    templates = {
        path: f"blocks.{{}}.{path.split('.', 2)[2]}" if path.startswith("blocks.") else path for path in tensors
    }
    names = {
        placements[template].tensor.format(*path.split(".")[1:2])
        for path, template in templates.items()
        if template in placements
    }
    read = config_from_gguf(metadata_of(config, "model"), dict.fromkeys(names), "GGUF")
    divisors = _rope_divisors(config)
    for field in fields(ModelConfig):
        mine, other = getattr(config, field.name), getattr(read, field.name)
        if field.name == "windowed_blocks":
            mine, other = config.is_windowed(), read.is_windowed()
        same = (
            np.isclose(mine, other, rtol=1e-6, atol=0)
            if isinstance(mine, float) and other is not None
            else mine == other
        )
        spelled = field.name in ("architecture", "query_scale") and _means_the_same(field.name, config, read)
        if not (same or spelled or (divisors is not None and field.name.startswith("rope_"))):
            raise InputError(
                f"a GGUF has no field for {field.name} {mine} of a {config.architecture} model: "
                f"it would be read as {other}"
            )


def _means_the_same(name: str, config: ModelConfig, read: ModelConfig) -> bool:
    if name == "architecture":
        return ARCHITECTURES[config.architecture] == ARCHITECTURES[read.architecture]
    plain = config.head_dim**-0.5
    return bool(np.isclose(config.query_scale or plain, read.query_scale or plain, rtol=1e-6, atol=0))


def _tensors(streamed: StreamedModel, config: ModelConfig, dtype: np.dtype) -> Iterator[Tensor]:
    """Embedding and head, then one block after another."""
    placements = gguf_placements(ARCHITECTURES[config.architecture])
    divisors = _rope_divisors(config)
    if divisors is not None:
        yield "rope_freqs.weight", "F32", divisors.shape, divisors
    outer = streamed.outer()
    yield from _part("", tensors_of(outer), activations_of(outer), placements, config, dtype)
    del outer
    for index in range(streamed.depth):
        block = streamed.block(index)
        yield from _part(f"blocks.{index}.", tensors_of(block), activations_of(block), placements, config, dtype)


def _part(
    prefix: str,
    tensors: Mapping[str, Any],
    activations: Mapping[str, str],
    placements: Mapping[str, Placement],
    config: ModelConfig,
    dtype: np.dtype,
) -> Iterator[Tensor]:
    number = prefix.split(".")[1] if prefix else ""
    done: set[str] = set()
    for owner, spec in activations.items():
        raise InputError(
            f"{prefix}{owner}: its inputs are quantized, {spec}, which a GGUF cannot say: export another format"
        )
    for name in tensors:
        if name in done:
            continue
        placement = placements.get(f"blocks.{{}}.{name}" if number else name)
        if placement is None:
            raise InputError(f"{prefix}{name} has no place in a GGUF of a {config.architecture} model")
        names = [ours.removeprefix("blocks.{}.") for ours in placement.ours]
        done |= set(names)
        parts = [_stored(tensors[each], placement, config, dtype, f"{prefix}{each}") for each in names]
        kinds = {kind for kind, _, _ in parts}
        if len(kinds) > 1:
            raise InputError(
                f"{prefix}{name}: a GGUF joins it with others, and they are of types {', '.join(sorted(kinds))}"
            )
        shape, raw = parts[0][1:]
        if len(parts) > 1:
            shape = (sum(part[1][0] for part in parts), *shape[1:])
            raw = np.concatenate([part[2] for part in parts])
        yield placement.tensor.format(*([number] if number else [])), kinds.pop(), shape, raw


def _stored(
    value: Any, placement: Placement, config: ModelConfig, dtype: np.dtype, what: str
) -> tuple[str, tuple[int, ...], np.ndarray]:
    """ggml's type, the shape, and the bytes with rows in the file's order."""
    if not isinstance(value, QTensor):
        array = placement.inverse(np.asarray(value), config)
        array = array.astype(dtype if array.ndim > 1 else np.float32)
        return _FLOATS[array.dtype], array.shape, array
    if value.scheme.block is None or value.groups is not None:
        raise InputError(f"{what}: a GGUF cannot hold {value.scheme}; the nearest is {nearest(value.scheme)}")
    name = value.scheme.block.name.removeprefix("ggml_").upper()
    return name, value.shape, placement.inverse(np.asarray(value.planes[0]), config)


def nearest(scheme: Scheme) -> str:
    """The block type of ggml that comes closest to a scheme."""
    element = scheme.element
    if isinstance(element, Int):
        kinds = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 7: "q8_0", 8: "q8_0"}
        plain = {4: "q4_1" if scheme.zero_point == "integer" else "q4_0", 5: "q5_0"}
        size = getattr(scheme.granularity, "size", 0)
        return plain.get(element.bits, kinds[element.bits]) if size == 32 else kinds[element.bits]
    if str(scheme).startswith(("mxfp4", "nvfp4")):
        return f"ggml_{str(scheme)[:5]}"
    return "iq4_nl" if element.bits <= 4 else "q8_0"


def _rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """Frequencies divided one by one, which is how a GGUF has Llama 3's scaling."""
    if config.rope_divisors is not None:
        return np.asarray(config.rope_divisors, np.float32)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return None
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = scaling.original_length * frequencies / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (smooth + (1 - smooth) / scaling.factor)).astype(np.float32)


def _file_type(checkpoint: Checkpoint) -> int:
    """What most weights of the blocks' layers are."""
    kinds = Counter[str]()
    for path, read in checkpoint.readers.items():
        if path.startswith("blocks.0.") and path.endswith("_proj.weight"):
            value = read()
            block = value.scheme.block if isinstance(value, QTensor) else None
            kinds["F32" if block is None else block.name.removeprefix("ggml_").upper()] += value.size
    return _FILE_TYPES.get(kinds.most_common(1)[0][0], 0) if kinds else 0
