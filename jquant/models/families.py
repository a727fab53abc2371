"""Families of checkpoints: how each spells the config and the tensors of the one decoder.

A family is a config mapping plus a name table. `TENSORS` gives, for every parameter path of the decoder, its name in
Hugging Face and in GGUF checkpoints; `{}` is the block's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.models.config import ModelConfig, RopeScaling

TENSORS = (
    ("embed.weight", "model.embed_tokens.weight", "token_embd.weight"),
    ("head.norm.weight", "model.norm.weight", "output_norm.weight"),
    ("head.lm_head.weight", "lm_head.weight", "output.weight"),
    ("blocks.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    ("blocks.{}.attn.q_proj.weight", "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    ("blocks.{}.attn.k_proj.weight", "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    ("blocks.{}.attn.v_proj.weight", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    ("blocks.{}.attn.o_proj.weight", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    ("blocks.{}.attn.q_proj.bias", "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    ("blocks.{}.attn.k_proj.bias", "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    ("blocks.{}.attn.v_proj.bias", "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    ("blocks.{}.attn.o_proj.bias", "model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
    ("blocks.{}.mlp_norm.weight", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    ("blocks.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    ("blocks.{}.mlp.up_proj.weight", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    ("blocks.{}.mlp.down_proj.weight", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    ("blocks.{}.mlp.gate_proj.bias", "model.layers.{}.mlp.gate_proj.bias", "blk.{}.ffn_gate.bias"),
    ("blocks.{}.mlp.up_proj.bias", "model.layers.{}.mlp.up_proj.bias", "blk.{}.ffn_up.bias"),
    ("blocks.{}.mlp.down_proj.bias", "model.layers.{}.mlp.down_proj.bias", "blk.{}.ffn_down.bias"),
)

ARCHITECTURES = ("llama",)


def config_from_hf(config: Mapping[str, Any], source: str) -> ModelConfig:
    """The decoder's config from a Hugging Face config.json.

    Raises:
        InputError: the architecture or an option is not known, or a field is missing or of the wrong kind.
    """
    fields = _Fields(config, source)
    architecture = fields.string("model_type")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{source}: model_type {_shown(architecture)} is not supported; there are {', '.join(ARCHITECTURES)}"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise InputError(f"{source}: hidden_act {_shown(activation)} is not supported; there is silu")
    if config.get("pretraining_tp", 1) != 1:
        raise InputError(f"{source}: pretraining_tp {_shown(config['pretraining_tp'])} is not supported; only 1 is")
    heads = fields.whole("num_attention_heads")
    hidden = fields.whole("hidden_size")
    # transformers 5 keeps all of RoPE in `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{source}: rope parameters {_shown(rope)} are no object")
    return _config(
        source,
        architecture=architecture,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=fields.whole("head_dim", hidden // max(heads, 1)),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_Fields(rope, f"{source}: rope").number("rope_theta", fields.number("rope_theta", 10000.0)),
        rope_scaling=_hf_rope_scaling(rope, source),
        max_length=fields.whole("max_position_embeddings", 2048),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
    )


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> ModelConfig:
    """The decoder's config from GGUF metadata; what metadata leaves open is read off the tensor list.

    Raises:
        InputError: as `config_from_hf`.
    """
    fields = _Fields(metadata, source)
    architecture = fields.string("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{source}: architecture {_shown(architecture)} is not supported; there are {', '.join(ARCHITECTURES)}"
        )
    key = f"{architecture}.".__add__
    heads = fields.whole(key("attention.head_count"))
    hidden = fields.whole(key("embedding_length"))
    head_dim = fields.whole(key("attention.key_length"), hidden // max(heads, 1))
    rotary = fields.whole(key("rope.dimension_count"), head_dim)
    if rotary != head_dim:
        raise InputError(f"{source}: rotary embeddings over {rotary} of {head_dim} dimensions are not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    return _config(
        source,
        architecture=architecture,
        vocab_size=fields.whole(key("vocab_size"), len(tokens) if isinstance(tokens, list) else None),
        hidden_size=hidden,
        intermediate_size=fields.whole(key("feed_forward_length")),
        num_layers=fields.whole(key("block_count")),
        num_heads=heads,
        num_kv_heads=fields.whole(key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        norm_eps=fields.number(key("attention.layer_norm_rms_epsilon")),
        rope_theta=fields.number(key("rope.freq_base"), 10000.0),
        rope_scaling=_gguf_rope_scaling(metadata, key, source),
        max_length=fields.whole(key("context_length"), 2048),
        tie_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
    )


def interleaved_to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama-architecture GGUF's Q or K, or its bias, from interleaved RoPE pairs back to split halves.

    llama.cpp stores row (head, pair, side); Hugging Face and this decoder have (head, side, pair).
    """
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _config(source: str, **fields: Any) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _rope_scaling(source: str, **fields: Any) -> RopeScaling:
    try:
        return RopeScaling(**fields)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _hf_rope_scaling(rope: Mapping[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = _Fields(rope, f"{source}: rope")
    if kind == "default":
        return None
    if kind == "linear":
        return _rope_scaling(source, kind="linear", factor=fields.number("factor"))
    if kind == "llama3":
        return _rope_scaling(
            source,
            kind="llama3",
            factor=fields.number("factor"),
            low_frequency_factor=fields.number("low_freq_factor"),
            high_frequency_factor=fields.number("high_freq_factor"),
            original_length=fields.whole("original_max_position_embeddings"),
        )
    raise InputError(f"{source}: rope type {_shown(kind)} is not supported; there are default, linear, llama3")


def _gguf_rope_scaling(metadata: Mapping[str, Any], key: Any, source: str) -> RopeScaling | None:
    kind = metadata.get(key("rope.scaling.type"), "none")
    if kind == "none":
        return None
    if kind == "linear":
        return _rope_scaling(source, kind="linear", factor=_Fields(metadata, source).number(key("rope.scaling.factor")))
    raise InputError(f"{source}: rope scaling {_shown(kind)} is not supported; there are none, linear")


class _Fields:
    """Typed reading of a config object; every complaint names the field and the file."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.source}: {name} is {_shown(value)}, it must be a whole number")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:  # NaN included
            raise InputError(f"{self.source}: {name} is {_shown(value)}, it must be a finite number")
        return float(value)

    def string(self, name: str) -> str:
        value = self._get(name, None)
        if not isinstance(value, str):
            raise InputError(f"{self.source}: {name} is {_shown(value)}, it must be a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.source}: {name} is {_shown(value)}, it must be true or false")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{self.source}: field {name} is missing")
        return value


def _shown(value: Any) -> str:
    """A value from a file on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:79] + "…"
