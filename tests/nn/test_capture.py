"""Capture and replay: what layers read, in which order, and running on from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike

from jquant.core.errors import InputError
from jquant.nn.capture import capture, input_groups, replay_output, replaying, unread
from jquant.nn.linear import Linear


class Block(nnx.Module):
    """q and k read one array; v another of equal values; o what comes of them; `idle` is never called."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q, self.k, self.v, self.o, self.idle = (Linear(8, 8, rngs=rngs) for _ in range(5))

    def __call__(self, x: jax.Array, shift: jax.Array) -> jax.Array:
        return x + self.o(jnp.tanh(self.q(x) * self.k(x)) + self.v(x + shift))


BLOCK = Block(nnx.Rngs(0))
CALL = (jax.random.normal(jax.random.key(1), (2, 3, 8)), jnp.zeros(()))


def test_layers_that_read_one_array_stand_together_in_the_order_of_calls() -> None:
    assert input_groups(BLOCK, ("o", "v", "k", "q"), CALL) == (("q", "k"), ("v",), ("o",))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), CALL)
    assert input_groups(BLOCK, ("q", "o"), shapes) == (("q",), ("o",))


def test_captured_inputs_are_those_of_the_module() -> None:
    found = capture(BLOCK, ("q", "o"), CALL)
    ((x,),) = found["q"]
    np.testing.assert_array_equal(x, CALL[0])
    expected = jnp.tanh(BLOCK.q(x) * BLOCK.k(x)) + BLOCK.v(x)
    np.testing.assert_allclose(found["o"][0][0], expected, rtol=1e-6)


def test_replay_runs_on_from_the_inputs_given() -> None:
    given = {"o": ((jnp.ones((2, 3, 8)),),)}
    np.testing.assert_allclose(
        replay_output(BLOCK, CALL, replay=given), CALL[0] + BLOCK.o(jnp.ones((2, 3, 8))), rtol=1e-6
    )
    captured = capture(BLOCK, ("q", "k", "v", "o"), CALL)
    np.testing.assert_allclose(replay_output(BLOCK, CALL, replay=captured), BLOCK(*CALL), rtol=1e-6)


def test_what_replay_replaces_is_not_computed() -> None:
    text = (
        jax.jit(lambda x: replay_output(BLOCK, (x, CALL[1]), replay={"o": ((x,),)})).lower(CALL[0]).compile().as_text()
    )
    assert text is not None
    assert text.count("tanh") == 0


def test_layers_that_lead_to_replayed_inputs_alone_are_not_read() -> None:
    found = capture(BLOCK, ("q", "v", "o"), CALL)
    assert unread(BLOCK, ("q", "v", "o"), CALL, replay={"q": found["q"]}) == ()
    assert unread(BLOCK, ("q", "v", "o"), CALL, replay={"o": found["o"]}) == ("q", "v")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (CALL, {"o": found["o"]}))
    assert unread(BLOCK, ("o", "k"), shapes[0], replay=shapes[1]) == ("k",)


def test_narrow_layers_round_both_factors_and_nothing_else() -> None:
    wide = capture(BLOCK, ("o",), CALL)["o"][0][0]
    narrow = capture(BLOCK, ("o",), CALL, narrow=("v",))["o"][0][0]
    x, weight = (each.astype(jnp.bfloat16).astype(jnp.float32) for each in (CALL[0], BLOCK.v.weight.get_value()))
    assert narrow.dtype == jnp.float32
    expected = jnp.tanh(BLOCK.q(CALL[0]) * BLOCK.k(CALL[0])) + x @ weight.T
    np.testing.assert_allclose(narrow, expected, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(narrow, wide)
    captured = capture(BLOCK, ("q", "k", "v", "o"), CALL)
    run = replaying(BLOCK, narrow=("o",))
    np.testing.assert_allclose(run(CALL, captured), BLOCK(*CALL), rtol=0.02, atol=0.02)


def test_bad_paths_are_named() -> None:
    with pytest.raises(InputError, match="layer idle was not called"):
        capture(BLOCK, ("idle",), CALL)
    with pytest.raises(InputError, match="no module at 'nothing'"):
        capture(BLOCK, ("nothing",), CALL)


def test_the_module_stays_as_it_was() -> None:
    before = nnx.graphdef(BLOCK)
    capture(BLOCK, ("q",), CALL)
    assert nnx.graphdef(BLOCK) == before


def test_what_only_narrow_products_read_is_kept_rounded() -> None:
    """Half the memory: a product rounds it in any case, so replaying it gives the same bits."""
    wide, narrow = capture(BLOCK, ("v",), CALL), capture(BLOCK, ("v",), CALL, narrow=("v", "o"))
    assert narrow["v"][0][0].dtype == jnp.bfloat16
    run = replaying(BLOCK, narrow=("v", "o"))
    np.testing.assert_array_equal(run(CALL, narrow), run(CALL, wide))
    again = capture(BLOCK, ("o",), CALL, replay=narrow, narrow=("v",))["o"][0][0]
    assert again.dtype == jnp.float32
    np.testing.assert_array_equal(again, capture(BLOCK, ("o",), CALL, replay=wide, narrow=("v",))["o"][0][0])


class Attention(nnx.Module):
    """Multiplies what two layers give."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q, self.k, self.o = (Linear(8, 8, rngs=rngs) for _ in range(3))
        self.factors: DTypeLike | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = [each if self.factors is None else each.astype(self.factors) for each in (self.q(x), self.k(x))]
        return self.o((heads[0] * heads[1]).astype(x.dtype))


def test_attention_is_narrow_where_all_of_its_layers_are() -> None:
    attention = Attention(nnx.Rngs(0))
    around, paths = nnx.Sequential(attention), ("layers.0.q", "layers.0.k", "layers.0.o")
    narrow = [replaying(attention, narrow=("q", "k"))(CALL[:1], {}), capture(attention, ("o",), CALL[:1])["o"][0][0]]
    assert not any(np.array_equal(each, each.astype(jnp.bfloat16).astype(jnp.float32)) for each in narrow)
    for module, names in ((attention, ("q", "k", "o")), (around, paths)):
        found = capture(module, names, CALL[:1], narrow=names)[names[2]][0][0]
        q, k = (
            jnp.matmul(
                CALL[0].astype(jnp.bfloat16),
                layer.weight.get_value().astype(jnp.bfloat16).T,
                preferred_element_type=jnp.float32,
            )
            for layer in (attention.q, attention.k)
        )
        np.testing.assert_array_equal(found, q.astype(jnp.bfloat16) * k.astype(jnp.bfloat16))
    assert attention.factors is None


def test_a_state_may_hold_plain_numbers() -> None:
    class Counting(Block):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.count = nnx.Variable(3)

    module = Counting(nnx.Rngs(0))
    for narrow in ((), ("v",)):
        found = capture(module, ("o",), CALL, narrow=narrow)["o"]
        np.testing.assert_array_equal(found, capture(BLOCK, ("o",), CALL, narrow=narrow)["o"])
