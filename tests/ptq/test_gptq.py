"""GPTQ against a plain reference in numpy, and laws over schemes: better than rounding, order, dead inputs, damping."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.calib import gram
from jquant.core.errors import InputError
from jquant.core.qtensor import dequantize, quantize
from jquant.core.scheme import scheme
from jquant.ptq import gptq
from jquant.ptq.gptq import GPTQConfig

ROWS, COLUMNS = 48, 160
RNG = np.random.default_rng(0)
MIX = np.eye(COLUMNS) + 0.3 * RNG.standard_normal((COLUMNS, COLUMNS)) / COLUMNS**0.5
X = (RNG.standard_normal((1000, COLUMNS)) * np.exp(RNG.standard_normal(COLUMNS)) @ MIX).astype(np.float32)
W = RNG.standard_normal((ROWS, COLUMNS)).astype(np.float32)
GRAM = gram.finalize(gram.update(gram.init(COLUMNS), jnp.asarray(X)))
STATIC = GPTQConfig(act_order="static")

SCHEMES = (
    "int4:g32",
    "int4:g16:asym:fp16",
    "int3:g48",
    "int4:channel",
    "int4:tensor",
    "int8:g32:restricted",
    "int4:b10x32",
    "int2:g50:asym",
    "fp8_e4m3:channel",
    "nf4:g64:dq",
    "mxfp4:even",
    "nvfp4",
    "codebook(-1.0/-0.3/0.1/0.4/1.0):g32",
)


def _error(values: np.ndarray) -> float:
    """Of the layer's output, relative."""
    return float(np.linalg.norm(X @ (np.asarray(values) - W).T) / np.linalg.norm(X @ W.T))


