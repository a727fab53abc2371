"""Real models against transformers: token ids and perplexity on the start of WikiText-2's test split."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jquant.data.blocks import windows
from jquant.evaluation.scoring import evaluate
from jquant.models.checkpoint import open_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens"
GEMMA = Path(sys.prefix) / "share" / "jquant" / "gemma-3-270m-q4_k_m.gguf"  # scripts/setup slow puts it there


def _check(model: str, golden_file: str) -> None:
    golden = np.load(GOLDENS / golden_file)
    ids, meta = golden["ids"], json.loads(str(golden["meta"]))
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    text = tokenizer.decode(ids.ravel()[int(tokenizer.add_bos) :], skip_special=False)
    np.testing.assert_array_equal(tokenizer.encode(text), ids.ravel())
    found = evaluate(checkpoint.model(), windows(ids.ravel(), window=512)).perplexity
    assert found.nll == pytest.approx(golden["nll"].sum() / (16 * 511), abs=2e-5)
    assert found.value == pytest.approx(meta["perplexity"], rel=5e-5)


@pytest.mark.slow
def test_smollm2_has_the_perplexity_that_transformers_finds() -> None:
    _check("demo", "perplexity_smollm2.npz")


@pytest.mark.slow
def test_gemma_has_the_perplexity_that_transformers_finds() -> None:
    _check(str(GEMMA), "perplexity_gemma3_270m.npz")
