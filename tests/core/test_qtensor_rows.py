"""Rows of packed tensors: what is taken decodes to the same, what is joined is what it was taken from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.qtensor_rows import join_rows, take_rows
from jquant.core.scheme import Scheme, Tensor, scheme
from tests.cases import SCHEMES
from tests.jitted import dequantize, quantize

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 512)), jnp.float32)  # the shape of a law: compiled once


def _has_rows(s: Scheme) -> bool:
    """Whether each row is decoded with scales of its own, or with one of the whole matrix."""
    if s.block is not None or isinstance(s.granularity, Tensor):
        return True
    return s.tile(*X.shape)[0] == 1 and s.scale.name != "dq"


@pytest.mark.parametrize("spec", SCHEMES)
def test_rows_taken_decode_to_the_same_and_joined_are_the_same_bytes(spec: str) -> None:
    s = scheme(spec)
    q = quantize(X, s)
    order = np.random.default_rng(1).permutation(32)[:20]
    if not _has_rows(s):
        with pytest.raises(InputError, match="cannot be taken apart or joined"):
            take_rows(q, order)
        with pytest.raises(InputError, match=r"cannot be taken apart or joined|scales of a whole matrix"):
            join_rows([q, q])
        return
    taken = take_rows(q, order)
    assert taken.shape == (20, 512)
    np.testing.assert_array_equal(np.asarray(dequantize(taken)), np.asarray(dequantize(q))[order])
    _assert_same(join_rows([take_rows(q, np.arange(0, 17)), take_rows(q, np.arange(17, 32))]), q)


def test_act_order_is_kept() -> None:
    groups = np.random.default_rng(2).permutation(np.repeat(np.arange(16), 32))
    q = quantize(X, scheme("int4:g32"), groups=jnp.asarray(groups))
    taken = take_rows(q, np.arange(10, 20))
    np.testing.assert_array_equal(np.asarray(dequantize(taken)), np.asarray(dequantize(q))[10:20])
    _assert_same(join_rows([take_rows(q, np.arange(10)), take_rows(q, np.arange(10, 32))]), q)


def test_what_does_not_fit_together_is_refused() -> None:
    a, b = quantize(X, scheme("int4:g32")), quantize(X, scheme("int4:g64"))
    with pytest.raises(InputError, match="int4:g32 and int4:g64 cannot be joined"):
        join_rows([a, b])
    with pytest.raises(InputError, match="differ between the parts"):
        join_rows([quantize(X, scheme("int8:tensor")), quantize(2 * X, scheme("int8:tensor"))])
    with pytest.raises(InputError, match="differ between the parts"):
        join_rows([quantize(X, scheme("nvfp4")), quantize(2 * X, scheme("nvfp4"))])
    with pytest.raises(InputError, match="without act-order"):
        join_rows([a, quantize(X, scheme("int4:g32"), groups=jnp.repeat(jnp.arange(16), 32)[::-1])])


def _assert_same(a: QTensor, b: QTensor) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for mine, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
