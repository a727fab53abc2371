"""Kernels that TPUs may run are lowered for one, by Pallas's own rules for it; none was there to run them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jquant.core.range_search import RangeSearch
from jquant.core.scheme import scheme
from jquant.kernels.fake_quant import fake_quantize
from jquant.kernels.gptq_block import Block, Kind, Rows, round_block
from jquant.kernels.options import lowering_for_tpu
from jquant.kernels.quantize_rows import quantize_rows
from jquant.kernels.range_search import search_parameters

INT4 = scheme("int4:g128")


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _gradient(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32)))


TILE = _array(128, 512)
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "rows": (partial(fake_quantize, scheme=INT4), (_array(256, 512, dtype=jnp.bfloat16),)),
    "rows backward": (_gradient(partial(fake_quantize, scheme=INT4)), (_array(256, 512, dtype=jnp.bfloat16),)),
    "columns": (partial(fake_quantize, scheme=INT4, axis=-2, dtype=jnp.bfloat16), (_array(512, 256),)),
    "channels": (partial(fake_quantize, scheme=scheme("int8:channel"), axis=-2), (_array(2048, 4096),)),
    "tokens": (partial(quantize_rows, scheme=scheme("int8:token")), (_array(256, 1024, dtype=jnp.bfloat16),)),
    "GPTQ's block": (
        lambda w, *known: round_block(Block([Rows(w)], Rows(w), *known), [Kind(INT4.element, has_zero=False)], [], 128),
        (
            TILE,
            _array(4, 512),
            None,
            _array(1, 128, dtype=jnp.int32),
            _array(128, dtype=jnp.int32),
            _array(128, 128),
            _array(128),
        ),
    ),
    "ranges": (
        lambda columns, weight: search_parameters(columns, 128, INT4, importance=weight, config=RangeSearch()).scale,
        (_array(512, 512), _array(512)),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_lowered_for_a_tpu(name: str) -> None:
    f, operands = CASES[name]
    there = {"platform": "tpu"} if "platform" in inspect.signature(AbstractDevice).parameters else {}
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, **there)
    with lowering_for_tpu(), jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = jax.jit(f).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
