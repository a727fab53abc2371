"""LSQ and PACT: forward the bits of `quantize`, backward what autodiff makes of the straight-through form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.learned_scale import fake_quantize_learned, lsq_gradient_scale, lsq_initial_scale
from jquant.core.pact import pact, pact_parameters
from jquant.core.scheme import scheme
from tests.cases import SCHEMES
from tests.jitted import dequantize, quantize

LEARNABLE = [spec for spec in SCHEMES if scheme(spec).block is None]
INTEGERS = ["int2:g32", "int3:g50", "int4:channel:restricted", "int4:b8x32", "int4:g32:asym", "int8:tensor:asym"]


def sample(rows: int = 24, columns: int = 100, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, columns)) * 0.7


def tile_shape(spec: str, x: jax.Array) -> tuple[int, int]:
    rows, columns = scheme(spec).tile(*x.shape)
    return -(-x.shape[0] // rows), -(-x.shape[1] // columns)


def parameters(spec: str, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scales that clip some values, and zero points that are not whole."""
    shape = tile_shape(spec, x)
    levels = np.abs(scheme(spec).element.levels()).max()  # pyright: ignore[reportAttributeAccessIssue]
    scale = jax.random.uniform(jax.random.key(1), shape, minval=0.8, maxval=1.6) / levels
    if scheme(spec).zero_point != "integer":
        return scale, None
    codes = 2 ** scheme(spec).element.bits - 1
    return 3 * scale / 2, jax.random.uniform(jax.random.key(2), shape, minval=0.2, maxval=0.6) * codes


@pytest.mark.parametrize("spec", LEARNABLE)
def test_forward_is_quantize_with_the_scales(spec: str) -> None:
    x = sample()
    scale, zero = parameters(spec, x)
    fake = jax.jit(lambda x, s, z: fake_quantize_learned(x, s, scheme(spec), zero_point=z))(x, scale, zero)
    packed = jax.jit(lambda x, s, z: dequantize(quantize(x, scheme(spec), scale=s, zero_point=z)))(x, scale, zero)
    np.testing.assert_array_equal(fake, packed)


@pytest.mark.parametrize("spec", [*INTEGERS, "nf4:g64", "fp8_e4m3:channel", "mxfp4", "nvfp4", "nf4:g32:dq"])
def test_inputs_along_the_other_axis(spec: str) -> None:
    """W[in, out] goes to the same values, and the same gradients come back: of scales where these are kept."""
    x = sample()
    scale, zero = parameters(spec, x)
    cotangent = jax.random.normal(jax.random.key(5), x.shape)

    def turned(x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        return fake_quantize_learned(x.T, scale, scheme(spec), zero_point=zero, axis=-2).T

    def plain(x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        return fake_quantize_learned(x, scale, scheme(spec), zero_point=zero)

    expected, pull = jax.vjp(plain, x, scale, zero)
    found, pulled = jax.vjp(turned, x, scale, zero)
    np.testing.assert_array_equal(found, expected)
    for ours, theirs in zip(jax.tree.leaves(pulled(cotangent)), jax.tree.leaves(pull(cotangent)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(theirs))))


def textbook(x: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: str) -> jax.Array:
    """x̂ with every rounding as y + stop_gradient(round(y) − y), left to autodiff. Independent of core's tiles."""
    rows, columns = scheme(spec).tile(*x.shape)
    element = scheme(spec).element
    assert isinstance(element, Int)

    def straight(y: jax.Array) -> jax.Array:
        return y + jax.lax.stop_gradient(jnp.round(y) - y)

    def clip(y: jax.Array, low: float, high: float) -> jax.Array:
        return jnp.where(y < low, low, jnp.where(y > high, high, y))  # jnp.clip halves the gradient on the bounds

    def wide(p: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(p, rows, 0), columns, 1)[: x.shape[0], : x.shape[1]]

    if zero is None:
        low, high = float(element.levels()[0]), float(element.levels()[-1])
        return wide(scale) * clip(straight(x / wide(scale)), low, high)
    z = straight(wide(zero))
    return wide(scale) * (clip(straight(x / wide(scale)) + z, 0, element.highest_code) - z)


@pytest.mark.parametrize("spec", INTEGERS)
def test_gradients_are_those_of_the_straight_through_form(spec: str) -> None:
    x = sample()
    scale, zero = parameters(spec, x)
    weights = sample(seed=3)

    def loss(x: jax.Array, s: jax.Array, z: jax.Array | None) -> jax.Array:
        return jnp.sum(weights * fake_quantize_learned(x, s, scheme(spec), zero_point=z, gradient_scale=1.0))

    def reference(x: jax.Array, s: jax.Array, z: jax.Array | None) -> jax.Array:
        return jnp.sum(weights * textbook(x, s, z, spec))

    wanted = (0, 1) if zero is None else (0, 1, 2)
    ours = jax.grad(loss, wanted)(x, scale, zero)
    theirs = jax.grad(reference, wanted)(x, scale, zero)
    assert float(jnp.mean(ours[0] == 0)) > 0.005  # something is clipped, or nothing is seen of it
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("spec", ["fp4_e2m1:g32", "nf4:g50", "fp8_e4m3:channel", "codebook(-1.0/0.0/0.5):g16"])
def test_scale_of_clipped_values_numerically(spec: str) -> None:
    """Where everything is clipped x̂ is linear in s: a finite difference is the gradient."""
    x = sample()
    x = jnp.where(x > 0, 1.0, -1.0) * (5 + jnp.abs(x))
    levels = np.abs(scheme(spec).element.levels()).max()  # pyright: ignore[reportAttributeAccessIssue]
    scale = jnp.full(tile_shape(spec, x), 1 / levels)
    step = 2.0**-4

    def total(s: jax.Array) -> jax.Array:
        return jnp.sum(fake_quantize_learned(x, s, scheme(spec), gradient_scale=1.0))

    gradient = jax.grad(total)(scale)
    numeric = (total(scale * (1 + step)) - total(scale * (1 - step))) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * scale), numeric, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "n", "q_max"), [("int3:g25", 25, 3), ("int4:channel", 100, 7), ("int2:g20:asym", 20, 3)]
)
def test_gradient_scale_is_that_of_the_paper(spec: str, n: int, q_max: int) -> None:
    assert lsq_gradient_scale(scheme(spec), (24, 100)) == pytest.approx((n * q_max) ** -0.5)
    x = sample()
    scale, zero = parameters(spec, x)

    def total(s: jax.Array, factor: float | None) -> jax.Array:
        return jnp.sum(fake_quantize_learned(x, s, scheme(spec), zero_point=zero, gradient_scale=factor))

    scaled, plain = jax.grad(lambda s: total(s, None))(scale), jax.grad(lambda s: total(s, 1.0))(scale)
    np.testing.assert_allclose(scaled, plain * (n * q_max) ** -0.5, rtol=1e-5, atol=1e-6)


