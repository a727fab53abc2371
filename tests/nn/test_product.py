"""Products of narrow operands: float32 sums, and gradients of the operands' dtype whose products stay narrow."""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.nn.product import dot_general, einsum, ragged_product

RNG = np.random.default_rng(0)
COUNTS = jnp.asarray([3, 0, 5])


def _operands(dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return (
        jnp.asarray(RNG.standard_normal((8, 24)), dtype),
        jnp.asarray(RNG.standard_normal((3, 16, 24)), dtype),
    )


def _plain(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("ri,eoi->reo", x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_float32_within_the_rounding_of_the_dtype(dtype: jnp.dtype) -> None:
    x, w = _operands(dtype)
    np.testing.assert_allclose(einsum("ri,eoi->reo", x, w), _plain(x, w), rtol=1e-5, atol=1e-5)
    found = jax.grad(lambda x, w: jnp.sum(einsum("ri,eoi->reo", x, w) ** 2), argnums=(0, 1))(x, w)
    wide = x.astype(jnp.float32), w.astype(jnp.float32)
    expected = jax.grad(lambda x, w: jnp.sum(_plain(x, w) ** 2), argnums=(0, 1))(*wide)
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        limit = float(jnp.finfo(dtype).eps) * 4 * np.abs(exact).max()
        np.testing.assert_allclose(mine.astype(jnp.float32), exact, atol=limit)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_by_expert(dtype: jnp.dtype) -> None:
    x, w = _operands(dtype)
    chosen = np.repeat(np.arange(3), COUNTS)

    def looked_up(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("ri,roi->ro", x.astype(jnp.float32), w.astype(jnp.float32)[chosen], precision="highest")

    np.testing.assert_allclose(ragged_product(x, w, COUNTS), looked_up(x, w), rtol=1e-5, atol=1e-5)
    found = jax.grad(lambda x, w: jnp.sum(ragged_product(x, w, COUNTS) ** 2), argnums=(0, 1))(x, w)
    wide = x.astype(jnp.float32), w.astype(jnp.float32)
    expected = jax.grad(lambda x, w: jnp.sum(looked_up(x, w) ** 2), argnums=(0, 1))(*wide)
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        limit = float(jnp.finfo(dtype).eps) * 4 * np.abs(exact).max()
        np.testing.assert_allclose(mine.astype(jnp.float32), exact, atol=limit)


def test_no_product_of_a_step_in_bfloat16_has_wide_operands() -> None:
    """One wide operand makes it a product of float32 by float32: on a GPU the slowest there is."""
    x, w = _operands(jnp.bfloat16)
    step = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(einsum("ri,eoi->reo", x, w) ** 2), argnums=(0, 1)))(x, w)
    products = [equation for equation in _equations(step.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(products) >= 3
    for equation in products:
        kinds = {variable.aval.dtype for variable in equation.invars}  # pyright: ignore[reportAttributeAccessIssue]
        assert kinds == {jnp.dtype(jnp.bfloat16)}


def _equations(jaxpr: jax.extend.core.Jaxpr) -> list[jax.extend.core.JaxprEqn]:
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                found += _equations(inner)
    return found


def test_a_flax_layer_s_product_with_its_weight_gradient_the_other_way_round() -> None:
    """Values are `jax.lax.dot_general`'s bit for bit, gradients but for the order of sums; other products are its."""
    x, w = (
        jnp.asarray(RNG.standard_normal((2, 9, 24)), jnp.float32),
        jnp.asarray(RNG.standard_normal((24, 16)), jnp.float32),
    )
    numbers = (((2,), (0,)), ((), ()))
    found, pull = jax.vjp(lambda x, w: dot_general(x, w, numbers), x, w)
    expected, exact = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, numbers), x, w)
    np.testing.assert_array_equal(found, expected)
    for mine, its in zip(pull(found), exact(found), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-4)
    narrow = dot_general(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), numbers, preferred_element_type=jnp.float32)
    assert narrow.dtype == jnp.float32
