"""The decoder's config as Hugging Face's config.json; families.py has the way back.

Fields that mean the same in transformers before and after 5 are written in both spellings (`rope_theta` and
`rope_parameters`, `torch_dtype` and `dtype`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jquant.core.errors import InputError
from jquant.models.config import ModelConfig
from jquant.models.families import ACTIVATIONS

Fields = dict[str, Any]


def config_to_hf(config: ModelConfig, *, dtype: str) -> Fields:
    """config.json of a model of these fields, whose float weights are stored in `dtype` ("float32", "bfloat16", …).

    Raises:
        InputError: the family's config has no field for what the model needs.
    """
    if config.architecture not in _FAMILIES:
        raise InputError(
            f"a {config.architecture} model has no Hugging Face config here; there are {', '.join(_FAMILIES)}"
        )
    name, fields = _FAMILIES[config.architecture]
    return {
        "architectures": [name],
        "model_type": config.architecture,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        **fields(config),
    }


def _activation(config: ModelConfig) -> str:
    if config.activation == "gelu_tanh":
        return "gelu_pytorch_tanh"
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)


def _rope(config: ModelConfig) -> Fields:
    if config.rope_divisors is not None:
        raise InputError(
            "the model's rotary frequencies are divided one by one, as its GGUF has them: config.json has no field for "
            "that; start from the Hugging Face checkpoint"
        )
    found: Fields = {"rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is None:
        kind: Fields = {"rope_type": "default"}
    elif scaling.kind == "linear":
        kind = {"rope_type": "linear", "factor": scaling.factor}
    else:
        kind = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    found["rope_parameters"] = {**kind, "rope_theta": config.rope_theta}
    if scaling is not None:
        found["rope_scaling"] = kind
    return found


def _shared(config: ModelConfig) -> Fields:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "hidden_act": _activation(config),
        **_rope(config),
    }


def _llama(config: ModelConfig) -> Fields:
    if config.qkv_bias != config.output_bias:
        raise InputError("a llama config has one flag for the biases of q, k, v and o, and the model has some of them")
    return _shared(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _mistral(config: ModelConfig) -> Fields:
    return _shared(config) | {"sliding_window": config.window}


def _mixtral(config: ModelConfig) -> Fields:
    return _mistral(config) | {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def _windows(config: ModelConfig) -> Fields:
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in config.is_windowed()]
    return {"layer_types": kinds}


def _qwen2(config: ModelConfig) -> Fields:
    windowed = config.window is not None
    found = _shared(config) | {"use_sliding_window": windowed} | _windows(config)
    return found | ({"sliding_window": config.window, "max_window_layers": 0} if windowed else {})


def _qwen3(config: ModelConfig) -> Fields:
    return _qwen2(config) | {"attention_bias": config.qkv_bias}


def _qwen3_moe(config: ModelConfig) -> Fields:
    return _qwen3(config) | {
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalize_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(config: ModelConfig) -> Fields:
    assert config.query_scale is not None
    return (
        _shared(config)
        | _windows(config)
        | {
            "hidden_activation": _activation(config),
            "sliding_window": config.window,
            "attention_bias": config.qkv_bias,
            "query_pre_attn_scalar": config.query_scale**-2,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    )


def _gemma2(config: ModelConfig) -> Fields:
    found = _gemma(config)
    scalar = found["query_pre_attn_scalar"]
    return found | {"query_pre_attn_scalar": _whole(scalar)}


def _gemma3(config: ModelConfig) -> Fields:
    found = _gemma2(config)
    full = found["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return found | {
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "rope_local_base_freq": config.local_rope_theta,
    }


def _whole(value: float) -> int | float:
    """A square of an inverse root as the number it was."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _opt(config: ModelConfig) -> Fields:
    return {
        "hidden_size": config.hidden_size,
        "ffn_dim": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_length,
        "activation_function": _activation(config),
        "do_layer_norm_before": True,
        "word_embed_proj_dim": config.hidden_size,
    }


def _gpt2(config: ModelConfig) -> Fields:
    return {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else _activation(config),
    }


_FAMILIES: dict[str, tuple[str, Callable[[ModelConfig], Fields]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "mistral": ("MistralForCausalLM", _mistral),
    "mixtral": ("MixtralForCausalLM", _mixtral),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", _gemma3),
    "phi3": ("Phi3ForCausalLM", _mistral),
    "opt": ("OPTForCausalLM", _opt),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
}
