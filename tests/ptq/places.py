"""A tiny block with outlier channels, what its modules read, and what they lose once their layers are replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jquant.core.qtensor import dequantize, quantize
from jquant.core.scheme import Scheme
from jquant.models.decoder import Decoder
from jquant.nn.capture import capture
from jquant.nn.protocol import Equivalence, apply
from jquant.nn.surgery import module_at, replace
from jquant.ptq.fold import fold
from tests.tiny_checkpoint import CONFIG

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 257, (3, 2, 24)), jnp.int32)  # three calls
PARENTS = ("attn", "attn.o_proj", "mlp", "mlp.down_proj")


def model_with_outliers(**changes: Any) -> Decoder:
    """Every place has some channels that are far larger than the others."""
    config = dataclasses.replace(CONFIG, num_kv_heads=4, num_layers=2, **changes)
    model = Decoder(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for block in model.blocks:
        for path in ("attn_norm", "mlp_norm", "attn.v_proj", "mlp.up_proj"):
            variable: nnx.Param = module_at(block, path).weight  # type: ignore[attr-defined]
            weight = np.array(variable.get_value())
            rows = weight if weight.ndim > 1 else weight[:, None]
            rows[..., rng.choice(rows.shape[-2], 3, replace=False), :] *= 15
            variable.set_value(jnp.asarray(weight))
    return model


def captured(model: Decoder) -> dict[str, list[tuple[Any, ...]]]:
    """Of the first block: what each parent is called with, call by call."""
    found: dict[str, list[tuple[Any, ...]]] = {path: [] for path in PARENTS}
    for tokens in TOKENS:
        arguments = apply(model.embed, tokens), model.contexts(tokens.shape[1])[0]
        for path, calls in capture(model.blocks[0], PARENTS, arguments).items():
            found[path].extend(calls)
    return found


def place_of(model: Decoder, parent: str) -> Equivalence:
    """Where scales are folded into what the parent reads."""
    return next(place for place in model.equivalences() if place.parent == parent)


quantized = jax.jit(quantize, static_argnames="scheme")


@partial(jax.jit, static_argnums=1)
def rounded(w: jax.Array, scheme: Scheme) -> jax.Array:
    """The values of the codes."""
    return dequantize(quantize(w, scheme))


def loss_after_folding(
    model: Decoder, place: Equivalence, scales: jax.Array, packed: Callable[[Any], nnx.Module], calls: list[Any]
) -> float:
    """Σ‖ŷ − y‖² / Σ‖y‖² of the parent in a block that was folded, and whose consumers were then replaced."""
    block = nnx.clone(model.blocks[0])
    fold(block, place, scales)
    replace(block, {path: packed(module_at(block, path)) for path in place.consumers})
    parent, made, lost, total = module_at(model.blocks[0], place.parent), module_at(block, place.parent), 0.0, 0.0
    for x, *rest in calls:
        divisor = scales if scales.ndim == 1 else jnp.repeat(scales, rest[0], axis=0, total_repeat_length=len(x))
        expected = np.asarray(apply(parent, x, *rest), np.float64)
        lost += float(np.sum((np.asarray(apply(made, x / divisor, *rest)) - expected) ** 2))
        total += float(np.sum(expected**2))
    return lost / total
