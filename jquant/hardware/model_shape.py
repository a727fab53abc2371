"""The sizes of a decoder that memory and time depend on, as plain numbers; models/shape.py makes them from a config."""

from __future__ import annotations

from dataclasses import dataclass

from jquant.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder with grouped-query attention and an MLP, or experts, in each block."""

    name: str
    source: str  # of the sizes
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert where there are experts
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool = False
    gated: bool = True  # three matrices an MLP, else two
    num_experts: int = 0
    experts_per_token: int = 0
    windows: tuple[int, ...] = ()  # positions that a block looks back over, one a windowed block
    other_parameters: int = 0  # norms, biases, routers, positions: small, and never quantized
    max_length: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"model {self.name}: {name} {getattr(self, name)}: it must be at least 1")
        if len(self.windows) > self.num_layers:
            raise InputError(f"model {self.name}: {len(self.windows)} windowed blocks of {self.num_layers}")

    @property
    def attention_weights(self) -> int:
        """Of one block: q, k, v and o."""
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Of one MLP, or of one expert."""
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def block_weights(self) -> int:
        """Of the matrices in all blocks: what quantization of `^blocks\\.` covers."""
        return self.num_layers * (self.attention_weights + max(1, self.num_experts) * self.mlp_weights)

    @property
    def active_weights(self) -> int:
        """Of the matrices in all blocks that one token is multiplied with."""
        return self.num_layers * (self.attention_weights + self._experts_of(1.0) * self.mlp_weights)

    @property
    def embedding_weights(self) -> int:
        """Of the table of tokens, and of the output projection where it is not the same."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.block_weights + self.embedding_weights + self.other_parameters

    def touched_weights(self, tokens: float) -> float:
        """Of the matrices in all blocks that some of `tokens` tokens are multiplied with, experts chosen evenly.

        E · (1 − (1 − k/E)^tokens) experts of E, of which each token takes k.
        """
        if not self.num_experts:
            return float(self.block_weights)
        share = 1 - (1 - self.experts_per_token / self.num_experts) ** tokens
        return self.num_layers * (self.attention_weights + self.num_experts * share * self.mlp_weights)

    def cached_positions(self, context: float) -> float:
        """Positions of keys and values that all blocks together hold or read for one sequence of `context` tokens."""
        full = self.num_layers - len(self.windows)
        return full * context + sum(min(context, window) for window in self.windows)

    def _experts_of(self, tokens: float) -> int:
        return round(self.experts_per_token * tokens) if self.num_experts else 1
