"""Stochastic rounding: to a neighbouring level, the value itself in the mean, the same choice for the same key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.scheme import scheme
from jquant.core.ste import fake_quantize
from jquant.core.stochastic import round_stochastically

ELEMENTS = ["int2:channel", "int4:channel:restricted", "fp4_e2m1:channel", "fp8_e5m2:channel", "nf4"]


@pytest.mark.parametrize("spec", ELEMENTS)
def test_neighbours_and_mean(spec: str) -> None:
    element = scheme(spec).element
    levels = np.asarray(element.levels())  # pyright: ignore[reportAttributeAccessIssue]
    y = jnp.asarray(np.random.default_rng(0).uniform(levels[0], levels[-1], 64), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4096)
    drawn = np.asarray(jax.vmap(lambda key: round_stochastically(y, element, key))(keys))  # pyright: ignore[reportArgumentType]
    above = levels[np.clip(np.searchsorted(levels, y, side="left"), 0, len(levels) - 1)]
    below = levels[np.searchsorted(levels, y, side="right") - 1]
    assert np.all((drawn == above) | (drawn == below))
    error = 5 * (above - below) / 2 / np.sqrt(4096)  # five standard errors of the worst variance
    np.testing.assert_array_less(np.abs(drawn.mean(axis=0) - np.asarray(y)), error + 1e-6)


def test_levels_stay_and_the_rest_saturates() -> None:
    element = scheme("int3:channel").element
    y = jnp.asarray([-9.0, -4.0, -1.0, 0.0, 3.0, 9.0])
    np.testing.assert_array_equal(
        round_stochastically(y, element, jax.random.key(0)),  # pyright: ignore[reportArgumentType]
        [-4, -4, -1, 0, 3, 3],
    )


def test_zero_points() -> None:
    element = scheme("int2:channel:asym").element
    levels = round_stochastically(
        jnp.asarray([-5.0, -1.0, 2.0, 7.0]),
        element,  # pyright: ignore[reportArgumentType]
        jax.random.key(0),
        zero_point=jnp.float32(1),
    )
    np.testing.assert_array_equal(levels, [-1, -1, 2, 2])


@pytest.mark.parametrize("spec", ["int4:g32", "int4:g32:asym", "nf4:g32", "nvfp4", "mxfp4"])
def test_fake_quantize_by_chance(spec: str) -> None:
    x = jax.random.normal(jax.random.key(1), (8, 64))
    draw = jax.jit(lambda key: fake_quantize(x, scheme(spec), key=key))
    one, again, other = draw(jax.random.key(2)), draw(jax.random.key(2)), draw(jax.random.key(3))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.mean(one != other)) > 0.1
    gradient = jax.grad(lambda x: jnp.sum(fake_quantize(x, scheme(spec), key=jax.random.key(2))))(x)
    assert float(jnp.mean(gradient == 1)) > 0.85
