"""Perplexity of a model on evaluation windows."""

from __future__ import annotations

from jquant.data.blocks import Windows
from jquant.evaluation.result import Perplexity
from jquant.evaluation.scoring import evaluate
from jquant.nn.protocol import CausalLM


def perplexity(model: CausalLM, windows: Windows, *, batch: int = 1) -> Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens, with its standard error and protocol.

    Args:
        model: any decoder in three parts (nn/protocol.py); float or packed.
        windows: from `text_windows`.
        batch: windows a forward pass.
    """
    return evaluate(model, windows, batch=batch).perplexity
