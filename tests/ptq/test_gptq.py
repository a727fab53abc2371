"""GPTQ against a plain reference in numpy, and laws over schemes: better than rounding, order, dead inputs, damping."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.calib import gram
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.ptq import cholesky, gptq, gptq_factor, gptq_ranges, layer_programs, rtn
from jquant.ptq.cholesky import cholesky_below
from jquant.ptq.gptq import GPTQConfig
from tests.jitted import dequantize, quantize

ROWS, COLUMNS = 48, 160
RNG = np.random.default_rng(0)
MIX = np.eye(COLUMNS) + 0.3 * RNG.standard_normal((COLUMNS, COLUMNS)) / COLUMNS**0.5
X = (RNG.standard_normal((1000, COLUMNS)) * np.exp(RNG.standard_normal(COLUMNS)) @ MIX).astype(np.float32)
W = RNG.standard_normal((ROWS, COLUMNS)).astype(np.float32)
GRAM = gram.finalize(gram.update(gram.init(COLUMNS), jnp.asarray(X)))
WHITE = gram.Gram(jnp.diag(jnp.linspace(1, 3, COLUMNS)), jnp.float32(9))
PLAIN = GPTQConfig(act_order="none", range="minmax")
STATIC = GPTQConfig(act_order="static", range="minmax")
DYNAMIC = GPTQConfig(act_order="dynamic", range="minmax")
CONFIGS = {"plain": PLAIN, "static": STATIC, "dynamic": DYNAMIC, "default": GPTQConfig()}

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


def _reference(group: int, *, bits: int, order: np.ndarray, act_order: str, damping: float = 0.01) -> np.ndarray:
    """SPEC 4 column by column in float64, for full-range symmetric integers; no blocks, an explicit inverse."""
    hessian = 2 / len(X) * X.astype(np.float64).T @ X.astype(np.float64)
    hessian = hessian[order][:, order]
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(COLUMNS)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    weight, value = W[:, order].astype(np.float64), np.zeros((ROWS, COLUMNS))
    reach = (2**bits - 1) / 2
    scale = np.ones(ROWS)
    for i in range(COLUMNS):
        if act_order == "static":
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
    ("group", "bits", "block", "act_order"),
    [
        (16, 4, 128, "none"),  # below, at and above the block; ragged, and a block that no group divides
        (32, 3, 32, "none"),
        (50, 4, 7, "none"),
        (37, 4, 128, "none"),
        (160, 4, 128, "none"),
        (32, 3, 128, "static"),
        (50, 4, 32, "static"),
        (32, 3, 128, "dynamic"),
        (50, 4, 32, "dynamic"),
        (160, 4, 128, "dynamic"),
    ],
)
def test_it_is_the_textbook_algorithm(
    group: int, bits: int, block: int, act_order: Literal["none", "static", "dynamic"]
) -> None:
    config = GPTQConfig(act_order=act_order, block=block, range="minmax")
    found = gptq.solve(jnp.asarray(W), GRAM, scheme(f"int{bits}:g{group}"), config=config)
    by_size = np.argsort(-np.asarray(np.diag(GRAM.matrix)), kind="stable")
    order = np.arange(COLUMNS) if act_order == "none" else by_size
    expected = _reference(group, bits=bits, order=order, act_order=act_order)
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


# Every scheme with the default and with another config: compiling all pairs would take minutes.
OTHERS = [(spec, [PLAIN, STATIC, DYNAMIC][index % 3]) for index, spec in enumerate(SCHEMES)]


@pytest.mark.parametrize(("spec", "config"), OTHERS)
def test_output_error_is_below_that_of_rounding(spec: str, config: GPTQConfig) -> None:
    parsed = scheme(spec)
    rounded = quantize(jnp.asarray(W), parsed)
    error = _error(np.asarray(dequantize(rounded)))
    for each in (GPTQConfig(), config):
        found = gptq.solve(jnp.asarray(W), GRAM, parsed, config=each).qtensor
        assert found.scheme == parsed
        if found.groups is None:
            assert found.nbytes == rounded.nbytes
        else:
            assert found.nbytes == rounded.nbytes + 4 * COLUMNS
        assert _error(np.asarray(dequantize(found))) < 0.9 * error


@pytest.mark.slow
def test_searched_ranges_and_orders_help() -> None:
    """On these data each part of the default config pays at 3 bits."""
    error = {
        (order, span): _error(np.asarray(dequantize(_solve_3_bits(GPTQConfig(act_order=order, range=span)))))
        for order in ("none", "static", "dynamic")
        for span in ("minmax", "mse", "output")
    }
    for order in ("none", "static", "dynamic"):
        assert error[order, "mse"] < error[order, "minmax"]
        assert error[order, "output"] < error[order, "minmax"]
    assert error["static", "mse"] < error["none", "mse"]
    assert error["dynamic", "mse"] < error["none", "mse"]


def _solve_3_bits(config: GPTQConfig) -> QTensor:
    return gptq.solve(jnp.asarray(W), GRAM, scheme("int3:g32"), config=config).qtensor


@pytest.mark.parametrize("spec", SCHEMES)
def test_without_correlations_it_is_rounding(spec: str) -> None:
    """With a diagonal H nothing can be made up for: the codes and scales are those of rounding, bit for bit."""
    expected = quantize(jnp.asarray(W), scheme(spec))
    _assert_same(gptq.solve(jnp.asarray(W), WHITE, scheme(spec), config=STATIC).qtensor, expected)


@pytest.mark.parametrize("spec", ["int4:g32", "int2:g50:asym", "nf4:g64:dq", "nvfp4", "int4:b10x32"])
def test_without_correlations_searched_ranges_are_those_of_rtn(spec: str) -> None:
    expected = rtn.solve(jnp.asarray(W), None, scheme(spec), config=rtn.RTNConfig(range="mse")).qtensor
    _assert_same(gptq.solve(jnp.asarray(W), WHITE, scheme(spec), config=GPTQConfig(range="mse")).qtensor, expected)


def test_output_ranges_minimise_the_error_that_columns_make_alone() -> None:
    """Σ H_jj·e_j² of each group, with H diagonal and uneven: no factor of the grid does better."""
    weights = jnp.asarray(np.exp(np.random.default_rng(3).standard_normal(COLUMNS)), jnp.float32)
    spec = scheme("int3:g32")
    uneven = gram.Gram(jnp.diag(weights), jnp.float32(1))
    # An uneven diagonal changes the order; without correlations the order changes nothing.
    q = gptq.solve(jnp.asarray(W), uneven, spec, config=GPTQConfig(act_order="none")).qtensor

    def group_errors(values: np.ndarray) -> np.ndarray:
        return (np.asarray(weights) * (values - W) ** 2).reshape(ROWS, -1, 32).sum(axis=-1)

    found = group_errors(np.asarray(dequantize(q)))
    widest = np.abs(W).reshape(ROWS, -1, 32).max(axis=-1) / 3.5
    for factor in (1.0, 0.9, 0.75, 0.6, 0.5):
        other = group_errors(np.asarray(dequantize(quantize(jnp.asarray(W), spec, scale=jnp.asarray(widest * factor)))))
        assert (found <= other * (1 + 1e-5)).all()


@pytest.mark.parametrize("spec", ["int4:g32", "int2:g50:asym", "nf4:g64:dq", "nvfp4", "int4:b10x32", "int4:channel"])
def test_without_correlations_dynamic_order_is_rounding_in_its_groups(spec: str) -> None:
    found = gptq.solve(jnp.asarray(W), WHITE, scheme(spec), config=DYNAMIC).qtensor
    tile_columns = scheme(spec).tile(ROWS, COLUMNS)[1]
    groups = None
    if tile_columns < COLUMNS:  # in one group the order does not matter
        groups = jnp.zeros(COLUMNS, jnp.int32).at[jnp.arange(COLUMNS)[::-1]].set(jnp.arange(COLUMNS) // tile_columns)
    _assert_same(found, quantize(jnp.asarray(W), scheme(spec), groups=groups))


def _assert_same(found: QTensor, expected: QTensor) -> None:
    """Bit for bit, but for the mean of doubly quantized scales, which compilers sum in an order of their own, and what
    is left of scales without it: they may differ by a unit or two in the last place of the mean."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    loose = 0.0 if expected.stored.offset is None else 2 * float(np.spacing(np.max(np.asarray(expected.stored.offset))))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        summed = ours is found.stored.offset or ours is found.stored.scale2
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=loose if summed else 0)


