"""Fake quantization with scales, and zero points, that are trained by gradient: LSQ and LSQ+.

    x̂ = s · (clip(round(x/s) + z) − z)            of other elements s · nearest level of x/s

    ∂x̂/∂x = 1 in range, 0 where the code was clipped
    ∂x̂/∂s = level − x/s in range, the level itself where it was clipped
    ∂x̂/∂z = 0 in range, −s where it was clipped

Gradients of scales and zero points are sums over the tile; that of s is multiplied by 1/√(n·q_max), n being the
elements of a tile and q_max the largest level. The rounding of z, and of s to the scheme's scale format, is passed
straight through.

References: LSQ (Esser et al., 1902.08153), 2; LSQ+ (Bhalgat et al., 2004.09576), 3.1, whose offset is β = −s·z.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.qtensor import _check_input, given_parameters, tile_mean_magnitude
from jquant.core.scheme import Scheme
from jquant.core.ste import round_tiles
from jquant.core.tiles import Axis, from_tiles, spread, to_tiles


def fake_quantize_learned(
    x: Float[Array, "*batch _ _"],
    scale: Float[Array, "*batch row_tiles column_tiles"],
    scheme: Scheme,
    *,
    zero_point: Float[Array, "*batch row_tiles column_tiles"] | None = None,
    outer: Float[Array, "*batch 1 1"] | None = None,
    gradient_scale: float | None = None,
    axis: Axis = -1,
) -> Float[Array, "*batch _ _"]:
    """dequantize(quantize(x, scheme, scale=scale, zero_point=zero_point)), bit for bit, with LSQ's gradients.

    Args:
        x: any float dtype, [..., out, in], or [..., in, out] where the axis is −2; the result has its dtype.
        scale: positive, one a tile; a row of them for each row of tiles of outputs, whatever the axis.
        scheme: static under jit; not a block type of ggml, which finds its scales itself.
        zero_point: codes, not necessarily whole; exactly where the scheme is asymmetric.
        outer: the second level of a nested scale, where x shares it with others: a constant to the gradient.
        gradient_scale: what the gradient of `scale` is multiplied by; by default LSQ's, of the tile.
        axis: of the inputs.

    Raises:
        InputError: x is no float matrix, the scheme has no scales to learn, or theirs is another shape.
    """
    _check_input(x, scheme)
    if scheme.block is not None:
        raise InputError(f"{scheme} finds the scales inside its blocks itself: they cannot be learned; use clipped_ste")
    shape = (x.shape[-3 - axis], x.shape[axis])
    factor = lsq_gradient_scale(scheme, shape) if gradient_scale is None else gradient_scale
    return _fake_quantize(_Plan(scheme, factor, axis), x, scale, zero_point, outer)


def lsq_gradient_scale(scheme: Scheme, matrix_shape: tuple[int, ...]) -> float:
    """1/√(n·q_max) for tiles of n elements (LSQ, 2.2)."""
    rows, columns = scheme.tile(*matrix_shape)
    return float((rows * columns * largest_level(scheme)) ** -0.5)


def largest_level(scheme: Scheme) -> float:
    """q_max: 2^b − 1 with a zero point, otherwise the element's last level."""
    if scheme.zero_point == "integer":
        assert isinstance(scheme.element, Int)
        return float(scheme.element.highest_code)
    assert scheme.block is None
    return float(scheme.element.levels()[-1])  # pyright: ignore[reportAttributeAccessIssue]


def lsq_initial_scale(
    x: Float[Array, "*batch out in"], scheme: Scheme
) -> Float32[Array, "*batch row_tiles column_tiles"]:
    """2·mean|x|/√q_max of each tile (LSQ, 2.1); for symmetric integers, which it was derived for.

    Raises:
        InputError: of another scheme.
    """
    _check_input(x, scheme)
    if not isinstance(scheme.element, Int) or scheme.zero_point != "none":
        raise InputError(f"LSQ's initial scale for {scheme}: it is one of symmetric integers; start from range or mse")
    mean = tile_mean_magnitude(x.astype(jnp.float32), scheme)
    return jnp.where(mean > 0, 2 * mean / largest_level(scheme) ** 0.5, 1.0)


class _Plan(NamedTuple):
    """What is static."""

    scheme: Scheme
    factor: float  # of the gradient of scales
    axis: Axis

    def turn(self, per_tile: Array) -> Array:
        """One entry a tile, from where they are kept to where tiles lie, or back."""
        return per_tile if self.axis == -1 else per_tile.swapaxes(-1, -2)


class _Rounded(NamedTuple):
    """Tiles, and what they go to."""

    tiles: Array
    levels: Array
    in_range: Array
    divisor: Array  # one entry a tile, as all below
    scale: Array


_Kept = tuple[Array, Array, Array | None, Array | None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quantize(plan: _Plan, x: Array, scale: Array, zero_point: Array | None, outer: Array | None) -> Array:
    return _forward(plan, x, scale, zero_point, outer)[0]


def _round(plan: _Plan, x: Array, scale: Array, zero_point: Array | None, outer: Array | None) -> _Rounded:
    scheme, turn = plan.scheme, plan.turn
    known = given_parameters(turn(x), scheme, scale, zero_point, outer=outer)
    parameters = known._replace(
        scale=turn(known.scale), zero_point=None if known.zero_point is None else turn(known.zero_point)
    )
    tiles = to_tiles(x.astype(jnp.float32), scheme, plan.axis)
    levels, in_range = round_tiles(tiles, scheme, parameters, None)
    return _Rounded(tiles, levels, in_range, parameters.scale, turn(scheme.scale.load(known.stored)))


def _forward(plan: _Plan, x: Array, scale: Array, zero_point: Array | None, outer: Array | None) -> tuple[Array, _Kept]:
    found = _round(plan, x, scale, zero_point, outer)
    value = from_tiles(found.levels * spread(found.scale), (x.shape[-2], x.shape[-1]))
    return value.astype(x.dtype), (x, scale, zero_point, outer)


def _backward(plan: _Plan, kept: _Kept, cotangent: Array) -> tuple[Array, Array, Array | None, None]:
    x, scale, zero_point, outer = kept
    tiles, levels, in_range, divisor, loaded = _round(plan, x, scale, zero_point, outer)
    y = tiles / spread(divisor)
    gradient = to_tiles(cotangent.astype(jnp.float32), plan.scheme, plan.axis)
    of_x = from_tiles(jnp.where(in_range, gradient, 0.0), (x.shape[-2], x.shape[-1]))
    of_scale = plan.factor * jnp.sum(gradient * jnp.where(in_range, levels - y, levels), axis=(-3, -1))
    of_zero = None
    if zero_point is not None:
        clipped = jnp.sum(jnp.where(in_range, 0.0, gradient), axis=(-3, -1))
        of_zero = plan.turn(-loaded * clipped).astype(zero_point.dtype)
    return of_x.astype(x.dtype), plan.turn(of_scale).astype(scale.dtype), of_zero, None


_fake_quantize.defvjp(_forward, _backward)
