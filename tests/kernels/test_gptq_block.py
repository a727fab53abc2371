"""The kernel of a block of GPTQ's columns, against its reference and against the solver without it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.calib import gram
from jquant.core.formats import ELEMENTS, Element
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.kernels.gptq_block import Block, fits, round_block, round_block_reference
from jquant.ptq import gptq

INTERPRET = not dispatch.on_cuda()  # on a GPU the kernel itself
KERNEL = "interpret" if INTERPRET else "kernel"


def block_of(element: Element, columns: int, rows: int, *, zero: bool = False) -> Block:
    rng = np.random.default_rng(columns + rows)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    reach = float(np.max(np.abs(element.levels())))
    weight = normal(columns, rows)
    return Block(
        columns=weight + 0.1 * normal(columns, rows),
        weight=weight,
        scale=(0.1 + jnp.abs(normal(columns, rows))) * 2.5 / reach,
        zero=jnp.asarray(rng.integers(0, 2**element.bits, (columns, rows)), jnp.float32) if zero else None,
        share=jnp.triu(0.1 * normal(columns, columns), 1) + jnp.eye(columns),
        root=1 + jnp.abs(normal(columns)),
    )


@pytest.mark.parametrize(
    ("name", "columns", "rows", "zero"),
    [
        *((name, 16, 33, False) for name in ELEMENTS),
        *((f"int{bits}", 16, 7, True) for bits in range(2, 9)),
        ("int4", 128, 70, False),
        ("int3", 64, 32, True),
    ],
)
def test_kernel_is_the_reference(name: str, columns: int, rows: int, zero: bool) -> None:
    element = ELEMENTS[name]
    block = block_of(element, columns, rows, zero=zero)
    expected = jax.jit(round_block_reference, static_argnums=1)(block, element)
    found = round_block(block, element, interpret=INTERPRET)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_allclose(found.errors, expected.errors, atol=2e-6)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)


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
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 200)) * np.exp(rng.standard_normal(200))
    known = gram.finalize(gram.update(gram.init(200), jnp.asarray(x, jnp.float32)))
    weight = jnp.asarray(rng.standard_normal((40, 200)), jnp.float32)
    config = gptq.GPTQConfig(act_order=act_order, block=64, range="minmax")  # type: ignore[arg-type]
    expected = gptq.solve(weight, known, scheme(spec), config=config)
    factor = gptq.factorize(known, config=config)
    found = gptq._solve(weight, factor, scheme(spec), config, KERNEL)
    # Sums are taken in another order: a code at a tie may differ, and then all after it.
    assert float(jnp.mean(found.qtensor.codes() != expected.qtensor.codes())) < 0.01
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-2)


def test_a_row_does_not_depend_on_others() -> None:
    element = ELEMENTS["int4"]
    block = block_of(element, 32, 40)
    whole = round_block(block, element, interpret=INTERPRET)
    part = jax.tree.map(lambda x: x[:, :5] if x.shape[-1] == 40 else x, block)
    first = round_block(part, element, interpret=INTERPRET)
    np.testing.assert_array_equal(whole.codes[:, :5], first.codes)


def test_dispatch_says_how_the_solver_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.way() == ("jnp" if INTERPRET else "kernel")
    monkeypatch.setenv("JQUANT_KERNELS", "interpret")
    assert dispatch.way() == "interpret"
    monkeypatch.setenv("JQUANT_KERNELS", "jnp")
    assert dispatch.way() == "jnp"
