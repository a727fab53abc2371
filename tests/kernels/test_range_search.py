"""The kernel that searches ranges, against core/range_search.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.calib import gram
from jquant.core.qtensor import dequantize, quantize_with
from jquant.core.range_search import RangeSearch, search_parameters
from jquant.core.scheme import scheme
from jquant.core.tiles import to_tiles
from jquant.kernels import dispatch, range_search
from jquant.kernels.range_search import fits
from jquant.ptq import gptq

INTERPRET = not dispatch.on_cuda()  # on a GPU the kernel itself
KERNEL = "interpret" if INTERPRET else "kernel"

SPECS = [
    "int2:g32",
    "int3:g16:asym",
    "int4:g64",
    "int4:g32:restricted",
    "int8:g32",
    "nf4:g64",
    "fp4_e2m1:g32",
    "fp8_e4m3:g32",
]


@pytest.mark.parametrize("exponent", [2.0, 2.4])
@pytest.mark.parametrize("spec", SPECS)
def test_loses_as_little_as_the_reference(spec: str, exponent: float) -> None:
    chosen, rng = scheme(spec), np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((37, 192)) ** 3, jnp.float32).at[3].set(0)
    importance = jnp.asarray(rng.exponential(size=192), jnp.float32)
    tile_rows, group = chosen.tile(*w.shape)
    assert fits(chosen, group, tile_rows)
    config, tiles = RangeSearch(exponent=exponent), to_tiles(w, chosen)
    weights = importance.reshape(1, 1, -1, group)
    expected = jax.jit(lambda: search_parameters(tiles, chosen, importance=weights, config=config))()
    found = range_search.search_parameters(
        w.T, group, chosen, importance=importance, config=config, interpret=INTERPRET
    )
    same = jnp.abs(found.scale / expected.scale - 1) < 3e-7  # high·p − low·p may be contracted, or not
    assert float(jnp.mean(same)) > 0.97

    def lost(parameters: object) -> jax.Array:
        error = to_tiles(dequantize(quantize_with(w, chosen, parameters)) - w, chosen)  # type: ignore[arg-type]
        return jnp.sum(jnp.abs(error) ** exponent * weights, axis=(-3, -1))

    np.testing.assert_allclose(lost(found), lost(expected), rtol=1e-4, atol=1e-9)


def test_fits() -> None:
    assert fits(scheme("int4:g128"), 128, 1)
    assert not fits(scheme("int4:g128:bf16"), 128, 1)
    assert not fits(scheme("int4:g48"), 48, 1)
    assert not fits(scheme("int4:b8x32"), 32, 8)
    assert not fits(scheme("mxfp4"), 32, 1)


def test_the_solver_with_and_without() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 192)) * np.exp(rng.standard_normal(192))
    known = gram.finalize(gram.update(gram.init(192), jnp.asarray(x, jnp.float32)))
    weight = jnp.asarray(rng.standard_normal((40, 192)), jnp.float32)
    config = gptq.GPTQConfig(block=64)
    factor = gptq.factorize(known, config=config)
    expected = gptq._solve(weight, factor, scheme("int4:g64"), config, "jnp")
    found = gptq._solve(weight, factor, scheme("int4:g64"), config, KERNEL)
    np.testing.assert_array_equal(found.qtensor.scales(), expected.qtensor.scales())
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-2)