def test_initial_scale_is_that_of_the_paper() -> None:
    x = sample(4, 100)
    scale = lsq_initial_scale(x, scheme("int3:g30"))
    groups = [np.asarray(x)[:, start : start + 30] for start in range(0, 100, 30)]  # the last has ten
    expected = np.stack([2 * np.abs(group).mean(axis=1) / np.sqrt(3) for group in groups], axis=1)
    np.testing.assert_allclose(scale, expected, rtol=1e-5)
    with pytest.raises(InputError, match="symmetric integers"):
        lsq_initial_scale(x, scheme("nf4"))


def test_block_types_have_no_scales_to_learn() -> None:
    with pytest.raises(InputError, match="cannot be learned"):
        fake_quantize_learned(sample(), jnp.ones((24, 4)), scheme("q4_0"))


@pytest.mark.parametrize("spec", ["int4:tensor:asym", "int2:tensor:asym", "int8:tensor", "int4:tensor:restricted"])
def test_pact(spec: str) -> None:
    x, weights, bound = sample(), sample(seed=3), jnp.float32(0.6)
    scale, zero = pact_parameters(bound, scheme(spec))
    tile = lambda p: None if p is None else p.reshape(1, 1)  # noqa: E731
    np.testing.assert_array_equal(
        pact(x, bound, scheme(spec)),
        dequantize(quantize(x, scheme(spec), scale=scale.reshape(1, 1), zero_point=tile(zero))),
    )
    low = 0.0 if zero is not None else -0.6
    of_x, of_bound = jax.grad(lambda x, b: jnp.sum(weights * pact(x, b, scheme(spec))), (0, 1))(x, bound)
    x, weights = np.asarray(x), np.asarray(weights)
    np.testing.assert_array_equal(of_x, np.where((x > low) & (x < 0.6), weights, 0))
    expected = weights[x >= 0.6].sum() - (weights[x <= -0.6].sum() if zero is None else 0)
    np.testing.assert_allclose(of_bound, expected, rtol=1e-4)


def test_pact_bound_numerically() -> None:
    """x̂ of what lies above the bound is the bound."""
    x = 1 + jnp.abs(sample())
    spec, step = scheme("int4:tensor:asym"), 2.0**-6
    total = lambda bound: jnp.sum(pact(x, bound, spec))  # noqa: E731
    numeric = (total(jnp.float32(0.5 + step)) - total(jnp.float32(0.5 - step))) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(jnp.float32(0.5)), numeric, rtol=1e-4)


def test_pact_needs_one_bound_for_all() -> None:
    with pytest.raises(InputError, match="one bound for all"):
        pact(sample(), jnp.float32(1), scheme("int4:channel"))
