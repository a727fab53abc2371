"""Laws that every scheme obeys, and a few that pin single formats."""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jquant.core import packing
from jquant.core.division import whole_ratio
from jquant.core.formats import ELEMENTS, Codebook, Int
from jquant.core.metrics import error_metrics, error_sums, summarize
from jquant.core.qtensor import dequantize, quantize, stored_bytes
from jquant.core.scales import DoubleQuantizedScale, NestedScale
from jquant.core.scheme import Tensor, scheme
from jquant.core.ste import Keep, bounds, clipped_ste, fake_quantize, ste
from jquant.core.tiles import from_tiles, spread, to_tiles
from tests.cases import BLOCK_SCHEMES, SCHEMES

ROWS, COLUMNS = 24, 160
WITH_SCALES = tuple(spec for spec in SCHEMES if spec not in BLOCK_SCHEMES)
_quantize = jax.jit(quantize, static_argnames="scheme")
_dequantize = jax.jit(dequantize)
_fake = jax.jit(fake_quantize, static_argnames=("scheme", "gradient"))


def _weights(*shape: int, seed: int = 0) -> jax.Array:
    """Normal values with outliers, a zero row and a constant one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    x *= np.where(rng.random(shape) < 0.01, 20, 1).astype(np.float32)
    x[..., 3, :], x[..., 5, :] = 0, 0.7
    return jnp.asarray(x)


def _same(a: object, b: object) -> bool:
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(left) == len(right) and all(
        x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
        for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31, 64, 100])
def test_unpack_undoes_pack_and_planes_are_dense(bits: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(0, 2**bits, (3, 5, count), np.uint8)
    planes = packing.pack(jnp.asarray(codes), bits)
    assert np.array_equal(packing.unpack(planes, bits, count), codes)
    assert sum(plane.shape[-1] for plane in planes) == packing.packed_bytes(bits, count)
    assert packing.packed_bytes(bits, 64) == 8 * bits


@pytest.mark.parametrize("spec", SCHEMES)
def test_spec_strings_round_trip(spec: str) -> None:
    assert scheme(str(scheme(spec))) == scheme(spec)
    assert hash(scheme(spec)) == hash(scheme(str(scheme(spec))))


@pytest.mark.parametrize("spec", SCHEMES)
def test_fake_quantize_jit_eager_and_stacks_agree_bit_for_bit(spec: str) -> None:
    x, parsed = _weights(2, ROWS, COLUMNS), scheme(spec)
    q = _quantize(x, scheme=parsed)
    value = _dequantize(q)
    assert _same(value, _fake(x, scheme=parsed))
    assert _same(q, quantize(x, parsed))
    assert _same(value, dequantize(q))
    single = [_quantize(each, scheme=parsed) for each in x]
    mapped = jax.jit(jax.vmap(partial(quantize, scheme=parsed)))(x)
    for index, alone in enumerate(single):
        assert _same(jax.tree.map(lambda leaf, i=index: leaf[i], q), alone)
        assert _same(jax.tree.map(lambda leaf, i=index: leaf[i], mapped), alone)
    assert q.shape == x.shape
    assert value.dtype == x.dtype


@pytest.mark.parametrize("spec", SCHEMES)
def test_bytes_reported_are_bytes_held(spec: str) -> None:
    parsed = scheme(spec)
    q = _quantize(_weights(ROWS, COLUMNS), scheme=parsed)
    assert q.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q)) == stored_bytes(parsed, (ROWS, COLUMNS))
    if not isinstance(parsed.granularity, Tensor):
        assert stored_bytes(parsed, (2400, 24000)) * 8 / (2400 * 24000) == pytest.approx(
            parsed.bits_per_weight, rel=0.02
        )


@pytest.mark.parametrize("spec", [s for s in WITH_SCALES if not s.startswith("codebook") and ":dq" not in s])
def test_error_within_half_a_local_step(spec: str) -> None:
    """In scaled units, what is inside the levels' range moves to the nearest level: by half the gap at most."""
    x, parsed = _weights(ROWS, COLUMNS), scheme(spec)
    q = _quantize(x, scheme=parsed)
    scale = _per_element(q.scales(), parsed, x.shape).astype(np.float64)
    y = np.asarray(x, np.float64) / scale
    got = np.asarray(_dequantize(q), np.float64) / scale
    levels = parsed.element.levels().astype(np.float64)
    zero = q.zero_points()
    if zero is not None:
        z = _per_element(zero, parsed, x.shape).astype(np.float64)
        assert isinstance(parsed.element, Int)
        low, high = -z, parsed.element.highest_code - z
        half = np.full_like(y, 0.5)
    else:
        low, high = levels[0], levels[-1]
        right = np.clip(np.searchsorted(levels, y), 1, len(levels) - 1)
        half = (levels[right] - levels[right - 1]) / 2
    inside = (y >= low) & (y <= high)
    assert np.all(np.abs(got - y)[inside] <= half[inside] * (1 + 1e-5) + 1e-6)
    clipped = np.where(y < low, low, high)
    assert np.allclose(got[~inside], np.broadcast_to(clipped, y.shape)[~inside], atol=1e-5)


