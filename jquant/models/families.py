"""Families of checkpoints: how each spells the config of the one decoder (tensor_names.py has their tensors).

A new family is a function here, from its config's fields to those of `ModelConfig`, a line in a table at the end, and
its name table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jquant.core.errors import InputError
from jquant.models.config import ModelConfig, RopeScaling

Options = dict[str, Any]

ACTIVATIONS = {  # transformers' names
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def config_from_hf(config: Mapping[str, Any], source: str) -> ModelConfig:
    """The decoder's config from a Hugging Face config.json.

    Raises:
        InputError: the architecture or an option is not known, or a field is missing or of the wrong kind.
    """
    fields = _Fields(config, source)
    architecture = fields.string("model_type")
    if architecture not in _HF:
        raise InputError(f"{source}: model_type {_shown(architecture)} is not supported; there are {', '.join(_HF)}")
    return _config(source, architecture=architecture, **_HF[architecture](fields))


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> ModelConfig:
    """The decoder's config from GGUF metadata; what metadata leaves open is read off the tensor list.

    Raises:
        InputError: as `config_from_hf`.
    """
    architecture = _Fields(metadata, source).string("general.architecture")
    if architecture not in _GGUF:
        raise InputError(
            f"{source}: architecture {_shown(architecture)} is not supported; there are {', '.join(_GGUF)}"
        )
    fields = _Fields(metadata, source, prefix=f"{architecture}.")
    name, options = _GGUF[architecture]
    return _config(source, architecture=name, **(_gguf_shared(fields, metadata, tensors) | options(fields, tensors)))


# Hugging Face ---------------------------------------------------------------------------------------------------------


def _llama(fields: _Fields) -> Options:
    bias = fields.flag("attention_bias", False)
    return _hf_shared(fields) | {"qkv_bias": bias, "output_bias": bias, "mlp_bias": fields.flag("mlp_bias", False)}


def _mistral(fields: _Fields) -> Options:
    return _hf_shared(fields) | {"window": fields.whole_or_none("sliding_window")}


def _qwen2(fields: _Fields) -> Options:
    return _hf_shared(fields) | _qwen_windows(fields) | {"qkv_bias": True}


def _qwen3(fields: _Fields) -> Options:
    bias = fields.flag("attention_bias", False)
    more = {"qk_norm": True, "qkv_bias": bias, "output_bias": bias}
    return _hf_shared(fields, head_dim=128) | _qwen_windows(fields) | more


def _qwen3_moe(fields: _Fields) -> Options:
    if fields.whole("decoder_sparse_step", 1) != 1 or fields.get("mlp_only_layers"):
        raise InputError(f"{fields.source}: blocks with and without experts in one model are not supported")
    return _qwen3(fields) | {
        "intermediate_size": fields.whole("moe_intermediate_size"),
        "num_experts": fields.whole("num_experts", fields.get("num_local_experts")),
        "experts_per_token": fields.whole("num_experts_per_tok"),
        "normalize_experts": fields.flag("norm_topk_prob", False),
    }


def _mixtral(fields: _Fields) -> Options:
    experts = {
        "num_experts": fields.whole("num_local_experts"),
        "experts_per_token": fields.whole("num_experts_per_tok"),
    }
    return _mistral(fields) | experts


def _phi3(fields: _Fields) -> Options:
    if fields.number("partial_rotary_factor", 1.0) != 1:
        raise InputError(f"{fields.source}: rotary embeddings over a part of the dimensions are not supported")
    return _mistral(fields)


def _gemma2(fields: _Fields) -> Options:
    # 0, 2, 4, … look back over the window
    return _gemma(fields, lambda block: block % 2 == 0) | {
        "attention_softcap": fields.number_or_none("attn_logit_softcapping"),
        "logit_softcap": fields.number_or_none("final_logit_softcapping"),
    }


def _gemma3(fields: _Fields) -> Options:
    every = fields.whole("sliding_window_pattern", 6)
    shared = _gemma(fields, lambda block: (block + 1) % every != 0)
    # transformers 5 keeps the two kinds of RoPE apart; before, `rope_local_base_freq` stood beside `rope_theta`.
    both = fields.get("rope_parameters") or {}
    local = _Fields(both.get("sliding_attention") or {}, f"{fields.source}: rope")
    return shared | {
        "qk_norm": True,
        "local_rope_theta": local.number("rope_theta", fields.number("rope_local_base_freq", 10000.0)),
        "attention_softcap": fields.number_or_none("attn_logit_softcapping"),
        "logit_softcap": fields.number_or_none("final_logit_softcapping"),
    }


def _gemma(fields: _Fields, is_windowed: Callable[[int], bool]) -> Options:
    if fields.get("use_bidirectional_attention"):
        raise InputError(f"{fields.source}: use_bidirectional_attention is not supported")
    activation = fields.get("hidden_activation") or "gelu_pytorch_tanh"
    shared = _hf_shared(fields, activation=activation, head_dim=256, theta=10000.0, tied=True)
    bias = fields.flag("attention_bias", False)
    return (
        shared
        | _windows(fields, fields.whole("sliding_window"), is_windowed)
        | {
            "qkv_bias": bias,
            "output_bias": bias,
            "post_norms": True,
            "embed_scale": shared["hidden_size"] ** 0.5,
            "query_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        }
    )


def _opt(fields: _Fields) -> Options:
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    for name, only in (
        ("do_layer_norm_before", True),
        ("word_embed_proj_dim", hidden),
        ("enable_bias", True),
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
    ):
        fields.only(name, only)
    return {
        **_learned(fields, heads=heads, hidden=hidden),
        "intermediate_size": fields.whole("ffn_dim"),
        "num_layers": fields.whole("num_hidden_layers"),
        "norm_eps": 1e-5,  # torch's default, which OPT's layers keep
        "max_length": fields.whole("max_position_embeddings"),
        "position_offset": 2,
        "activation": fields.activation("activation_function", "relu"),
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
    }


def _gpt2(fields: _Fields) -> Options:
    hidden, heads = fields.whole("n_embd"), fields.whole("n_head")
    for name, only in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        fields.only(name, only)
    return {
        **_learned(fields, heads=heads, hidden=hidden),
        "intermediate_size": fields.whole("n_inner", 4 * hidden),
        "num_layers": fields.whole("n_layer"),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "max_length": fields.whole("n_positions"),
        "activation": fields.activation("activation_function", "gelu_new"),
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
    }


def _learned(fields: _Fields, *, heads: int, hidden: int) -> Options:
    """What OPT and GPT-2 share: learned positions, LayerNorm, a plain MLP, biases everywhere."""
    return {
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // max(heads, 1),
        "positions": "learned",
        "norm": "layer",
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    }


def _hf_shared(
    fields: _Fields,
    *,
    activation: str | None = None,
    head_dim: int | None = None,
    theta: float = 10000.0,
    tied: bool = False,
) -> Options:
    """What all rotary families share. `head_dim`, `theta` and `tied` are what a config that leaves them out means."""
    heads, hidden = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    fields.only("pretraining_tp", 1)
    # transformers 5 keeps all of RoPE in `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`.
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{fields.source}: rope parameters {_shown(rope)} are no object")
    rope = rope.get("full_attention", rope)
    return {
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.whole("intermediate_size"),
        "num_layers": fields.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", heads),
        "head_dim": fields.whole("head_dim", head_dim or hidden // max(heads, 1)),
        "norm_eps": fields.number("rms_norm_eps"),
        "rope_theta": _Fields(rope, f"{fields.source}: rope").number("rope_theta", fields.number("rope_theta", theta)),
        "rope_scaling": _hf_rope_scaling(rope, fields.source),
        "max_length": fields.whole("max_position_embeddings", 2048),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
        "activation": fields.activation("hidden_act", "silu", given=activation),
    }


def _qwen_windows(fields: _Fields) -> Options:
    """Blocks from max_window_layers on look back over the window, where windows are used at all."""
    if not fields.flag("use_sliding_window", False):
        return {}
    first = fields.whole("max_window_layers", 28)
    return _windows(fields, fields.whole_or_none("sliding_window"), lambda block: block >= first)


def _windows(fields: _Fields, window: int | None, is_windowed: Callable[[int], bool]) -> Options:
    """From `layer_types` where the config has it, else by the family's rule."""
    if window is None:
        return {}
    kinds = fields.get("layer_types")
    if kinds is None:
        return {"window": window, "windowed_blocks": tuple(map(is_windowed, range(fields.whole("num_hidden_layers"))))}
    if not isinstance(kinds, list) or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise InputError(
            f"{fields.source}: layer_types {_shown(kinds)} is not supported; "
            "there are sliding_attention and full_attention"
        )
    return {"window": window, "windowed_blocks": tuple(kind == "sliding_attention" for kind in kinds)}


