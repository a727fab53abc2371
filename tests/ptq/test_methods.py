"""Laws that every solver keeps, over the registry."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.calib import gram
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.ptq.methods import SOLVERS
from tests.jitted import dequantize, quantize

ROWS, COLUMNS = 24, 96
RNG = np.random.default_rng(0)
MIX = np.eye(COLUMNS) + 0.3 * RNG.standard_normal((COLUMNS, COLUMNS)) / COLUMNS**0.5
X = (RNG.standard_normal((500, COLUMNS)) @ MIX).astype(np.float32)
W = RNG.standard_normal((ROWS, COLUMNS)).astype(np.float32)
GRAM = gram.finalize(gram.update(gram.init(COLUMNS), jnp.asarray(X)))
ASYMMETRIC = scheme("int4:g32:asym")  # every method takes it


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solution_is_a_packed_weight_and_its_loss(name: str) -> None:
    chosen = SOLVERS[name]
    found = chosen.solve(jnp.asarray(W), GRAM, ASYMMETRIC, config=chosen.config)
    expected = quantize(jnp.asarray(W), ASYMMETRIC)
    assert jax.tree.structure(found.qtensor) == jax.tree.structure(expected)
    assert found.qtensor.nbytes == expected.nbytes
    error = np.asarray(dequantize(found.qtensor), np.float64) - W
    damped = np.asarray(GRAM.matrix, np.float64)
    damped += float(found.damping) * np.mean(np.diag(damped)) * np.eye(COLUMNS)
    assert float(found.loss) == pytest.approx(np.einsum("ri,ij,rj->", error, damped, error) / 2, rel=1e-4)
    assert not bool(found.fallback)


@pytest.mark.parametrize("name", SOLVERS)
def test_stacks_go_through_vmap(name: str) -> None:
    chosen = SOLVERS[name]
    weights = jnp.stack([jnp.asarray(W), jnp.asarray(W[::-1] * 2)])
    grams = gram.Gram(jnp.stack([GRAM.matrix, jnp.diag(jnp.diag(GRAM.matrix))]), jnp.stack([GRAM.rows] * 2))
    both = jax.vmap(lambda w, g: chosen.solve(w, g, ASYMMETRIC, config=chosen.config))(weights, grams)
    assert both.qtensor.shape == (2, ROWS, COLUMNS)
    for index, weight in enumerate(weights):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], grams)
        alone = chosen.solve(weight, own, ASYMMETRIC, config=chosen.config)
        np.testing.assert_allclose(dequantize(both.qtensor)[index], dequantize(alone.qtensor), rtol=1e-5, atol=1e-5)
        assert float(both.loss[index]) == pytest.approx(float(alone.loss), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in SOLVERS if not SOLVERS[name].needs_gram])
def test_methods_that_need_no_data_run_without(name: str) -> None:
    chosen = SOLVERS[name]
    found = chosen.solve(jnp.asarray(W), None, ASYMMETRIC, config=chosen.config)
    error = np.asarray(dequantize(found.qtensor), np.float64) - W
    assert float(found.loss) == pytest.approx((error**2).sum() / 2, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].needs_gram])
def test_methods_that_need_data_say_so(name: str) -> None:
    chosen = SOLVERS[name]
    with pytest.raises(InputError, match="calibration data"):
        chosen.solve(jnp.asarray(W), None, ASYMMETRIC, config=chosen.config)