def _per_element(per_tile: jax.Array, parsed: object, shape: tuple[int, ...]) -> np.ndarray:
    """float32, of the given shape."""

    def spread_out(per_tile: jax.Array) -> jax.Array:
        tiles = to_tiles(jnp.zeros(shape), parsed)  # type: ignore[arg-type]
        return from_tiles(jnp.broadcast_to(spread(per_tile), tiles.shape), (shape[-2], shape[-1]))

    return np.asarray(jax.jit(spread_out)(jnp.asarray(per_tile, jnp.float32)))


@pytest.mark.parametrize("spec", WITH_SCALES)
def test_idempotent_given_the_scales(spec: str) -> None:
    parsed = scheme(spec)
    if isinstance(parsed.scale, DoubleQuantizedScale):
        return  # codes are found with scales that are not stored (bitsandbytes): those read back differ from them
    q = _quantize(_weights(ROWS, COLUMNS), scheme=parsed)
    value = _dequantize(q)
    again = _quantize(value, scheme=parsed, scale=q.scales(), zero_point=q.zero_points())
    if isinstance(parsed.scale, NestedScale):  # g is found anew from the scales: the last bit may differ
        assert np.allclose(_dequantize(again), value, rtol=1e-6)
        assert np.array_equal(again.codes(), q.codes())
    else:
        # −0 and a clipped −0 both read back as what they are: values, not codes, must agree.
        assert np.array_equal(_dequantize(again), value)


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_round_to_the_nearest_level(name: str) -> None:
    element = ELEMENTS[name]
    levels = element.levels().astype(np.float64)
    top = levels[-1]
    y = np.concatenate([np.random.default_rng(0).uniform(-1.2 * top, 1.2 * top, 4000), levels]).astype(np.float32)
    codes = element.encode(jnp.asarray(y))
    value = np.asarray(element.decode(codes))
    assert _same(element.round(jnp.asarray(y)), element.decode(codes))
    nearest = levels[np.argmin(np.abs(y.astype(np.float64)[:, None] - levels), axis=1)]
    distance = np.abs(value - y.astype(np.float64))
    assert np.all(distance <= np.abs(nearest - y.astype(np.float64)) + 1e-12)
    assert int(np.asarray(codes).max()) < 2**element.bits


@pytest.mark.parametrize("size", [2, 3, 16, 33, 200, 256])
def test_codebooks_of_any_size(size: int) -> None:
    rng = np.random.default_rng(size)
    levels = np.unique(rng.standard_normal(size).astype(np.float32))
    book = Codebook(tuple(float(v) for v in levels))
    y = rng.standard_normal(2000).astype(np.float32)
    codes = np.asarray(book.encode(jnp.asarray(y)))
    best = np.argmin(np.abs(y.astype(np.float64)[:, None] - levels), axis=1)
    assert np.array_equal(np.abs(levels[codes] - y), np.abs(levels[best] - y))
    assert np.array_equal(book.decode(jnp.asarray(codes)), levels[codes])


