"""Cached generation equals the uncached forward pass; sampling keeps to its limits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.models import generate as module
from jquant.models.generate import Sampling, choose, generate
from jquant.nn.protocol import apply
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import tiny_model


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("packed", [False, True])
def test_greedy_equals_the_forward_pass(length: int, packed: bool) -> None:
    model = tiny_model()
    if packed:
        quantize_layers(model, scheme("int4:g32"))
    prompt = np.random.default_rng(length).integers(0, 257, length).astype(np.int32)
    tokens = list(generate(model, prompt, max_tokens=6))
    padded = np.zeros((1, 136), np.int32)  # one length for all: nothing looks at what comes behind it
    padded[0, : length + 6] = [*prompt, *tokens]
    logits = np.asarray(apply(model, jnp.asarray(padded)))[0, : length + 6]
    assert tokens == logits[length - 1 : -1].argmax(-1).tolist()


def test_stop_ids_end_before_the_token() -> None:
    model, prompt = tiny_model(), np.asarray([5, 6, 7])
    tokens = list(generate(model, prompt, max_tokens=5))
    assert list(generate(model, prompt, max_tokens=5, stop_ids=(tokens[2],))) == tokens[: tokens.index(tokens[2])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_device_that_goes_on_gives_the_same(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """Where the host does not compute itself, the next token is under way before this one is read."""
    model, prompt = tiny_model(), np.arange(9)
    sampling = Sampling(temperature=temperature, seed=3)
    expected = list(generate(model, prompt, max_tokens=8, sampling=sampling))
    advanced = []

    def advance(*given: Any) -> Any:
        advanced.append(given[2])
        return original(*given)

    original = module._advance
    monkeypatch.setattr(module, "_advance", advance)
    monkeypatch.setattr(module, "on_cpu", lambda: False)
    monkeypatch.setattr(module, "prompt_chunk", lambda: 64)
    tokens = generate(model, prompt, max_tokens=8, sampling=sampling)
    assert next(tokens) == expected[0]
    assert advanced == [0, 9]
    assert [expected[0], *tokens] == expected
    assert advanced[-1] == 15  # nothing after the last
    stopped = list(generate(model, prompt, max_tokens=8, sampling=sampling, stop_ids=(expected[2],)))
    assert stopped == expected[: expected.index(expected[2])]


def test_sampling_keeps_to_top_k_and_top_p() -> None:
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.06, 0.04]))
    keys = jax.random.split(jax.random.key(0), 500)

    def drawn(sampling: Sampling) -> set[int]:
        return set(np.asarray(jax.vmap(lambda key: choose(logits, key, sampling))(keys)).tolist())

    assert drawn(Sampling(temperature=1.0)) == {0, 1, 2, 3, 4}
    assert drawn(Sampling(temperature=1.0, top_k=2)) == {0, 1}
    assert drawn(Sampling(temperature=1.0, top_p=0.8)) == {0, 1, 2}
    assert drawn(Sampling(temperature=1.0, top_p=0.1)) == {0}
    assert drawn(Sampling()) == {0}


def test_seeds_repeat() -> None:
    model, prompt = tiny_model(), np.asarray([1, 2])

    def run(seed: int) -> list[int]:
        return list(generate(model, prompt, max_tokens=12, sampling=Sampling(temperature=1.0, seed=seed)))

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [([], 3, "empty"), ([999], 3, "outside"), ([1], 0, "at least 1"), ([1] * 500, 100, "exceed the model's 512")],
)
def test_bad_prompts(prompt: list[int], tokens: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(generate(tiny_model(), np.asarray(prompt, np.int32), max_tokens=tokens))


def test_bad_sampling() -> None:
    for kind in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(InputError):
            Sampling(**kind)  # type: ignore[arg-type]
