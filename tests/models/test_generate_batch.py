"""Many prompts at once: each row's tokens are those it has alone, whatever stands beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.models import generate_batch as module
from jquant.models.checkpoint import load_model
from jquant.models.generate import generate
from jquant.models.generate_batch import generate_batch
from tests.tiny_checkpoint import tiny_model

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize("name", ["family_gemma3_text", "family_gpt2", "family_qwen3_moe"])
def test_rows_are_independent(name: str) -> None:
    """Rotary and learned positions, windowed blocks, experts; prompts of one token, of a piece, and of more."""
    model = load_model(GOLDENS / name)
    generator = np.random.default_rng(0)
    vocabulary, longest = model.config.vocab_size, min(model.config.max_length - 8, 70)
    prompts = [generator.integers(0, vocabulary, n).tolist() for n in (5, 1, longest, 12, 30)]
    found = generate_batch(model, prompts, max_tokens=6, stop=lambda row, new: False, rows=3)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert tokens == list(generate(model, np.asarray(prompt, np.int32), max_tokens=6))


def test_rows_end_by_themselves() -> None:
    model, prompts = tiny_model(), [[1, 2, 3], [4, 5], [6]]
    whole = generate_batch(model, prompts, max_tokens=9, stop=lambda row, new: False)
    ends = generate_batch(model, prompts, max_tokens=9, stop=lambda row, new: len(new) == row + 2)
    assert ends == [tokens[: row + 2] for row, tokens in enumerate(whole)]


def test_a_device_that_goes_on_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(), [[1, 2, 3], [4, 5], [6]]
    expected = generate_batch(model, prompts, max_tokens=9, stop=lambda row, new: len(new) == row + 2, rows=4)
    monkeypatch.setattr(module, "on_cpu", lambda: False)
    assert generate_batch(model, prompts, max_tokens=9, stop=lambda row, new: len(new) == row + 2, rows=4) == expected


def test_pieces_longer_than_the_cache_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU pieces are of 512 tokens, and a cache may have 256 places."""
    model, prompts = tiny_model(), [[7] * 300, [1, 2, 3]]
    expected = generate_batch(model, prompts, max_tokens=4, stop=lambda row, new: False, rows=2)
    for size in (200, 512, 4096):
        monkeypatch.setattr(module, "prompt_chunk", lambda size=size: size)
        assert generate_batch(model, prompts, max_tokens=4, stop=lambda row, new: False, rows=2) == expected
        short = generate_batch(model, prompts[1:], max_tokens=4, stop=lambda row, new: False, rows=1)
        assert short == expected[1:]


def test_programs_depend_on_capacity_alone() -> None:
    model = tiny_model(1)
    generate_batch(model, [[1] * 9, [2] * 30], max_tokens=4, stop=lambda row, new: False, rows=4)
    size = module._step._cache_size()  # type: ignore[attr-defined]
    generate_batch(model, [[1] * 77, [2] * 100, [3]], max_tokens=9, stop=lambda row, new: False, rows=4)
    assert module._step._cache_size() == size  # type: ignore[attr-defined]


def test_bad_prompts_are_named() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="prompt 1: the prompt is empty"):
        generate_batch(model, [[1], []], max_tokens=4, stop=lambda row, new: False)
    with pytest.raises(InputError, match="prompt 0: 510 prompt tokens and 4 new ones exceed the model's 512"):
        generate_batch(model, [[1] * 510], max_tokens=4, stop=lambda row, new: False)
    for prompt, message in (([257], "outside 0 … 256"), ([1, -1], "outside 0 … 256"), ([1.5], "float64")):
        with pytest.raises(InputError, match=f"prompt 1: .*{message}"):
            generate_batch(model, [[1], prompt], max_tokens=4, stop=lambda row, new: False)  # type: ignore[list-item]
    with pytest.raises(InputError, match="max tokens 0"):
        generate_batch(model, [[1]], max_tokens=0, stop=lambda row, new: False)
    with pytest.raises(InputError, match="rows 0"):
        generate_batch(model, [[1]], max_tokens=4, stop=lambda row, new: False, rows=0)