@pytest.mark.slow
def test_ranges_are_the_same_however_many_are_searched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven groups: all at once, in fours and in twos, the last of which begin a group earlier."""
    rng = np.random.default_rng(0)
    known = gram.finalize(gram.update(gram.init(176), jnp.asarray(rng.standard_normal((300, 176)), jnp.float32)))
    weight, found = jnp.asarray(rng.standard_normal((64, 176)), jnp.float32), []
    for together in (8192, 64 * 5, 64 * 2):
        monkeypatch.setattr(gptq_ranges, "_TILES", together)
        jax.clear_caches()
        found.append(gptq.solve(weight, known, scheme("int4:g16:asym")).qtensor)
    for each in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, each, found[0])


def test_dead_inputs_become_zero() -> None:
    dead = np.isin(np.arange(COLUMNS), [0, 17, 159])
    state = gram.update(gram.init(COLUMNS), jnp.asarray(np.where(dead, 0, X)))
    for config in CONFIGS.values():
        found = gptq.solve(jnp.asarray(W), gram.finalize(state), scheme("int4:g32"), config=config)
        values = np.asarray(dequantize(found.qtensor))
        assert not values[:, dead].any()
        assert np.isfinite(values).all()
        assert float(found.damping) == pytest.approx(0.01)


@pytest.mark.parametrize("size", [1, 128, 300, 513, 1100])
def test_the_cholesky_factor_row_by_row_and_with_one_call(size: int) -> None:
    """Each writes below the diagonal and leaves what is above, so that it can be tried again."""
    rows = np.random.default_rng(size).standard_normal((size + 50, size))
    matrix = rows.T @ rows / len(rows) + 0.01 * np.eye(size)
    expected = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1].T
    above, diagonal = np.triu(matrix, 1).astype(np.float32), np.diagonal(matrix).astype(np.float32)
    for factor in map(jax.jit, (cholesky_below, cholesky._with_one_call)):  # on CPU; elsewhere
        failed = factor(jnp.asarray(above), jnp.asarray(-diagonal))
        assert not np.isfinite(np.diagonal(failed)).all()
        found = factor(failed, jnp.asarray(diagonal))
        np.testing.assert_allclose(np.tril(found), expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(np.triu(found, 1), above)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100, 257])
def test_the_inverse_of_a_triangle(size: int) -> None:
    rows = np.random.default_rng(size).standard_normal((2, 2 * size + 50, size))
    upper = np.linalg.cholesky(np.swapaxes(rows, 1, 2) @ rows / size).swapaxes(1, 2)
    found = cholesky.inverse_upper(jnp.asarray(upper, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(upper), atol=1e-5 * np.abs(np.linalg.inv(upper)).max())
    assert not np.tril(found, -1).any()


def test_damping_is_raised_until_it_helps_and_reported() -> None:
    rank_one = gram.Gram(jnp.outer(jnp.asarray(X[0]), jnp.asarray(X[0])) - 0.5 * jnp.eye(COLUMNS), jnp.float32(1))
    found = gptq.solve(jnp.asarray(W), rank_one, scheme("int4:g32"))
    assert float(found.damping) > 0.05
    assert not bool(found.fallback)
    hopeless = gram.Gram(-jnp.eye(COLUMNS), jnp.float32(1))
    found = gptq.solve(jnp.asarray(W), hopeless, scheme("int4:g32"), config=PLAIN)
    assert bool(found.fallback)
    np.testing.assert_array_equal(dequantize(found.qtensor), dequantize(quantize(jnp.asarray(W), scheme("int4:g32"))))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_factor_in_place_is_the_factor_and_still_has_the_matrix(config: GPTQConfig) -> None:
    expected = gptq.factorize(GRAM, config=config)
    given = gram.Gram(jnp.array(GRAM.matrix), GRAM.rows)
    found = gptq_factor.factorize_in_place(given, config=config)
    assert given.matrix.is_deleted()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    above, diagonal, order = map(np.asarray, found.gram)
    np.testing.assert_array_equal(np.triu(above, 1), np.triu(np.asarray(GRAM.matrix)[order][:, order], 1))
    np.testing.assert_array_equal(diagonal, np.diagonal(GRAM.matrix))
    quantized = quantize(jnp.asarray(W), scheme("int4:g32"))
    reports = [
        layer_programs.errors(jnp.asarray(W), quantized, quantized.scheme, known) for known in (GRAM, found.gram)
    ]
    np.testing.assert_allclose(*reports, rtol=1e-4)


def test_the_matrix_outlives_a_failed_factorization() -> None:
    """The first two dampings fail and overwrite half of it; what the third gives is as if it had been the first."""
    matrix = jnp.outer(jnp.asarray(X[0]), jnp.asarray(X[0])) - 0.5 * jnp.eye(COLUMNS)
    found = gptq_factor.factorize_in_place(gram.Gram(jnp.array(matrix), jnp.float32(1)), config=PLAIN)
    assert float(found.damping) > 0.05
    np.testing.assert_array_equal(np.triu(found.gram.above, 1), np.triu(matrix, 1))
    at_once = gptq.factorize(
        gram.Gram(matrix, jnp.float32(1)), config=dataclasses.replace(PLAIN, damping=float(found.damping))
    )
    np.testing.assert_allclose(np.tril(found.halves), np.tril(at_once.halves), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_wide_layer_is_solved_in_the_memory_of_its_gram_matrix() -> None:
    """Beside matrix and weight: half a matrix for the factor, and two weights and a half for the solution; on CPU, also
    where there is a GPU."""
    rows, columns = 1024, 2048
    known = gram.Gram(_abstract(columns, columns), _abstract())
    for config in (GPTQConfig(), GPTQConfig(act_order="none")):
        with jax.default_device(jax.devices("cpu")[0]), dispatch.override("jnp"):
            programs = gptq.programs(_abstract(rows, columns), known, scheme("int4:g64"), config)
            found, solved = (each.lower().compile().memory_analysis() for each in programs)
        assert found.alias_size_in_bytes == 4 * columns**2
        assert found.temp_size_in_bytes < 4 * columns**2 / 2
        assert solved.temp_size_in_bytes < 2.5 * 4 * rows * columns


def _abstract(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, "float32")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stacked_layers_and_shared_factors(config: GPTQConfig) -> None:
    weights = jnp.stack([jnp.asarray(W), jnp.asarray(W[::-1] * 2)])
    factor = gptq.factorize(GRAM, config=config)
    both = jax.vmap(lambda w: gptq.solve_with(w, factor, scheme("int4:g32"), config=config))(weights)
    for index, weight in enumerate(weights):
        alone = gptq.solve(weight, GRAM, scheme("int4:g32"), config=config)
        stacked = jax.tree.map(lambda leaf, index=index: leaf[index], both.qtensor)
        np.testing.assert_allclose(dequantize(stacked), dequantize(alone.qtensor), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dequantize(both.qtensor)[index], dequantize(alone.qtensor), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_program_is_no_larger_for_more_columns(config: GPTQConfig) -> None:
    """It is traced for 14,336 inputs; nothing is unrolled, or compiling would take minutes."""

    def operations(columns: int) -> int:
        weight: Any = jax.ShapeDtypeStruct((256, columns), jnp.float32)
        square: Any = jax.ShapeDtypeStruct((columns, columns), jnp.float32)
        rows: Any = jax.ShapeDtypeStruct((), jnp.float32)
        traced = gptq.programs(weight, gram.Gram(square, rows), scheme("int4:g128"), config)
        return sum(program.lower().as_text().count(" = ") for program in traced)

    with dispatch.override("jnp"):  # of kernels a span is one, and there are more of them in wider layers
        small, large = operations(2048), operations(14336)
    assert small > 500
    assert large < 1.3 * small


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
