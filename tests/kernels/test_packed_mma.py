"""The packed product for a few rows on Hopper: it is lowered anywhere, and runs where there is such a GPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.formats import Codebook
from jquant.core.qtensor import dequantize, quantize
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.kernels.packed_mma import _job_of, fits, packed_matmul, tiling_of

SPECS = ["int4:g128", "int4:g64:bf16", "int4:g32", "int4:g128:asym", "int4:g32:asym:fp16", "nf4:g64", "nf4:g128:dq"]
SPECS += ["mxfp4", "mxfp8_e4m3", "nvfp4", "int8:channel", "int8:g128:asym", "fp8_e4m3:channel", "fp8_e5m2:g64"]
SPECS += ["int4:channel"]
RAGGED = [("int4:g1024", 1536), ("int4:g1024:asym", 1536), ("int8:g4096", 6656)]  # the last group is shorter


@pytest.mark.parametrize(("spec", "inputs"), RAGGED)
def test_shared_memory_has_a_place_for_every_scale(spec: str, inputs: int) -> None:
    q = quantize(jnp.ones((64, inputs)), scheme(spec))
    tiling = tiling_of(1, q)
    assert tiling is not None
    assert _job_of(q, tiling, 1, jnp.float32).groups == q.scales().shape[1]


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("spec", "inputs"), [*((spec, 2560) for spec in SPECS), *RAGGED])
def test_product(spec: str, inputs: int, batch: int) -> None:
    q = quantize(jax.random.normal(jax.random.key(0), (192, inputs)) ** 3, scheme(spec))
    assert fits(q, batch)
    x = jax.random.normal(jax.random.key(1), (batch, inputs)).astype(jnp.bfloat16)
    if not dispatch.on_hopper():
        traced = jax.jit(packed_matmul).trace(x, q)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
        return
    value = dequantize(q, jnp.float32)
    expected = jnp.matmul(x.astype(jnp.float32), value.T, precision="highest")
    found = jax.jit(packed_matmul)(x, q)
    # Levels of codebooks are rounded to bfloat16 before their products are summed; all others are exact in it.
    error = 4e-3 if isinstance(q.scheme.element, Codebook) else 2e-5
    np.testing.assert_allclose(found, expected, atol=error * float(jnp.max(jnp.abs(expected))))
    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = jax.jit(partial(packed_matmul, dtype=dtype))(x, q)
        np.testing.assert_array_equal(rounded, found.astype(dtype))


@pytest.mark.parametrize("spec", ["int3:g128", "int2:g128", "int4:tensor", "int4:g48", "int4:g16", "q4_0"])
def test_what_does_not_fit(spec: str) -> None:
    assert not fits(quantize(jnp.ones((128, 1536)), scheme(spec)), 1)


def test_few_rows_and_whole_steps() -> None:
    q = quantize(jnp.ones((128, 1024)), scheme("int4:g128"))
    assert [fits(q, rows) for rows in (0, 1, 8, 9)] == [False, True, True, False]
    assert not fits(quantize(jnp.ones((96, 1024)), scheme("int4:g128")), 1)
    assert not fits(quantize(jnp.ones((128, 768)), scheme("int4:g128")), 1)


@pytest.mark.parametrize(("width", "stages"), [(14336, 4), (20480, 3), (28672, None)])
def test_shared_memory_decides_about_stages_and_about_what_fits(width: int, stages: int | None) -> None:
    """Scales of all groups of a row are on chip: of long rows in short groups they leave less, or nothing."""
    q = quantize(jnp.ones((64, width)), scheme("int4:g32"))
    tiling = tiling_of(1, q)
    assert (None if tiling is None else tiling.stages) == stages
    assert fits(q, 1) == (stages is not None)
    if tiling is not None and not dispatch.on_hopper():  # lowering refuses what takes more than there is
        jax.jit(packed_matmul).trace(jnp.ones((1, width), jnp.bfloat16), q).lower(lowering_platforms=("cuda",))
