"""Programs that are compiled ahead are those that run: nothing is compiled twice, and nothing changes."""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest

from jquant.ptq import ahead
from jquant.ptq.pipeline import quantize_model
from jquant.ptq.recipe import Recipe, Rule, Step
from tests.tiny_checkpoint import tiny_model

WORKING = (
    "_capture",
    "update",
    "finalize",
    "_factorize",
    "_solution",
    "_rounded",
    "_difference",
    "_squares",
    "decoded",
    "_replay_output",
)


def test_nothing_is_compiled_twice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, (2, 2, 16)).astype(np.int32)
    method = Step("gptq", (("range", "minmax"),))
    recipe = Recipe(rules=(Rule(layers=(r"^blocks\.",), scheme="int4:g32", method=method),))
    expected = quantize_model(tiny_model(layers=1), recipe, list(tokens))[1]
    jax.clear_caches()
    monkeypatch.setattr(ahead, "on_cpu", lambda: False)
    with caplog.at_level(logging.DEBUG, logger="jax"), jax.log_compiles():
        found = quantize_model(tiny_model(layers=1), recipe, list(tokens))[1]
    compiled = [(r.message.split()[4], r.threadName) for r in caplog.records if "XLA compilation of jit" in r.message]
    for name in WORKING:
        threads = {thread for program, thread in compiled if program == f"jit({name})"}
        assert threads, name
        assert all(str(thread).startswith("compile") for thread in threads), name
    assert [layer.error for layer in found.layers] == [layer.error for layer in expected.layers]
