"""Programs that are compiled ahead are those that run: nothing is compiled twice, and nothing changes."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.ptq import layer_programs
from jquant.ptq.activations import InMemory
from jquant.ptq.ahead import Ahead, narrow_until
from jquant.ptq.data import Data
from jquant.ptq.pipeline import quantize_model
from jquant.ptq.recipe import Recipe, Rule, Step
from tests.tiny_checkpoint import tiny_model

WORKING = (
    "_capture",
    "update",
    "finalize",
    "usable",
    "is_finite",
    "_factorized",
    "_solution",
    "_rounded",
    "_difference",
    "_squares",
    "_relative",
    "decoded",
    "_replay_output",
)


@pytest.mark.parametrize("products", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_nothing_is_compiled_twice(products: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, (2, 2, 24)).astype(np.int32)
    method = Step("gptq", (("range", "minmax"),))
    recipe = Recipe(rules=(Rule(layers=(r"^blocks\.",), scheme="int4:g32", method=method),))
    expected = quantize_model(tiny_model(layers=1), recipe, list(tokens), products=products)[1]
    jax.clear_caches()
    with caplog.at_level(logging.DEBUG, logger="jax"), jax.log_compiles():
        found = quantize_model(tiny_model(layers=1), recipe, list(tokens), products=products)[1]
    compiled = [(r.message.split()[4], r.threadName) for r in caplog.records if "XLA compilation of jit" in r.message]
    for name in WORKING:
        threads = {thread for program, thread in compiled if program == f"jit({name})"}
        assert threads, name
        assert all(str(thread).startswith("compile") for thread in threads), name
    assert [layer.error for layer in found.layers] == [layer.error for layer in expected.layers]


def test_inputs_that_are_quantized_are_captured_in_float32() -> None:
    weights = Rule(layers=("q",), scheme="int4:g32", method=Step("gptq", ()))
    both = Rule(layers=("o",), scheme="int8:channel", method=Step("rtn", ()), activation="int8:token")
    data = Data(count=1, arguments=lambda _: (), mask=lambda _: None, store=InMemory(), narrow=("q", "k", "o"))
    rules = {"q": weights, "k": weights, "o": both}
    assert narrow_until(("q", "k"), rules, data) == ("q", "k", "o")
    assert narrow_until(("o",), rules, data) == ("q", "k")


def test_what_cannot_be_traced_is_refused_by_the_work_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the message that names the layer, where nothing refused it before."""
    monkeypatch.setattr("jquant.ptq.pipeline.check_tokens", lambda *_: None)
    recipe = Recipe(rules=(Rule(layers=(r"^blocks\.",), scheme="int4:g32", method=Step("gptq", ())),))
    tokens, mask = np.zeros((2, 64), np.int32), np.ones((2, 63), bool)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.q_proj: a mask of \(2, 63\)"):
        quantize_model(tiny_model(layers=1), recipe, [tokens], masks=[mask])


def test_what_cannot_be_traced_keeps_nothing_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arrays go with the block, and do not wait for the collector."""

    def fails(*arguments: Any) -> Any:
        raise ValueError

    monkeypatch.setattr(layer_programs, "traced_report", fails)
    model = tiny_model(layers=1)
    state = model.embed(jnp.zeros((2, 8), jnp.int32))
    data = Data(
        count=1, arguments=lambda batch: (state, model.contexts(8)[0]), mask=lambda batch: None, store=InMemory()
    )
    block = model.blocks[0]
    rule = Rule(layers=(r"",), scheme="int4:g32", method=Step("gptq", ()))
    weight = weakref.ref(block.attn.q_proj.weight.get_value())
    gc.collect()
    gc.disable()
    try:
        Ahead().start(block, [("attn.q_proj",)], {"attn.q_proj": rule}, data)
        block.attn.q_proj.weight.set_value(jnp.zeros(()))
        assert weight() is None
    finally:
        gc.enable()
