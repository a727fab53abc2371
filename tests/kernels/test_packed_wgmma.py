"""The packed product on Hopper's tensor cores: it is lowered anywhere, and runs where there is such a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.formats import Codebook
from jquant.core.qtensor import dequantize, quantize
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.kernels.packed_wgmma import bytes_of_scales, fits, packed_matmul, permuted, tiling_of

SPECS = ["int4:g128", "int4:g64", "int4:g32", "int4:g128:asym", "int4:g32:asym", "nf4:g64", "mxfp4", "nvfp4"]
SPECS += ["int8:channel", "fp8_e4m3:channel", "int8:g128", "int4:channel"]


@pytest.mark.parametrize("batch", [1, 16, 40, 128, 200, 300])
@pytest.mark.parametrize("spec", SPECS)
def test_product(spec: str, batch: int) -> None:
    w = jax.random.normal(jax.random.key(0), (256, 1024)) ** 3
    q = quantize(w, scheme(spec))
    if not fits(q, batch):
        assert q.scheme.tile(*q.matrix_shape)[1] < 64 or (q.zero_planes is not None and batch > 256)
        return
    x = jax.random.normal(jax.random.key(1), (batch, 1024)).astype(jnp.bfloat16)
    if not dispatch.on_hopper():
        traced = jax.jit(packed_matmul).trace(x, q)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
        return
    tiling = tiling_of(batch, q)
    # Scaled weights are rounded as decoded ones are; those with scales of a byte are exact, and g comes after the sums.
    rounded = tiling.scale_first and bytes_of_scales(q, tiling) is None
    value = dequantize(q, jnp.bfloat16 if rounded else jnp.float32).astype(jnp.float32)
    expected = jnp.matmul(x.astype(jnp.float32), value.T, precision="highest")
    found = jax.jit(packed_matmul)(x, q)
    # Levels of codebooks are rounded to bfloat16 before their products are summed; all others are exact in it.
    error = 4e-3 if isinstance(q.scheme.element, Codebook) else 2e-5
    np.testing.assert_allclose(found, expected, atol=error * float(jnp.max(jnp.abs(expected))))


def test_order_of_x() -> None:
    """Of four-bit codes: the even inputs of a block first, a thread's eight side by side in them."""
    order = permuted(jnp.arange(64, dtype=jnp.float32)[None].astype(jnp.bfloat16), 2)[0].astype(int)
    assert order[:16].tolist() == [0, 2, 8, 10, 16, 18, 24, 26, 4, 6, 12, 14, 20, 22, 28, 30]
    assert sorted(order.tolist()) == list(range(64))


def test_order_of_x_for_levels_of_whole_bytes() -> None:
    """Both codes of a byte side by side; few rows are gathered, many transposed, to the same."""
    x = jnp.arange(32 * 128, dtype=jnp.float32).reshape(32, 128).astype(jnp.bfloat16)
    many = permuted(x, 2, by_byte=True)
    np.testing.assert_array_equal(permuted(x[:16], 2, by_byte=True), many[:16])
    order = many[0].astype(int).tolist()
    assert order[:16] == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]
    assert sorted(order) == list(range(128))


@pytest.mark.parametrize("spec", ["int3:g128", "int2:g128", "int4:tensor", "int4:g48", "q4_0"])
def test_what_does_not_fit(spec: str) -> None:
    assert not fits(quantize(jnp.ones((128, 1536)), scheme(spec)))
