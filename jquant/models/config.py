"""What makes one decoder differ from another. No jax here: configs are read by commands that must start quickly."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from jquant.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of rotary frequencies to longer contexts.

    linear: all frequencies divided by `factor`. llama3: low frequencies divided, high ones kept, smooth between
    (Llama 3.1; `original_length` is the context of pre-training).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise InputError(f"rope scaling factor {self.factor}: it must be positive")
        if self.original_length < 1:
            raise InputError(f"rope scaling from a context of {self.original_length} tokens: it must be at least 1")
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise InputError(
                f"rope scaling: high_freq_factor {self.high_frequency_factor} must exceed "
                f"low_freq_factor {self.low_frequency_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a decoder. The defaults are Llama's; a family turns on what it has beside."""

    architecture: str  # as Hugging Face calls it: "llama", "gemma3_text", …
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert where there are experts
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_length: int = 2048
    tie_embeddings: bool = False
    embed_scale: float = 1.0  # what embeddings are multiplied with (Gemma: √hidden_size)

    positions: Literal["rope", "learned"] = "rope"
    position_offset: int = 0  # row of the table of learned positions that the first token takes
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_divisors: tuple[float, ...] | None = None  # of each frequency; GGUF stores a scaling worked out like this
    local_rope_theta: float | None = None  # in windowed blocks, which no scaling touches; None: rope_theta everywhere

    window: int | None = None  # positions that a windowed block looks back over, the query's own included
    windowed_blocks: tuple[bool, ...] = ()  # which blocks are windowed; empty: all where there is a window
    query_scale: float | None = None  # scores are q·k times this; None: head_dim^(−½)
    attention_softcap: float | None = None  # scores s become c·tanh(s/c)
    logit_softcap: float | None = None
    qk_norm: bool = False  # RMS norm of every head's queries and keys before rotation

    norm: Literal["rms", "layer"] = "rms"
    post_norms: bool = False  # norms of what attention and MLP give, too (Gemma 2 and 3)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True  # down(act(gate(x)) · up(x)); else down(act(up(x)))
    qkv_bias: bool = False
    output_bias: bool = False  # of attention
    mlp_bias: bool = False

    num_experts: int = 0  # 0: one MLP a block
    experts_per_token: int = 0
    normalize_experts: bool = True  # the chosen experts' probabilities are scaled to sum to 1

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_length"
        for name in sizes.split():
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"model config: {name} is {value!r}, it must be a whole number of at least 1")
        if not self.norm_eps >= 0 or not self.rope_theta > 0:
            raise InputError(
                f"model config: norm_eps {self.norm_eps} must not be negative, rope_theta {self.rope_theta} be positive"
            )
        for name in ("embed_scale", "local_rope_theta", "query_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"model config: {name} {value} must be positive")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model config: {self.num_heads} heads do not share {self.num_kv_heads} key-value heads evenly"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise InputError(f"model config: head_dim {self.head_dim} must be even for rotary embeddings")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise InputError(
                f"model config: {len(self.rope_divisors)} rope divisors, head_dim {self.head_dim} needs half of that"
            )
        if self.window is not None and self.window < 1:
            raise InputError(f"model config: a window of {self.window} positions; it must be at least 1")
        if self.windowed_blocks and (self.window is None or len(self.windowed_blocks) != self.num_layers):
            raise InputError(
                f"model config: {len(self.windowed_blocks)} blocks are said to be windowed or not, there are "
                f"{self.num_layers} and the window is {self.window}"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise InputError(
                f"model config: {self.experts_per_token} experts a token of {self.num_experts}; it must be 1 to all"
            )

    def is_windowed(self) -> tuple[bool, ...]:
        """For each block whether it looks back over the window only."""
        return self.windowed_blocks or (self.window is not None,) * self.num_layers

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Any, source: str) -> ModelConfig:
        """Raises InputError naming `source` where the record is not one of `as_json`."""
        try:
            scaling, divisors = record["rope_scaling"], record["rope_divisors"]
            windowed = record["windowed_blocks"]
            return cls(
                **{
                    **record,
                    "rope_scaling": None if scaling is None else RopeScaling(**scaling),
                    "rope_divisors": None if divisors is None else tuple(divisors),
                    "windowed_blocks": tuple(windowed),
                }
            )
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except (TypeError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{source}: the model config is damaged: {reason}") from error
