"""Work on a symmetric matrix strip by strip, against numpy on the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core import symmetric

SIZES = [1, 5, 128, 129, 300, 2050]  # one strip, several, and a last one that is shorter


def _symmetric(size: int) -> np.ndarray:
    x = np.random.default_rng(size).standard_normal((size, size)).astype(np.float32)
    return x + x.T


@pytest.mark.parametrize("size", SIZES)
def test_what_is_above_is_mirrored(size: int) -> None:
    matrix = _symmetric(size)
    above = np.where(np.tri(size, k=-1, dtype=bool), np.nan, matrix)
    np.testing.assert_array_equal(jax.jit(symmetric.mirrored)(above), matrix)
    stack = jax.jit(symmetric.mirrored)(np.stack([above, 2 * above]))
    np.testing.assert_array_equal(stack, np.stack([matrix, 2 * matrix]))


@pytest.mark.parametrize("size", SIZES)
def test_rows_and_columns_are_put_into_the_order(size: int) -> None:
    matrix, order = _symmetric(size), np.random.default_rng(1).permutation(size)
    found = jax.jit(symmetric.reordered)(matrix, jnp.asarray(order))
    np.testing.assert_array_equal(found, matrix[order][:, order])


@pytest.mark.parametrize("size", SIZES)
def test_the_square_reads_what_is_above_the_diagonal(size: int) -> None:
    matrix, rows = _symmetric(size), np.random.default_rng(2).standard_normal((7, size)).astype(np.float32)
    above = np.where(np.tri(size, dtype=bool), np.nan, matrix)
    found = float(jax.jit(symmetric.square)(rows, above, np.diagonal(matrix)))
    wide = rows.astype(np.float64)
    scale = np.sum(np.abs(wide @ np.abs(matrix)) * np.abs(wide))
    assert found == pytest.approx(np.sum(wide @ matrix * wide), abs=1e-6 * scale)


@pytest.mark.parametrize("size", [300, 2050])
def test_factors_of_the_square_may_be_rounded(size: int) -> None:
    x = np.random.default_rng(3).standard_normal((2 * size, size)).astype(np.float32)
    matrix, rows = x.T @ x, np.random.default_rng(2).standard_normal((7, size)).astype(np.float32)
    exact, rounded = (
        float(jax.jit(symmetric.square, static_argnames="factors")(rows, matrix, np.diagonal(matrix), factors=factors))
        for factors in ("float32", "bfloat16")
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-3)


def test_a_donated_matrix_keeps_its_memory() -> None:
    """Beside it there is room for a few strips, no second matrix."""
    size = 2048
    matrix, order = (
        jax.ShapeDtypeStruct(shape, kind) for shape, kind in (((size, size), "float32"), ((size,), "int32"))
    )
    for work, operands in ((symmetric.mirrored, (matrix,)), (symmetric.reordered, (matrix, order))):
        found = jax.jit(work, donate_argnums=0).lower(*operands).compile().memory_analysis()
        assert found is not None
        assert found.alias_size_in_bytes == 4 * size**2
        assert found.temp_size_in_bytes < 4 * size**2 / 4
