"""Where channels of a decoder's block can be rescaled without changing what it computes, read off its config.

    norm → q, k, v          norm → gate, up          v → o          up → down

The last two hold where nothing between the layers tells channels apart: attention mixes positions, not channels, as
long as every head has values of its own; a gate multiplies; of the activations only relu passes a positive factor on.
Norms behind a projection (Gemma's post norms) do not matter: outputs of the block's projections stay as they are.

Reference: SmoothQuant (Xiao et al., 2211.10438), 4; AWQ (Lin et al., 2306.00978), 3.2; SPEC 5.
"""

from __future__ import annotations

from jquant.models.config import ModelConfig
from jquant.nn.protocol import Equivalence


def equivalences(config: ModelConfig) -> tuple[Equivalence, ...]:
    """Those of every block, in the order in which data flows."""
    gate = ("mlp.gate_proj",) if config.gated or config.num_experts else ()
    router = ("mlp.router",) if config.num_experts else ()
    found = [Equivalence("attn_norm", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), (), "attn")]
    if config.num_heads == config.num_kv_heads:
        found.append(Equivalence("attn.v_proj", ("attn.o_proj",), (), "attn.o_proj"))
    found.append(Equivalence("mlp_norm", (*gate, "mlp.up_proj"), router, "mlp"))
    if gate or config.activation == "relu":
        found.append(Equivalence("mlp.up_proj", ("mlp.down_proj",), (), "mlp.down_proj"))
    return tuple(found)