@pytest.mark.parametrize("spec", SCHEMES)
def test_sharded_equals_unsharded(spec: str) -> None:
    parsed = scheme(spec)
    x = jax.device_put(_weights(32, 512), jax.devices("cpu")[0])
    expected = _quantize(x, scheme=parsed)
    mesh = Mesh(np.asarray(jax.devices("cpu")[:8]).reshape(4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    spread_out = _quantize(jax.device_put(x, sharding), scheme=parsed)
    if isinstance(parsed.scale, DoubleQuantizedScale):  # the mean is summed in another order
        assert np.allclose(_dequantize(spread_out), _dequantize(expected), rtol=1e-5, atol=1e-6)
    else:
        assert _same(spread_out, expected)


@pytest.mark.parametrize("spec", SCHEMES)
def test_zero_tiny_and_huge_groups_stay_finite(spec: str) -> None:
    x = np.zeros((ROWS, COLUMNS), np.float32)
    x[0], x[1], x[2], x[3] = 1e-45, 1e-38, 1e-30, 1e30
    x[4, ::2] = -1e-37
    parsed = scheme(spec)
    q = _quantize(jnp.asarray(x), scheme=parsed)
    value = np.asarray(_dequantize(q))
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(np.asarray(q.scales())))
    has_zero = parsed.zero_point == "integer" or 0.0 in parsed.element.levels()
    if has_zero:
        assert np.all(value[8:] == 0)
        zeros = _quantize(jnp.zeros((ROWS, COLUMNS)), scheme=parsed)
        assert np.all(np.asarray(_dequantize(zeros)) == 0)
        if spec in WITH_SCALES and not isinstance(parsed.scale, DoubleQuantizedScale):
            assert np.all(np.asarray(zeros.scales()) == 1)
    gradient = jax.jit(jax.grad(lambda x: fake_quantize(x, parsed).sum()))(jnp.asarray(x))
    assert np.all(np.isfinite(gradient))


_SEEN = ("int4:g32", "int4:g32:asym", "mxfp4", "nvfp4", "nf4:g32", "fp8_e4m3", "nf4:g64:dq")


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
@pytest.mark.parametrize("spec", [*_SEEN, "q4_0", "q8_0", "q4_k", "q6_k", "iq4_nl"])
def test_an_infinity_is_not_hidden(spec: str, bad: float) -> None:
    x = _weights(ROWS, COLUMNS).at[7, 40].set(bad)
    assert not np.all(np.isfinite(np.asarray(_dequantize(_quantize(x, scheme=scheme(spec))))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_keep_their_dtype(dtype: jnp.dtype) -> None:
    x = _weights(ROWS, COLUMNS).astype(dtype)
    q = quantize(x, scheme("int4:g32"))
    assert q.dtype == dtype
    assert dequantize(q).dtype == dtype
    assert dequantize(q, jnp.float32).dtype == jnp.float32
    assert _same(dequantize(q), fake_quantize(x, scheme("int4:g32")))


@pytest.mark.parametrize("keep", ["mask", "input"])
@pytest.mark.parametrize("spec", ["int4:g32", "int4:g32:restricted", "int4:g32:asym", "int2:channel:asym"])
def test_gradient_is_one_where_codes_were_not_clipped(spec: str, keep: Keep) -> None:
    """SPEC 8, in numpy: the clip range is that of the same codes, zero point included."""
    x, parsed = _weights(ROWS, COLUMNS), scheme(spec)
    q = _quantize(x, scheme=parsed)
    scale = _per_element(q.scales(), parsed, x.shape)
    zero = q.zero_points()
    z = 2 ** (parsed.element.bits - 1) if zero is None else _per_element(zero, parsed, x.shape)
    code = np.rint(np.asarray(x) / scale) + z
    low = 1 if "restricted" in spec else 0
    expected = ((code >= low) & (code <= 2**parsed.element.bits - 1)).astype(np.float32)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape).astype(np.float32))

    def loss(x: jax.Array, rule: object) -> jax.Array:
        return jnp.sum(weight * fake_quantize(x, parsed, gradient=rule, keep=keep))  # type: ignore[arg-type]

    assert np.array_equal(jax.jit(jax.grad(loss), static_argnums=1)(x, clipped_ste), expected * weight)
    assert np.array_equal(jax.jit(jax.grad(loss), static_argnums=1)(x, ste), weight)
    if spec == "int4:g32":
        assert 0 < expected.mean() < 1  # +amax of each group is clipped by the full-range convention


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", [None, 0, 1, 2])
@pytest.mark.parametrize("convention", ["full", "restricted"])
def test_bounds_are_where_codes_begin_to_be_clipped(bits: int, zero: int | None, convention: str) -> None:
    """Against the division of each element, at the floats around both ends of a range."""
    element = Int(bits, convention)  # type: ignore[arg-type]
    rng = np.random.default_rng(bits)
    scale = jnp.asarray(np.exp(rng.uniform(-80, 80, 500)).astype(np.float32))
    z = None if zero is None else jnp.full_like(scale, zero * (2**bits - 1) / 2).round()
    low, high = bounds(element, scale, z)
    assert np.all((np.asarray(low) < 0) & (np.asarray(high) > 0))
    for end in (low, high):
        near = jax.lax.bitcast_convert_type(end, jnp.int32) + jnp.arange(-40, 41)[:, None]
        x = jax.lax.bitcast_convert_type(near, jnp.float32)
        assert np.array_equal((x >= low) & (x <= high), element.holds(whole_ratio(x, scale), z))


@pytest.mark.parametrize(
    "spec", ["int8:g32", "int4:g32:asym", "int4:tensor", "int4:b8x8", "nf4:g32:dq", "nvfp4", "q4_0"]
)
def test_inputs_may_lie_along_the_first_axis(spec: str) -> None:
    """Values and gradients of axis −2 are those of the matrix turned, ragged tiles included."""
    parsed = scheme(spec)
    x, ct = _weights(ROWS, COLUMNS), _weights(ROWS, COLUMNS, seed=1)
    for keep in get_args(Keep):
        expected, pull = jax.vjp(partial(fake_quantize, scheme=parsed, keep=keep), x)
        found, pull_turned = jax.vjp(partial(fake_quantize, scheme=parsed, keep=keep, axis=-2), x.T)
        assert np.array_equal(found.T, expected)
        assert np.array_equal(pull_turned(ct.T)[0].T, pull(ct)[0])


def test_gradient_of_floats_and_codebooks_stops_beyond_the_last_level() -> None:
    y = jnp.asarray([[0.0, 6.4, -6.4, 7.1, -7.1, 1.0]])
    assert np.array_equal(ELEMENTS["fp4_e2m1"].in_range(y), [[True, True, True, False, False, True]])
    assert np.array_equal(ELEMENTS["nf4"].in_range(y / 6), [[True, False, False, False, False, True]])


def test_gradient_under_vmap_equals_loop() -> None:
    x, parsed = _weights(3, ROWS, COLUMNS), scheme("int4:g32")
    one = jax.grad(lambda x: jnp.sum(fake_quantize(x, parsed) ** 2))
    assert np.array_equal(jax.vmap(one)(x), jnp.stack([one(each) for each in x]))


def test_no_second_compilation() -> None:
    traces = 0

    @partial(jax.jit, static_argnames="scheme")
    def counted(x: jax.Array, scheme: object) -> object:
        nonlocal traces
        traces += 1
        return quantize(x, scheme)  # type: ignore[arg-type]

    for seed in range(3):
        counted(_weights(ROWS, COLUMNS, seed=seed), scheme=scheme("int4:g32"))
    assert traces == 1


def test_metrics_against_numpy() -> None:
    x = _weights(ROWS, COLUMNS)
    q = quantize(x, scheme("int4:g32"))
    a, b = np.asarray(x, np.float64), np.asarray(dequantize(q), np.float64)
    found = error_metrics(x, q)
    assert found.mse == pytest.approx(np.mean((a - b) ** 2), rel=1e-5)
    assert found.mae == pytest.approx(np.mean(np.abs(a - b)), rel=1e-5)
    assert found.max_error == pytest.approx(np.max(np.abs(a - b)), rel=1e-6)
    assert found.sqnr_db == pytest.approx(10 * np.log10(np.sum(a**2) / np.sum((a - b) ** 2)), abs=1e-4)
    assert found.cosine == pytest.approx(np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2)), rel=1e-6)
    pooled = summarize(error_sums(x[:8], dequantize(q)[:8]), error_sums(x[8:], dequantize(q)[8:]))
    assert pooled == pytest.approx(found, rel=1e-5)
    assert error_metrics(x, x).sqnr_db == np.inf
