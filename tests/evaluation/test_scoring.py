"""Perplexity, KL and agreement against the definitions, computed in float64 from the model's own full logits."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.data.blocks import windows
from jquant.evaluation import scoring
from jquant.evaluation.divergence import divergence
from jquant.evaluation.perplexity import perplexity
from jquant.evaluation.result import mean_and_stderr
from jquant.models.checkpoint import load_model
from jquant.models.decoder import Decoder
from jquant.nn.protocol import apply
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import tiny_model

IDS = np.random.default_rng(0).integers(0, 257, 400).astype(np.int32)


def _log_p(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    logits = np.asarray(apply(model, jnp.asarray(tokens)), np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("stride", [64, 20])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_perplexity_by_definition(stride: int, batch: int) -> None:
    model, cut = tiny_model(), windows(IDS, window=64, stride=stride)
    log_p = _log_p(model, cut.tokens)
    nll = -np.take_along_axis(log_p[:, :-1], cut.tokens[:, 1:, None], -1)[..., 0] * cut.scored
    found = perplexity(model, cut, batch=batch)
    assert found.nll == pytest.approx(nll.sum() / cut.scored.sum(), rel=1e-5)
    assert found.value == pytest.approx(np.exp(found.nll))
    assert found.protocol.tokens_scored == cut.scored.sum()
    assert found.stderr == pytest.approx(mean_and_stderr(nll.sum(1), cut.scored.sum(1))[1], rel=1e-4)


def test_divergence_by_definition() -> None:
    reference, model, cut = tiny_model(), tiny_model(), windows(IDS, window=64)
    quantize_layers(model, scheme("int3:g32"))
    p, q = _log_p(reference, cut.tokens)[:, :-1], _log_p(model, cut.tokens)[:, :-1]
    found = divergence(model, reference, cut)
    assert found.kl.value == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert found.top1.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    same = divergence(reference, reference, cut)
    assert same.kl.value == pytest.approx(0, abs=1e-6)
    assert same.top1.value == 1


def test_stderr_of_a_ratio() -> None:
    sums, counts = np.asarray([3.0, 5.0, 4.0]), np.asarray([2.0, 2.0, 2.0])
    mean, stderr = mean_and_stderr(sums, counts)
    assert (mean, stderr) == (2.0, pytest.approx(np.std(sums / counts, ddof=1) / np.sqrt(3)))
    assert np.isnan(mean_and_stderr(sums[:1], counts[:1])[1])


def test_one_compilation_serves_models_of_equal_structure() -> None:
    cut = windows(IDS, window=64)
    perplexity(tiny_model(0), cut)
    compiled = scoring._score_rows._cache_size()  # type: ignore[attr-defined]
    perplexity(tiny_model(1), cut)
    assert scoring._score_rows._cache_size() == compiled  # type: ignore[attr-defined]


def test_reference_of_other_windows_is_refused() -> None:
    model = tiny_model()
    reference, _ = scoring.prepare_reference(model, windows(IDS, window=64))
    with pytest.raises(InputError, match="other windows"):
        scoring.evaluate(model, windows(IDS[1:], window=64), reference=reference)
    with pytest.raises(InputError, match="batch 0"):
        scoring.evaluate(model, windows(IDS, window=64), batch=0)


def test_windows_beyond_the_context_and_other_vocabularies_are_refused() -> None:
    goldens = Path(__file__).parents[1] / "goldens"
    opt, llama = load_model(goldens / "family_opt"), load_model(goldens / "llama_a")
    ids = IDS % 64
    assert np.isfinite(perplexity(opt, windows(ids, window=128)).nll)
    with pytest.raises(InputError, match="129 tokens exceeds the model's context of 128"):
        perplexity(opt, windows(ids, window=129))
    with pytest.raises(InputError, match="vocabularies of different sizes"):
        divergence(opt, llama, windows(ids, window=64))
