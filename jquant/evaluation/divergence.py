"""How far a model's predictions are from those of a reference model."""

from __future__ import annotations

from jquant.data.blocks import Windows
from jquant.evaluation.result import Divergence
from jquant.evaluation.scoring import evaluate, prepare_reference
from jquant.nn.protocol import CausalLM


def divergence(model: CausalLM, reference: CausalLM, windows: Windows, *, batch: int = 1) -> Divergence:
    """Mean KL(reference ‖ model) in nats a token, and the share of positions where both have the same top token.

    To compare many models with one reference, call `prepare_reference` once and `evaluate` for each.
    """
    prepared, _ = prepare_reference(reference, windows, batch=batch)
    found = evaluate(model, windows, reference=prepared, batch=batch).divergence
    assert found is not None
    return found
