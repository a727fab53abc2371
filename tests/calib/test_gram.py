"""The Gram matrix against its definition, streamed, masked, merged and in bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.calib import gram
from jquant.core.errors import InputError

X = np.random.default_rng(0).standard_normal((6, 50, 24)).astype(np.float32)
EXPECTED = 2 / 300 * np.einsum("bti,btj->ij", X.astype(np.float64), X.astype(np.float64))


def test_batches_stream_and_merge() -> None:
    update = jax.jit(gram.update)
    one, other = gram.init(24), gram.init(24)
    for batch in X[:2]:
        one = update(one, jnp.asarray(batch))
    other = update(other, jnp.asarray(X[2:]))
    found = gram.finalize(gram.merge(one, other))
    np.testing.assert_allclose(found.matrix, EXPECTED, atol=1e-6)
    assert float(found.rows) == 300


def test_masked_rows_do_not_count_whatever_they_hold() -> None:
    mask = np.arange(50) < np.asarray([50, 0, 13, 49, 1, 50])[:, None]
    poisoned = np.where(mask[..., None], X, np.nan)
    found = gram.finalize(gram.update(gram.init(24), jnp.asarray(poisoned), jnp.asarray(mask)))
    rows = X[mask].astype(np.float64)
    np.testing.assert_allclose(found.matrix, 2 / len(rows) * rows.T @ rows, atol=1e-6)


def test_bfloat16_products_are_summed_in_float32() -> None:
    narrow = jnp.asarray(X, jnp.bfloat16)
    found = gram.finalize(gram.update(gram.init(24), narrow))
    rows = np.asarray(narrow, np.float64).reshape(-1, 24)
    np.testing.assert_allclose(found.matrix, 2 / 300 * rows.T @ rows, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((0, 4)), "layer a: no rows were seen"),
        (np.zeros((5, 4)), "layer a: all activations are zero"),
        (np.full((5, 4), np.nan), "layer a: activations hold a NaN"),
    ],
)
def test_data_that_cannot_serve_is_refused(x: np.ndarray, message: str) -> None:
    state = gram.update(gram.init(4), jnp.asarray(x, jnp.float32))
    with pytest.raises(InputError, match=message):
        gram.check(gram.finalize(state), "layer a")