def _reference(group: int, *, bits: int, order: np.ndarray, static: bool, damping: float = 0.01) -> np.ndarray:
    """SPEC 4 column by column in float64, for full-range symmetric integers; no blocks, an explicit inverse."""
    hessian = 2 / len(X) * X.astype(np.float64).T @ X.astype(np.float64)
    hessian = hessian[order][:, order]
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(COLUMNS)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    weight, value = W[:, order].astype(np.float64), np.zeros((ROWS, COLUMNS))
    reach = (2**bits - 1) / 2
    scale = np.ones(ROWS)
    for i in range(COLUMNS):
        if static:
            start = order[i] // group * group
            scale = np.abs(W[:, start : start + group]).max(axis=1) / reach
        elif i % group == 0:
            scale = np.abs(weight[:, i : i + group]).max(axis=1) / reach
        code = np.clip(np.rint(weight[:, i] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        value[:, i] = code * scale
        weight[:, i:] -= np.outer((weight[:, i] - value[:, i]) / upper[i, i], upper[i, i:])
    back = np.zeros_like(value)
    back[:, order] = value
    return back


@pytest.mark.parametrize(
    ("group", "bits", "block", "static"),
    [
        (16, 4, 128, False),  # below, at and above the block; ragged, and a block that no group divides
        (32, 3, 32, False),
        (50, 4, 7, False),
        (160, 4, 128, False),
        (32, 3, 128, True),
        (50, 4, 32, True),
    ],
)
def test_it_is_the_textbook_algorithm(group: int, bits: int, block: int, static: bool) -> None:
    config = GPTQConfig(act_order="static" if static else "none", block=block)
    found = gptq.solve(jnp.asarray(W), GRAM, scheme(f"int{bits}:g{group}"), config=config)
    order = np.argsort(-np.asarray(np.diag(GRAM.matrix)), kind="stable") if static else np.arange(COLUMNS)
    expected = _reference(group, bits=bits, order=order, static=static)
    values = np.asarray(dequantize(found.qtensor))
    # float32 against float64: a value near a tie may fall the other way, and what follows it moves along in its row.
    same_rows = np.isclose(values, expected, rtol=1e-4, atol=1e-5).all(axis=1)
    assert same_rows.mean() > 0.9
    assert _error(values) == pytest.approx(_error(expected), rel=0.01)
    assert float(found.loss) == pytest.approx(_loss(expected, order), rel=0.02)
    assert float(found.damping) == pytest.approx(0.01)
    assert not bool(found.fallback)


def _loss(values: np.ndarray, order: np.ndarray) -> float:
    """Σe²/2 = ½ Σ (w − q) (H + λI) (w − q)ᵀ, whatever the order."""
    hessian = 2 / len(X) * X.astype(np.float64).T @ X.astype(np.float64)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(COLUMNS)
    difference = values - W
    return float(np.einsum("ri,ij,rj->", difference, hessian, difference) / 2)


@pytest.mark.parametrize("spec", SCHEMES)
def test_output_error_is_below_that_of_rounding(spec: str) -> None:
    parsed = scheme(spec)
    rounded = _error(np.asarray(dequantize(quantize(jnp.asarray(W), parsed))))
    plain = gptq.solve(jnp.asarray(W), GRAM, parsed).qtensor
    assert plain.scheme == parsed
    assert plain.nbytes == quantize(jnp.asarray(W), parsed).nbytes
    assert _error(np.asarray(dequantize(plain))) < 0.9 * rounded
    ordered = gptq.solve(jnp.asarray(W), GRAM, parsed, config=STATIC).qtensor
    assert _error(np.asarray(dequantize(ordered))) < 0.9 * rounded


@pytest.mark.parametrize("spec", SCHEMES)
def test_without_correlations_it_is_rounding(spec: str) -> None:
    """With a diagonal H nothing can be made up for: the codes and scales are those of `quantize`, bit for bit."""
    white = gram.Gram(jnp.diag(jnp.linspace(1, 3, COLUMNS)), jnp.float32(9))
    expected = quantize(jnp.asarray(W), scheme(spec))
    found = gptq.solve(jnp.asarray(W), white, scheme(spec), config=STATIC).qtensor
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_dead_inputs_become_zero() -> None:
    dead = np.isin(np.arange(COLUMNS), [0, 17, 159])
    state = gram.update(gram.init(COLUMNS), jnp.asarray(np.where(dead, 0, X)))
    for config in (GPTQConfig(), STATIC):
        found = gptq.solve(jnp.asarray(W), gram.finalize(state), scheme("int4:g32"), config=config)
        values = np.asarray(dequantize(found.qtensor))
        assert not values[:, dead].any()
        assert np.isfinite(values).all()
        assert float(found.damping) == pytest.approx(0.01)


def test_damping_is_raised_until_it_helps_and_reported() -> None:
    rank_one = gram.Gram(jnp.outer(jnp.asarray(X[0]), jnp.asarray(X[0])) - 0.5 * jnp.eye(COLUMNS), jnp.float32(1))
    found = gptq.solve(jnp.asarray(W), rank_one, scheme("int4:g32"))
    assert float(found.damping) > 0.05
    assert not bool(found.fallback)
    hopeless = gram.Gram(-jnp.eye(COLUMNS), jnp.float32(1))
    found = gptq.solve(jnp.asarray(W), hopeless, scheme("int4:g32"))
    assert bool(found.fallback)
    np.testing.assert_array_equal(dequantize(found.qtensor), dequantize(quantize(jnp.asarray(W), scheme("int4:g32"))))


def test_stacked_layers_and_shared_factors() -> None:
    weights = jnp.stack([jnp.asarray(W), jnp.asarray(W[::-1] * 2)])
    config = GPTQConfig()
    factor = gptq.factorize(GRAM, config=config)
    both = jax.vmap(lambda w: gptq.solve_with(w, factor, scheme("int4:g32"), config=config))(weights)
    for index, weight in enumerate(weights):
        alone = gptq.solve(weight, GRAM, scheme("int4:g32"))
        stacked = jax.tree.map(lambda leaf, index=index: leaf[index], both.qtensor)
        np.testing.assert_allclose(dequantize(stacked), dequantize(alone.qtensor), rtol=1e-5, atol=1e-5)


def test_no_second_compilation() -> None:
    solve: Any = gptq._solve
    gptq.solve(jnp.asarray(W), GRAM, scheme("int4:g32"))
    before = solve._cache_size()
    gptq.solve(jnp.asarray(W * 3), GRAM, scheme("int4:g32"))
    assert solve._cache_size() == before


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="block type of ggml"):
        gptq.solve(jnp.asarray(W), GRAM, scheme("q4_k"))
    with pytest.raises(InputError, match="group size 512 is wider"):
        gptq.solve(jnp.asarray(W), GRAM, scheme("int4:g512"))
    with pytest.raises(InputError, match="weight of 100 inputs"):
        gptq.solve(jnp.asarray(W[:, :100]), GRAM, scheme("int4:g32"))
    with pytest.raises(InputError, match="damping 0"):
        GPTQConfig(damping=0)