# GGUF -----------------------------------------------------------------------------------------------------------------


def _gguf_shared(fields: _Fields, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Options:
    heads, hidden = fields.whole("attention.head_count"), fields.whole("embedding_length")
    head_dim = fields.whole("attention.key_length", hidden // max(heads, 1))
    rotary = fields.whole("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise InputError(f"{fields.source}: rotary embeddings over {rotary} of {head_dim} dimensions are not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    experts = fields.whole("expert_count", 0)
    width = "feed_forward_length" if fields.get("expert_feed_forward_length") is None else "expert_feed_forward_length"
    return {
        "vocab_size": fields.whole("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": hidden,
        "intermediate_size": fields.whole(width),
        "num_layers": fields.whole("block_count"),
        "num_heads": heads,
        "num_kv_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _gguf_rope_scaling(fields),
        "max_length": fields.whole("context_length", 2048),
        "tie_embeddings": "output.weight" not in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "num_experts": experts,
        "experts_per_token": fields.whole("expert_used_count", 0),
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon", fields.get("attention.layer_norm_epsilon")),
    }


def _gguf_windowed(fields: _Fields, tensors: Mapping[str, Any]) -> Options:
    """A window, where there is one, is every block's."""
    return {"window": fields.whole_or_none("attention.sliding_window") or None}


def _gguf_plain(fields: _Fields, tensors: Mapping[str, Any]) -> Options:
    return {}


def _gguf_gemma2(fields: _Fields, tensors: Mapping[str, Any]) -> Options:
    hidden, heads, blocks = (fields.whole(name) for name in ("embedding_length", "attention.head_count", "block_count"))
    head_dim = fields.whole("attention.key_length")
    return {
        **_gguf_gemma(fields, lambda block: block % 2 == 0),
        # As llama.cpp: the 27B model divides by its width a head, the others by head_dim.
        "query_scale": (hidden // heads if blocks == 46 else head_dim) ** -0.5,
        "attention_softcap": fields.number("attn_logit_softcapping", 50.0),
        "logit_softcap": fields.number("final_logit_softcapping", 30.0),
    }


def _gguf_gemma3(fields: _Fields, tensors: Mapping[str, Any]) -> Options:
    hidden, heads, blocks = (fields.whole(name) for name in ("embedding_length", "attention.head_count", "block_count"))
    head_dim = fields.whole("attention.key_length")
    return {
        **_gguf_gemma(fields, lambda block: (block + 1) % 6 != 0),
        "query_scale": (hidden // heads if blocks == 62 else head_dim) ** -0.5,  # 27B, as above
        "rope_theta": fields.number("rope.freq_base", 1e6),
        "local_rope_theta": fields.number("rope.freq_base_swa", 10000.0),
        "logit_softcap": fields.number_or_none("final_logit_softcapping"),
    }


def _gguf_gemma(fields: _Fields, is_windowed: Callable[[int], bool]) -> Options:
    blocks = fields.whole("block_count")
    return {
        "window": fields.whole("attention.sliding_window"),
        "windowed_blocks": tuple(map(is_windowed, range(blocks))),
        "post_norms": True,
        "embed_scale": fields.whole("embedding_length") ** 0.5,
        "activation": "gelu_tanh",
    }


def _gguf_gpt2(fields: _Fields, tensors: Mapping[str, Any]) -> Options:
    return {
        "positions": "learned",
        "norm": "layer",
        "gated": False,
        "activation": "gelu_tanh",
        "norm_eps": fields.number("attention.layer_norm_epsilon"),
    }


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


def _gguf_rope_scaling(fields: _Fields) -> RopeScaling | None:
    kind = fields.get("rope.scaling.type") or "none"
    if kind == "none":
        return None
    if kind == "linear":
        return _rope_scaling(fields.source, kind="linear", factor=fields.number("rope.scaling.factor"))
    raise InputError(f"{fields.source}: rope scaling {_shown(kind)} is not supported; there are none, linear")


class _Fields:
    """Typed reading of a config object; every complaint names the field and the file."""

    def __init__(self, values: Mapping[str, Any], source: str, *, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def get(self, name: str) -> Any:
        """The field as it is, None where it is absent."""
        return self.values.get(self.prefix + name)

    def only(self, name: str, value: Any) -> None:
        """Refuses an option that the decoder has in one form alone; an absent field is that form."""
        found = self.get(name)
        if found is not None and found != value:
            raise InputError(f"{self.source}: {name} {_shown(found)} is not supported; only {value} is")

    def activation(self, name: str, default: str, *, given: str | None = None) -> str:
        """The decoder's word for an activation."""
        found = given or self.get(name) or default
        if found not in ACTIVATIONS:
            raise InputError(
                f"{self.source}: {name} {_shown(found)} is not supported; there are {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[found]

    def whole_or_none(self, name: str) -> int | None:
        return None if self.get(name) is None else self.whole(name)

    def number_or_none(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.source}: {self.prefix}{name} is {_shown(value)}, it must be a whole number")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:  # NaN included
            raise InputError(f"{self.source}: {self.prefix}{name} is {_shown(value)}, it must be a finite number")
        return float(value)

    def string(self, name: str) -> str:
        value = self._get(name, None)
        if not isinstance(value, str):
            raise InputError(f"{self.source}: {self.prefix}{name} is {_shown(value)}, it must be a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.source}: {self.prefix}{name} is {_shown(value)}, it must be true or false")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{self.source}: field {self.prefix}{name} is missing")
        return value


def _shown(value: Any) -> str:
    """A value from a file on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:79] + "…"


_HF: dict[str, Callable[[_Fields], Options]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "opt": _opt,
    "gpt2": _gpt2,
}

# GGUF's word -> Hugging Face's, and what is not read the same way for all
_GGUF: dict[str, tuple[str, Callable[[_Fields, Mapping[str, Any]], Options]]] = {
    "llama": ("llama", _gguf_windowed),
    "qwen2": ("qwen2", _gguf_plain),
    "qwen3": ("qwen3", _gguf_plain),
    "qwen3moe": ("qwen3_moe", _gguf_plain),
    "gemma2": ("gemma2", _gguf_gemma2),
    "gemma3": ("gemma3_text", _gguf_gemma3),
    "phi3": ("phi3", _gguf_windowed),
    "gpt2": ("gpt2", _gguf_gpt2),
}
