"""Real models against transformers: token ids and perplexity on the start of WikiText-2's test split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jquant.data.blocks import windows
from jquant.evaluation.scoring import evaluate
from jquant.models.checkpoint import open_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.slow
def test_smollm2_has_the_perplexity_that_transformers_finds() -> None:
    golden = np.load(GOLDENS / "perplexity_smollm2.npz")
    ids = golden["ids"]
    checkpoint = open_checkpoint("demo")
    tokenizer = checkpoint.tokenizer()
    text = tokenizer.decode(ids.ravel(), skip_special=False)
    np.testing.assert_array_equal(tokenizer.encode(text), ids.ravel())
    found = evaluate(checkpoint.model(), windows(ids.ravel(), window=512)).perplexity
    assert found.nll == pytest.approx(golden["nll"].sum() / (16 * 511), abs=2e-5)
    assert found.value == pytest.approx(json.loads(str(golden["meta"]))["perplexity"], abs=2e-3)
