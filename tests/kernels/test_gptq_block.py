"""The kernel of a block of GPTQ's columns, against its reference and against the solver without it."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.calib import gram
from jquant.core.errors import InputError
from jquant.core.formats import ELEMENTS
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.kernels.error_parts import Errors, left_side
from jquant.kernels.gptq_block import Block, Kind, Rows, fits, round_block, round_block_reference
from jquant.ptq import gptq
from jquant.ptq.solver import Solution

INTERPRET = not dispatch.on_cuda()  # on a GPU the kernel itself
KERNEL = "interpret" if INTERPRET else "kernel"


def block_of(kinds: list[Kind], columns: int, out: int) -> Block:
    """Columns of three groups, out of order and another way for each scheme."""
    rng = np.random.default_rng(columns + out)
    rows = len(kinds) * out

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    reach = np.repeat([np.max(np.abs(kind.element.levels())) for kind in kinds], out).astype(np.float32)
    weight = normal(columns, out)
    zeros = [rng.integers(0, 2**kind.element.bits, (3, out)) for kind in kinds]
    return Block(
        columns=[Rows(jnp.concatenate([0 * weight, weight]), 1), Rows(0.1 * normal(columns, rows))],
        weight=Rows(jnp.concatenate([0 * weight, weight]), 1),
        scale=(0.1 + jnp.abs(normal(3, rows))) * 2.5 / reach,
        zero=jnp.asarray(np.concatenate(zeros, axis=1), jnp.float32) if any(k.has_zero for k in kinds) else None,
        number=jnp.asarray(rng.permutation(columns), jnp.int32),
        place=jnp.asarray(rng.integers(0, 3, (len(kinds), columns)), jnp.int32),
        share=0.1 * normal(columns, columns) * (1 - jnp.eye(columns)) + jnp.eye(columns),
        root=1 + jnp.abs(normal(columns)),
    )


def check_against_reference(kinds: list[Kind], columns: int, out: int) -> None:
    block = block_of(kinds, columns, out)
    errors, codes, loss = jax.jit(lambda: round_block_reference(block, kinds))()
    # Among those of other blocks, which stay as they are.
    others = jnp.full((9 * columns, errors.shape[1]), 7, jnp.bfloat16)
    rest = jnp.full((columns + 3, errors.shape[1]), 7, jnp.uint8)
    found = round_block(block, kinds, [Errors(None, 1), Errors(others, 3, 1)], rest, interpret=INTERPRET)
    np.testing.assert_array_equal(found.codes[block.number], codes)
    np.testing.assert_array_equal(found.codes[columns:], rest[columns:])
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5, atol=1e-7)  # (w̃ − q)² of w̃ about 1
    first, among = found.errors
    assert first.whole is not None
    assert among.whole is not None
    whole = sum(each.astype(jnp.float32) for each in first.parts(columns))
    np.testing.assert_allclose(whole, errors, rtol=1e-5, atol=2e-6)  # 16 bits
    np.testing.assert_array_equal(among.whole[3 * columns : 6 * columns], first.whole)
    np.testing.assert_array_equal(jnp.delete(among.whole, slice(3 * columns, 6 * columns), axis=0), 7)
    shares = 0.1 * jax.random.normal(jax.random.key(0), (5, columns))
    product = jax.jit(  # together: XLA leaves out casts to bfloat16 and back, and low parts with them
        lambda shares, right: jnp.matmul(left_side(shares, columns), right, preferred_element_type=jnp.float32)
    )(shares, first.whole)
    np.testing.assert_allclose(product, jnp.matmul(shares, errors, precision="highest"), atol=5e-5)


@pytest.mark.parametrize(
    ("name", "columns", "out", "zero"),
    [
        *((name, 16, 33, False) for name in ELEMENTS),
        *((f"int{bits}", 16, 7, True) for bits in range(2, 9)),
        ("int4", 96, 70, False),
        ("int4", 256, 33, False),
        ("int3", 64, 32, True),
    ],
)
def test_kernel_is_the_reference(name: str, columns: int, out: int, zero: bool) -> None:
    check_against_reference([Kind(ELEMENTS[name], zero)], columns, out)


@pytest.mark.parametrize("out", [32, 33])
def test_schemes_side_by_side_are_the_reference(out: int) -> None:
    names = [("int4", False), ("int3", True), ("nf4", False), ("int4", False), ("int4", True), ("fp8_e4m3", False)]
    check_against_reference([Kind(ELEMENTS[name], zero) for name, zero in names], 32, out)


def test_fits() -> None:
    assert fits(ELEMENTS["int4"], 128)
    assert not fits(ELEMENTS["int4"], 48)
    assert not fits(ELEMENTS["int4"], 8)
    assert not fits(scheme(f"codebook({'/'.join(str(i) for i in range(40))}):g32").element, 128)


@pytest.mark.parametrize(
    ("spec", "act_order"),
    [("int4:g64", "none"), ("int3:g32:asym", "static"), ("nf4:g64", "dynamic"), ("fp8_e4m3:channel", "none")],
)
def test_solver_with_and_without(spec: str, act_order: str) -> None:
    weight, factor, config = problem(act_order)
    expected = gptq._solve(weight, factor, scheme(spec), config, "jnp")
    check_alike(gptq._solve(weight, factor, scheme(spec), config, KERNEL), expected)


@pytest.mark.parametrize("act_order", ["static", pytest.param("none", marks=pytest.mark.slow)])
def test_schemes_solved_together_are_those_solved_alone(act_order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JQUANT_KERNELS", "interpret" if INTERPRET else "auto")
    weight, factor, config = problem(act_order)
    specs = ("int4:g64", "int3:g32:asym", "nf4:g64", "int4:channel", "int3:tensor", "int4:g64", "int4:g16:nested")
    schemes = [scheme(spec) for spec in (*specs, f"codebook({'/'.join(str(i) for i in range(40))}):g32")]
    beside = [each for each in schemes if gptq._stands_beside(each, weight.shape, config, dispatch.way())]
    assert len(beside) == (7 if act_order == "static" else 0)
    for size in (2**29, 3 * weight.size, 1):
        monkeypatch.setattr(gptq, "_TOGETHER", size)
        found = gptq.solve_schemes(weight, factor, schemes, config=config)
        for each, solution in zip(schemes, found, strict=True):
            assert solution.qtensor.scheme == each
            alone = gptq.solve_with(weight, factor, each, config=config)
            check_alike(solution, alone)
            jax.tree.map(np.testing.assert_array_equal, solution.qtensor.stored, alone.qtensor.stored)


def test_a_stack_of_layers_and_several_blocks_to_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JQUANT_KERNELS", "interpret" if INTERPRET else "auto")
    weight, factor, config = problem("static")
    config = dataclasses.replace(config, block=16)  # four spans
    alone = [gptq.solve_with(each, factor, scheme("int4:g64"), config=config) for each in (weight, 2 * weight[::-1])]
    stack = jnp.stack([weight, 2 * weight[::-1]])
    solve = partial(gptq.solve_with, scheme=scheme("int4:g64"), config=config)
    found = jax.vmap(solve, in_axes=(0, None))(stack, factor)
    for index, each in enumerate(alone):
        check_alike(jax.tree.map(lambda x, index=index: x[index], found), each)
    check_alike(alone[0], gptq._solve(weight, factor, scheme("int4:g64"), config, "jnp"))


@pytest.mark.parametrize("block", [24, 320])
def test_any_block_length(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JQUANT_KERNELS", "interpret" if INTERPRET else "auto")
    weight, factor, config = problem("static")
    config = dataclasses.replace(config, block=block)
    schemes = [scheme("int4:g64"), scheme("int3:g64")]
    for each, found in zip(schemes, gptq.solve_schemes(weight, factor, schemes, config=config), strict=True):
        check_alike(found, gptq._solve(weight, factor, each, config, "jnp"))


def test_a_scheme_among_several_is_refused_by_name() -> None:
    weight, factor, config = problem("static")
    with pytest.raises(InputError, match="q4_k"):
        gptq.solve_schemes(weight, factor, [scheme("int4:g64"), scheme("q4_k")], config=config)


def test_a_row_does_not_depend_on_others() -> None:
    kinds = [Kind(ELEMENTS["int4"], has_zero=False)]
    block = block_of(kinds, 32, 40)
    whole = round_block(block, kinds, [], 32, interpret=INTERPRET)
    part = jax.tree.map(lambda x: x[:, :5] if jnp.ndim(x) and x.shape[-1] == 40 else x, block)
    first = round_block(part, kinds, [], 32, interpret=INTERPRET)
    np.testing.assert_array_equal(whole.codes[:, :5], first.codes)


def problem(act_order: str) -> tuple[jax.Array, gptq.Factor, gptq.GPTQConfig]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 200)) * np.exp(rng.standard_normal(200))
    known = gram.finalize(gram.update(gram.init(200), jnp.asarray(x, jnp.float32)))
    weight = jnp.asarray(rng.standard_normal((40, 200)), jnp.float32)
    config = gptq.GPTQConfig(act_order=act_order, block=64, range="minmax")  # type: ignore[arg-type]
    return weight, gptq.factorize(known, config=config), config


def check_alike(found: Solution, expected: Solution) -> None:
    # Sums are taken in another order, and of 16 bits: a code at a tie may differ, and then all after it.
    assert float(jnp.mean(found.qtensor.codes() != expected.qtensor.codes())) < 0.01
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-2)


def test_dispatch_says_how_the_solver_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.way() == ("jnp" if INTERPRET else "kernel")
    monkeypatch.setenv("JQUANT_KERNELS", "interpret")
    assert dispatch.way() == "interpret"
    monkeypatch.setenv("JQUANT_KERNELS", "jnp")
    assert dispatch.way() == "jnp"
