"""Sizes of published models by name, so that advice about them needs no download.

A parameter count that the publisher states stands beside each, and a test holds that the sizes come to it. Sizes are
facts of the model's own config.json; fields that neither memory nor time depends on are left at the decoder's defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from jquant.core.errors import InputError
from jquant.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model: its sizes and who says so."""

    name: str
    config: ModelConfig
    parameters: float  # as published, in 1e9
    source: str


def find_published(name: str, *, family: str = "llama-3") -> Published | None:
    """The model of this name (`llama-3-70b`), or of this size (`70B`) in the family; None where it is neither.

    A size within 5 % of one of the family's is that one. Any other takes the nearest and changes its number of blocks,
    to as near as whole blocks come; name and source then say so.

    Raises:
        InputError: it is a size, and the family is unknown.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    for known in PUBLISHED.values():
        if wanted == known.name or wanted == known.name.replace("-", "").replace(".", ""):
            return known
    match = _SIZE.fullmatch(wanted)
    return None if match is None else _of_size(float(match[1]) * (1e-3 if match[2] == "m" else 1.0), family)


def nearest_published(name: str) -> list[str]:
    """Names like this one, for a message."""
    return difflib.get_close_matches(name.lower(), PUBLISHED, n=3, cutoff=0.6)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)(b|m)")


def _of_size(billions: float, family: str) -> Published:
    members = [known for known in PUBLISHED.values() if known.name.rpartition("-")[0] == family.lower()]
    members = [known for known in members if not known.config.num_experts]
    if not members:
        families = dict.fromkeys(name.rpartition("-")[0] for name in PUBLISHED)
        raise InputError(f"family {family!r} is unknown; known are {', '.join(families)}")
    if not billions > 0:
        raise InputError(f"a model of {billions:g} billion parameters: the size must be positive")
    nearest = min(members, key=lambda known: abs(math.log(known.parameters / billions)))
    if abs(nearest.parameters / billions - 1) <= 0.05:
        return nearest
    config = nearest.config
    outside = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2) / 1e9
    blocks = max(1, round(config.num_layers * (billions - outside) / (nearest.parameters - outside)))
    pattern = config.windowed_blocks
    windowed = tuple(pattern[index % len(pattern)] for index in range(blocks)) if pattern else ()
    return Published(
        name=f"{billions:g}B like {nearest.name}",
        config=dataclasses.replace(config, num_layers=blocks, windowed_blocks=windowed),
        parameters=billions,
        source=f"the sizes of {nearest.name} with {blocks} blocks in place of {config.num_layers}; {nearest.source}",
    )


_LLAMA3 = "Grattafiori et al., The Llama 3 Herd of Models, 2407.21783, table 3"
_QWEN3 = "Yang et al., Qwen3 Technical Report, 2505.09388, tables 1 and 2; config.json"
_QWEN25 = "Qwen2.5 Technical Report, 2412.15115, table 1; config.json"
_GEMMA2 = "Gemma 2, 2408.00118, table 1"
_MISTRAL = "Jiang et al., Mistral 7B, 2310.06825, table 1; Mixtral, 2401.04088, table 1"
_SMOLLM2 = "config.json of HuggingFaceTB/SmolLM2"

# name, parameters in 1e9, vocabulary, hidden, intermediate, layers, heads, kv heads, head dim, source, other fields
_ROWS: tuple[tuple[Any, ...], ...] = (
    ("llama-3-8b", 8.03, 128256, 4096, 14336, 32, 32, 8, 128, _LLAMA3, {}),
    ("llama-3-70b", 70.6, 128256, 8192, 28672, 80, 64, 8, 128, _LLAMA3, {}),
    ("llama-3-405b", 405.9, 128256, 16384, 53248, 126, 128, 8, 128, _LLAMA3, {}),
    ("qwen3-0.6b", 0.596, 151936, 1024, 3072, 28, 16, 8, 128, _QWEN3, {"tie_embeddings": True, "qk_norm": True}),
    ("qwen3-1.7b", 1.72, 151936, 2048, 6144, 28, 16, 8, 128, _QWEN3, {"tie_embeddings": True, "qk_norm": True}),
    ("qwen3-4b", 4.02, 151936, 2560, 9728, 36, 32, 8, 128, _QWEN3, {"tie_embeddings": True, "qk_norm": True}),
    ("qwen3-8b", 8.19, 151936, 4096, 12288, 36, 32, 8, 128, _QWEN3, {"qk_norm": True}),
    ("qwen3-14b", 14.8, 151936, 5120, 17408, 40, 40, 8, 128, _QWEN3, {"qk_norm": True}),
    ("qwen3-32b", 32.8, 151936, 5120, 25600, 64, 64, 8, 128, _QWEN3, {"qk_norm": True}),
    (
        "qwen3-30b-a3b", 30.5, 151936, 2048, 768, 48, 32, 4, 128, _QWEN3,
        {"qk_norm": True, "num_experts": 128, "experts_per_token": 8},
    ),
    (
        "qwen3-235b-a22b", 235.1, 151936, 4096, 1536, 94, 64, 4, 128, _QWEN3,
        {"qk_norm": True, "num_experts": 128, "experts_per_token": 8},
    ),
    ("qwen2.5-7b", 7.62, 152064, 3584, 18944, 28, 28, 4, 128, _QWEN25, {"qkv_bias": True}),
    ("qwen2.5-72b", 72.7, 152064, 8192, 29568, 80, 64, 8, 128, _QWEN25, {"qkv_bias": True}),
    ("mistral-7b", 7.24, 32000, 4096, 14336, 32, 32, 8, 128, _MISTRAL, {}),
    (
        "mixtral-8x7b", 46.7, 32000, 4096, 14336, 32, 32, 8, 128, _MISTRAL,
        {"num_experts": 8, "experts_per_token": 2},
    ),
    (
        "gemma-2-9b", 9.24, 256000, 3584, 14336, 42, 16, 8, 256, _GEMMA2,
        {
            "tie_embeddings": True, "post_norms": True, "window": 4096,
            "windowed_blocks": (True, False) * 21,
        },
    ),
    (
        "gemma-2-27b", 27.2, 256000, 4608, 36864, 46, 32, 16, 128, _GEMMA2,
        {"tie_embeddings": True, "post_norms": True, "window": 4096, "windowed_blocks": (True, False) * 23},
    ),
    ("smollm2-135m", 0.1345, 49152, 576, 1536, 30, 9, 3, 64, _SMOLLM2, {"tie_embeddings": True}),
    ("smollm2-1.7b", 1.71, 49152, 2048, 8192, 24, 32, 32, 64, _SMOLLM2, {"tie_embeddings": True}),
)  # fmt: skip


def _row(row: tuple[Any, ...]) -> Published:
    name, parameters, vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim, source, others = row
    config = ModelConfig(
        architecture=name,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        max_length=1 << 20,
        **others,
    )
    return Published(name=name, config=config, parameters=parameters, source=source)


PUBLISHED = {row[0]: _row(row) for row in _ROWS}
