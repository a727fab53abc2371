"""The Gram matrix against its definition, streamed, masked, merged and in bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.calib import gram
from jquant.core.errors import InputError, InputWarning

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


@pytest.mark.parametrize("dim", [511, 512, 577, 1030, 2050])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parts_of_wide_inputs_make_up_the_whole(dim: int, dtype: jnp.dtype) -> None:
    narrow = jnp.asarray(np.random.default_rng(1).standard_normal((40, dim)), dtype)
    found = gram.finalize(jax.jit(gram.update)(gram.init(dim), narrow))
    x = np.asarray(narrow, np.float32)
    np.testing.assert_allclose(found.matrix, 2 / 40 * x.T.astype(np.float64) @ x.astype(np.float64), atol=2e-6)
    np.testing.assert_array_equal(found.matrix, found.matrix.T)


@pytest.mark.parametrize("counts", [(3, 0, 300, 257), (0, 0, 0, 0), (560, 0, 0, 0), (1, 1, 256, 0)])
def test_each_expert_has_the_matrix_of_its_own_rows(counts: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).standard_normal((600, 24)).astype(np.float32)
    x[sum(counts) :] = np.nan  # of no expert
    state = gram.init(24, experts=4)
    for _ in range(2):
        state = jax.jit(gram.update_grouped)(state, jnp.asarray(x), jnp.asarray(counts))
    found = gram.finalize(state)
    np.testing.assert_array_equal(found.rows, 2 * np.asarray(counts))
    for expert, rows in enumerate(np.split(x[: sum(counts)].astype(np.float64), np.cumsum(counts)[:-1])):
        np.testing.assert_allclose(found.matrix[expert], 2 / max(1, len(rows)) * rows.T @ rows, atol=2e-6)


def test_too_few_rows_are_refused() -> None:
    """One for 128 inputs at the least; masked rows do not count, and experts' count together."""
    x = jnp.asarray(np.random.default_rng(3).standard_normal((4, 300)), jnp.float32)
    keep = jnp.arange(4) < 2
    with pytest.raises(InputError, match=r"layer a: calibration data of 2 tokens for 300 inputs: .* at least 3,"):
        gram.check(gram.finalize(gram.update(gram.init(300), x, keep)), "layer a")
    gram.check(gram.finalize(gram.update(gram.init(300), x[:3])), "layer a")
    experts = gram.init(300, experts=3)
    gram.check(gram.finalize(gram.update_grouped(experts, x, jnp.asarray([2, 0, 1]))), "layer a")
    with pytest.raises(InputError, match="calibration data of 2 tokens"):
        gram.check(gram.finalize(gram.update_grouped(experts, x, jnp.asarray([2, 0, 0]))), "layer a")


def test_too_few_rows_are_enough_where_nothing_learns_from_them() -> None:
    found = gram.finalize(gram.update(gram.init(1024), jnp.ones((2, 1024))))
    with pytest.raises(InputError, match="too few to learn from"):
        gram.check(found, "layer x")
    gram.check(found, "layer x", learns=False)


def test_too_few_rows_are_foreseen() -> None:
    gram.check_rows({"a": 64, "b": 300}, 3)
    gram.check_rows({}, 0)
    with pytest.raises(InputError, match=r"layer b: calibration data of 2 tokens for 300 inputs: .* at least 3,"):
        gram.check_rows({"a": 64, "b": 300}, 2)


def test_fewer_rows_than_inputs_are_warned_of() -> None:
    gram.warn_of_few({"a": 64, "b": 96}, 96)
    gram.warn_of_few({}, 0)
    with pytest.warns(
        InputWarning, match="data of 95 tokens for the 96 inputs of layer b: its Gram matrix is singular"
    ):
        gram.warn_of_few({"a": 64, "b": 96}, 95)


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
