"""What each family's checkpoints call the decoder's parameters, and how a stored tensor becomes one.

A table maps a tensor name, its numbers written `{}`, to the parameters it fills: the first number is the block's, a
second one the expert's, whose matrices are stacked. A fused tensor fills several parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jquant.models.config import ModelConfig

Transform = Callable[[np.ndarray, ModelConfig], np.ndarray]
Table = dict[str, tuple[tuple[str, Transform], ...]]  # tensor name -> (parameter path, transform) …


def as_stored(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """No change."""
    return array


def plus_one(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Gemma's norms multiply by 1 + w and Hugging Face stores w."""
    return array.astype(np.float32) + 1


def transposed(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """GPT-2 stores [in, out]."""
    return array.T


_HEADS: dict[Transform, str] = {}  # of `halves`: its argument
_PARTS: dict[Transform, Transform] = {}  # of `part`: what it does to the whole first


def part(name: str, then: Transform = as_stored) -> Transform:
    """The rows of q, k or v in a fused projection, or of gate or up, after `then`."""

    def cut(array: np.ndarray, config: ModelConfig) -> np.ndarray:
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        inner = config.intermediate_size
        start, rows, total = {
            "q": (0, queries, queries + 2 * keys),
            "k": (queries, keys, queries + 2 * keys),
            "v": (queries + keys, keys, queries + 2 * keys),
            "gate": (0, inner, 2 * inner),
            "up": (inner, inner, 2 * inner),
        }[name]
        whole = then(array, config)
        return whole[start : start + rows] if len(whole) == total else whole  # the caller reports a wrong shape

    _PARTS[cut] = then
    return cut


def halves(heads: str) -> Transform:
    """Rows of a llama-architecture GGUF's Q or K; `heads` is the config field with their number."""

    def back(array: np.ndarray, config: ModelConfig) -> np.ndarray:
        count = getattr(config, heads)
        return interleaved_to_halves(array, count) if len(array) == count * config.head_dim else array

    _HEADS[back] = heads
    return back


def halves_to_interleaved(heads: str) -> Transform:
    """The inverse of `halves`: rows of a float matrix, or of one of packed blocks."""

    def forth(array: np.ndarray, config: ModelConfig) -> np.ndarray:
        count = getattr(config, heads)
        split = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
        return split.swapaxes(1, 2).reshape(array.shape)

    return forth


def interleaved_to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama-architecture GGUF's Q or K, or its bias, from interleaved RoPE pairs back to split halves.

    llama.cpp stores row (head, pair, side); Hugging Face and this decoder have (head, side, pair).
    """
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def minus_one(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The inverse of `plus_one`."""
    return np.asarray(array, np.float32) - 1


def row_order(transform: Transform, config: ModelConfig, rows: int) -> np.ndarray | None:
    """Which of `rows` rows a transform takes, and in which order; None where it does more than that."""
    if transform in (plus_one, transposed) or _PARTS.get(transform) in (plus_one, transposed):
        return None
    return transform(np.arange(rows), config)


_INVERSES: dict[Transform, Transform] = {as_stored: as_stored, plus_one: minus_one, transposed: transposed}


class Placement(NamedTuple):
    """Where parameters go in a checkpoint: templates, as in `Table`; several, in their order, make one tensor."""

    tensor: str
    ours: tuple[str, ...]
    inverse: Transform  # of what reading does to the tensor


def hf_placements(architecture: str) -> dict[str, Placement]:
    """By parameter path template, where a Hugging Face checkpoint of this architecture has it."""
    return _placements(_HF[architecture])


def gguf_placements(architecture: str) -> dict[str, Placement]:
    """By parameter path template, where a GGUF of this architecture, in its own word, has it."""
    return _placements(_GGUF[architecture])


def _placements(table: Table) -> dict[str, Placement]:
    found: dict[str, Placement] = {}
    for tensor, filled in table.items():
        ours = tuple(path for path, _ in filled)
        if ours[0] in found:
            continue  # the other name of two
        transform = filled[0][1]
        first = _PARTS.get(transform, transform)
        placement = Placement(tensor, ours, _INVERSES.get(first) or halves_to_interleaved(_HEADS[first]))
        found |= dict.fromkeys(ours, placement)
    return found


def hf_tensors(architecture: str) -> Table:
    """Of a Hugging Face checkpoint."""
    return _HF[architecture]


def gguf_tensors(architecture: str) -> Table:
    """Of a GGUF; `architecture` is GGUF's own word."""
    return _GGUF[architecture]


def _rows(*rows: tuple[str, str], transform: Transform = as_stored) -> Table:
    return {theirs: ((ours, transform),) for ours, theirs in rows}


def _linear(ours: str, theirs: str, transform: Transform = as_stored) -> Table:
    """Weight and bias."""
    return _rows(*((f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in ("weight", "bias")), transform=transform)


def _fused(theirs: str, ours: dict[str, str], then: Transform = as_stored) -> Table:
    """Weight and bias of a projection that holds several."""
    return {
        f"{theirs}.{leaf}": tuple(
            (f"{path}.{leaf}", part(name, then if leaf == "weight" else as_stored)) for name, path in ours.items()
        )
        for leaf in ("weight", "bias")
    }


def _merged(*tables: Table) -> Table:
    merged: Table = {}
    for table in tables:
        merged |= table
    return merged


def _each(ours: str, theirs: str, names: Iterable[tuple[str, str]], transform: Transform = as_stored) -> Table:
    """Weights and biases of several layers under common prefixes."""
    return _merged(*(_linear(f"{ours}.{mine}", f"{theirs}.{yours}", transform) for mine, yours in names))


_ATTENTION = [(f"{name}_proj", f"{name}_proj") for name in "qkvo"]
_MLP = [(f"{name}_proj", f"{name}_proj") for name in ("gate", "up", "down")]
_QKV = {name: f"blocks.{{}}.attn.{name}_proj" for name in "qkv"}
_GATE_UP = {name: f"blocks.{{}}.mlp.{name}_proj" for name in ("gate", "up")}

# Hugging Face ---------------------------------------------------------------------------------------------------------

_HF_ENDS = _rows(("embed.weight", "model.embed_tokens.weight"), ("head.lm_head.weight", "lm_head.weight"))
_HF_NORMS = _rows(
    ("head.norm.weight", "model.norm.weight"),
    ("blocks.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    ("blocks.{}.mlp_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
)
_HF_ATTENTION = _each("blocks.{}.attn", "model.layers.{}.self_attn", _ATTENTION)
_HF_MLP = _each("blocks.{}.mlp", "model.layers.{}.mlp", _MLP)
_HF_LLAMA = _merged(_HF_ENDS, _HF_NORMS, _HF_ATTENTION, _HF_MLP)
_HF_QK_NORMS = [
    (f"blocks.{{}}.attn.{name}_norm.weight", f"model.layers.{{}}.self_attn.{name}_norm.weight") for name in "qk"
]
_HF_GEMMA = _merged(
    _HF_ENDS,
    _HF_ATTENTION,
    _HF_MLP,
    _rows(
        ("head.norm.weight", "model.norm.weight"),
        ("blocks.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
        ("blocks.{}.attn_post_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
        ("blocks.{}.mlp_norm.weight", "model.layers.{}.pre_feedforward_layernorm.weight"),
        ("blocks.{}.mlp_post_norm.weight", "model.layers.{}.post_feedforward_layernorm.weight"),
        *_HF_QK_NORMS,
        transform=plus_one,
    ),
)
_HF_PHI3 = _merged(
    _HF_ENDS,
    _HF_NORMS,
    _fused("model.layers.{}.self_attn.qkv_proj", _QKV),
    _linear("blocks.{}.attn.o_proj", "model.layers.{}.self_attn.o_proj"),
    _fused("model.layers.{}.mlp.gate_up_proj", _GATE_UP),
    _linear("blocks.{}.mlp.down_proj", "model.layers.{}.mlp.down_proj"),
)
_HF_QWEN3_MOE = _merged(
    _HF_ENDS,
    _HF_NORMS,
    _HF_ATTENTION,
    _rows(*_HF_QK_NORMS, ("blocks.{}.mlp.router.weight", "model.layers.{}.mlp.gate.weight")),
    _rows(
        *((f"blocks.{{}}.mlp.{ours}.weight", f"model.layers.{{}}.mlp.experts.{{}}.{ours}.weight") for ours, _ in _MLP)
    ),
)
_HF_MIXTRAL = _merged(
    _HF_ENDS,
    _HF_NORMS,
    _HF_ATTENTION,
    _rows(
        ("blocks.{}.mlp.router.weight", "model.layers.{}.block_sparse_moe.gate.weight"),
        ("blocks.{}.mlp.gate_proj.weight", "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"),
        ("blocks.{}.mlp.down_proj.weight", "model.layers.{}.block_sparse_moe.experts.{}.w2.weight"),
        ("blocks.{}.mlp.up_proj.weight", "model.layers.{}.block_sparse_moe.experts.{}.w3.weight"),
    ),
)
_OPT_LAYERS = [
    ("attn.q_proj", "self_attn.q_proj"),
    ("attn.k_proj", "self_attn.k_proj"),
    ("attn.v_proj", "self_attn.v_proj"),
    ("attn.o_proj", "self_attn.out_proj"),
    ("attn_norm", "self_attn_layer_norm"),
    ("mlp.up_proj", "fc1"),
    ("mlp.down_proj", "fc2"),
    ("mlp_norm", "final_layer_norm"),
]


def _opt(prefix: str) -> Table:
    return _merged(
        _rows(
            ("embed.weight", f"{prefix}decoder.embed_tokens.weight"),
            ("embed.positions", f"{prefix}decoder.embed_positions.weight"),
        ),
        _linear("head.norm", f"{prefix}decoder.final_layer_norm"),
        _each("blocks.{}", f"{prefix}decoder.layers.{{}}", _OPT_LAYERS),
    )


def _gpt2(prefix: str) -> Table:
    matrices = [("attn.o_proj", "attn.c_proj"), ("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")]
    return _merged(
        _rows(("embed.weight", f"{prefix}wte.weight"), ("embed.positions", f"{prefix}wpe.weight")),
        _linear("head.norm", f"{prefix}ln_f"),
        _each("blocks.{}", f"{prefix}h.{{}}", [("attn_norm", "ln_1"), ("mlp_norm", "ln_2")]),
        _fused(f"{prefix}h.{{}}.attn.c_attn", _QKV, transposed),
        _rows(*((f"blocks.{{}}.{a}.weight", f"{prefix}h.{{}}.{b}.weight") for a, b in matrices), transform=transposed),
        _rows(*((f"blocks.{{}}.{a}.bias", f"{prefix}h.{{}}.{b}.bias") for a, b in matrices)),
    )


_HF: dict[str, Table] = {
    "llama": _HF_LLAMA,
    "mistral": _HF_LLAMA,
    "qwen2": _HF_LLAMA,
    "qwen3": _merged(_HF_LLAMA, _rows(*_HF_QK_NORMS)),
    "qwen3_moe": _HF_QWEN3_MOE,
    "mixtral": _HF_MIXTRAL,
    "gemma2": _HF_GEMMA,
    "gemma3_text": _HF_GEMMA,
    "phi3": _HF_PHI3,
    "opt": _merged(_opt("model."), _opt(""), _rows(("head.lm_head.weight", "lm_head.weight"))),
    "gpt2": _merged(_gpt2("transformer."), _gpt2(""), _rows(("head.lm_head.weight", "lm_head.weight"))),
}

# GGUF -----------------------------------------------------------------------------------------------------------------

_GGUF_ENDS = _merged(
    _rows(("embed.weight", "token_embd.weight"), ("head.lm_head.weight", "output.weight")),
    _linear("head.norm", "output_norm"),
)
_GGUF_NORMS = _each("blocks.{}", "blk.{}", [("attn_norm", "attn_norm"), ("mlp_norm", "ffn_norm")])
_GGUF_ATTENTION = _each("blocks.{}.attn", "blk.{}", [(f"{name}_proj", f"attn_{name}") for name in "qkv"])
_GGUF_OUTPUT = _linear("blocks.{}.attn.o_proj", "blk.{}.attn_output")
_GGUF_MLP = _each("blocks.{}.mlp", "blk.{}", [(f"{name}_proj", f"ffn_{name}") for name in ("gate", "up", "down")])
_GGUF_PLAIN = _merged(_GGUF_ENDS, _GGUF_NORMS, _GGUF_ATTENTION, _GGUF_OUTPUT, _GGUF_MLP)
_GGUF_QK_NORMS = [(f"blocks.{{}}.attn.{name}_norm.weight", f"blk.{{}}.attn_{name}_norm.weight") for name in "qk"]
_GGUF_EXPERTS = _rows(
    ("blocks.{}.mlp.router.weight", "blk.{}.ffn_gate_inp.weight"),
    *((f"blocks.{{}}.mlp.{n}_proj.weight", f"blk.{{}}.ffn_{n}_exps.weight") for n in ("gate", "up", "down")),
)
_GGUF_GEMMA = _merged(
    _GGUF_PLAIN,
    _rows(
        ("blocks.{}.attn_post_norm.weight", "blk.{}.post_attention_norm.weight"),
        ("blocks.{}.mlp_post_norm.weight", "blk.{}.post_ffw_norm.weight"),
        *_GGUF_QK_NORMS,
    ),
)
_GGUF: dict[str, Table] = {
    "llama": _merged(
        _GGUF_PLAIN,
        _linear("blocks.{}.attn.q_proj", "blk.{}.attn_q", halves("num_heads")),
        _linear("blocks.{}.attn.k_proj", "blk.{}.attn_k", halves("num_kv_heads")),
        _GGUF_EXPERTS,
    ),
    "qwen2": _GGUF_PLAIN,
    "qwen3": _merged(_GGUF_PLAIN, _rows(*_GGUF_QK_NORMS)),
    "qwen3moe": _merged(_GGUF_PLAIN, _rows(*_GGUF_QK_NORMS), _GGUF_EXPERTS),
    "gemma2": _GGUF_GEMMA,
    "gemma3": _GGUF_GEMMA,
    "phi3": _merged(
        _GGUF_ENDS,
        _GGUF_NORMS,
        _fused("blk.{}.attn_qkv", _QKV),
        _GGUF_OUTPUT,
        _fused("blk.{}.ffn_up", _GATE_UP),
        _linear("blocks.{}.mlp.down_proj", "blk.{}.ffn_down"),
    ),
    "gpt2": _merged(
        _GGUF_ENDS,
        _GGUF_NORMS,
        _rows(("embed.positions", "position_embd.weight")),
        _fused("blk.{}.attn_qkv", _QKV),
        _GGUF_OUTPUT,
        _each("blocks.{}.mlp", "blk.{}", [("up_proj", "ffn_up"), ("down_proj", "ffn_down")]),
    ),
}
