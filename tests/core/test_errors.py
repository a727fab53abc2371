"""Mistakes of the caller: each error says what was given, what is allowed, and the fix."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jquant.core.errors import InputError
from jquant.core.formats import Codebook, Int
from jquant.core.qtensor import dequantize, quantize
from jquant.core.scheme import scheme


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown element ''"),
        ("int9:g32", "unknown element 'int9'"),
        ("int4:q3", "unknown part 'q3'"),
        ("int4:g0", "group size 0"),
        ("int4:g-8", "group size -8"),
        ("int4:g", "unknown part 'g'"),
        ("int4:b0x8", "block b0x8"),
        ("int4:g32:g64", "both give the granularity"),
        ("int4:g32:fp16:bf16", "both give the scale"),
        ("int4:asym:restricted", "both give the convention"),
        ("fp8_e4m3:asym", "only int2 … int8"),
        ("fp8_e4m3:restricted", "is for integers"),
        ("int4:asym:e8m0", "a zero point with scales in e8m0"),
        ("nf4:e8m0", "a codebook has no exponent"),
        ("codebook(1/0):g8", "ascending"),
        ("codebook(0):g8", "1 levels"),
        ("codebook(a/b):g8", "numbers with slashes"),
        ("codebook(0/inf):g8", "finite"),
        ("q4_k:g32", "q4_k fixes its blocks and scales: drop 'g32'"),
        ("iq4_nl:bf16", "iq4_nl fixes its blocks"),
    ],
)
def test_malformed_schemes(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        scheme(spec)


def test_formats_out_of_range() -> None:
    with pytest.raises(InputError, match="int2 to int8"):
        Int(1)
    with pytest.raises(InputError, match="2 to 256"):
        Codebook(tuple(float(i) for i in range(257)))


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize(
    ("shape", "dtype", "spec", "message"),
    [
        ((8, 16), "float32", "int4:g32", r"group size 32 is wider than the row of 16: use g16"),
        ((8, 16), "float32", "int4:b16x16", r"block b16x16 is larger than the matrix 8×16"),
        ((8, 16), "int32", "int4", "only floats"),
        ((16,), "float32", "int4", r"needs a non-empty \[..., out, in\]"),
        ((0, 16), "float32", "int4", "non-empty"),
    ],
)
def test_arrays_that_do_not_fit(shape: tuple[int, ...], dtype: str, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(jnp.ones(shape, dtype), scheme(spec))


@pytest.mark.usefixtures("annotations_unchecked")
def test_given_scales_must_fit() -> None:
    x = jnp.ones((4, 64))
    with pytest.raises(InputError, match=r"they must be \(4, 2\)"):
        quantize(x, scheme("int4:g32"), scale=jnp.ones((4, 3)))
    with pytest.raises(InputError, match="needs a zero point"):
        quantize(x, scheme("int4:g32:asym"), scale=jnp.ones((4, 2)))
    with pytest.raises(InputError, match="has no zero point"):
        quantize(x, scheme("int4:g32"), scale=jnp.ones((4, 2)), zero_point=jnp.ones((4, 2)))
    with pytest.raises(InputError, match="parse it first"):
        quantize(x, "int4:g32")  # type: ignore[arg-type]


def test_given_zero_points_are_codes() -> None:
    x, parsed, scale = jnp.full((1, 32), 0.3), scheme("int4:g32:asym"), jnp.full((1, 1), 0.3)
    for given, stored in ((20.0, 15), (7.4, 7), (-1.0, 0)):
        q = quantize(x, parsed, scale=scale, zero_point=jnp.full((1, 1), given))
        zero = q.zero_points()
        assert zero is not None
        assert int(zero[0, 0]) == stored
        assert bool(jnp.allclose(dequantize(q), 0.3 if stored < 15 else 0.0))
