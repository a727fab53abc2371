"""HQQ: zero points and scales for which few weights lose much, found from the weights alone.

    min over s, z, e of  Σ|e|^p + β/2 · Σ(w − ŵ(s, z) − e)²,        ŵ = (q − z)·s,   q = clip(round(w/s + z))

with p < 1, which lets outliers be wrong. In turns, β growing by κ each time:

    e = sign(r)·max(|r| − |r|^(p−1)/β, 0),  r = w − ŵ
    z = round(mean(q − (w − e)/s))
    s = Σu(w − e) / Σu²,  u = q − z

Reference: Badri & Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023), and SPEC 7; p, β, κ and
the 20 turns are theirs. Departures, all because our zero points are whole numbers, as files and kernels have them:
z is rounded in every turn; s is fitted too, by least squares: with s fixed and z rounded, error falls by less than
0.1 %; r is measured in units of the group's mean |w|, so that the result does not depend on the unit of the weights.
Each group keeps the best of its iterates, the first of which is rounding to nearest, instead of stopping all at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.calib.gram import Gram
from jquant.core.config_check import check_fields
from jquant.core.division import exact_ratio
from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.qtensor import Parameters, choose_parameters, dequantize, quantize_with
from jquant.core.scheme import Scheme
from jquant.core.tiles import spread, to_tiles
from jquant.ptq.cost import Cost, Shape, rounding
from jquant.ptq.solver import Solution, output_loss


@dataclass(frozen=True, kw_only=True)
class HQQConfig:
    """How HQQ runs."""

    p: float = 0.7  # of the norm of the errors
    beta: float = 10.0
    kappa: float = 1.01  # β grows by
    turns: int = 20

    def __post_init__(self) -> None:
        check_fields(self, "HQQ")
        if not 0 < self.p <= 1:
            raise InputError(f"HQQ with p {self.p}: it must be in (0, 1], as 0.7")
        if not (self.beta > 0 and self.kappa >= 1):
            raise InputError(f"HQQ with beta {self.beta}, kappa {self.kappa}: above 0 and at least 1, as 10 and 1.01")
        if self.turns < 1:
            raise InputError(f"HQQ of {self.turns} turns: it needs at least 1, as 20")


def solve(w: Float[Array, "out in"], gram: Gram | None, scheme: Scheme, *, config: HQQConfig | None = None) -> Solution:
    """Quantizes one matrix.

    Args:
        w: any float dtype; computed in float32.
        gram: of the layer's input; only the reported loss depends on it.
        scheme: asymmetric integers, with any granularity and scale format.
        config: by default as the authors have it.

    Raises:
        InputError: the scheme has no zero point, or a group does not fit.
    """
    if scheme.zero_point != "integer":
        raise InputError(f"HQQ to {scheme}: {_advice(scheme)}")
    return _solve(w, gram, scheme, HQQConfig() if config is None else config)


def cost(shape: Shape, scheme: Scheme, config: HQQConfig) -> Cost:
    """Of `solve`: a turn takes two powers, which are slow."""
    return rounding(shape, scheme) + Cost(roundings=26 * config.turns * math.prod(shape))


def _advice(scheme: Scheme) -> str:
    if not isinstance(scheme.element, Int):
        return "it fits zero points, which only integers have; use int4:g64:asym or the like, or another method"
    fitting = Scheme(element=Int(scheme.element.bits), granularity=scheme.granularity, zero_point="integer")
    return f"it fits zero points, which this scheme has not; use {fitting}, or another method"


@partial(jax.jit, static_argnames=("scheme", "config"))
def _solve(w: Array, gram: Gram | None, scheme: Scheme, config: HQQConfig) -> Solution:
    tiles = to_tiles(w.astype(jnp.float32), scheme)
    real = to_tiles(jnp.ones(w.shape, jnp.float32), scheme)  # 0 in what pads the last group
    unit = _over_tile(jnp.abs(tiles)) / _over_tile(real)
    unit = spread(jnp.where(unit > 0, unit, 1.0))

    def one_turn(index: Array, state: tuple[Array, Parameters, Parameters]) -> tuple[Array, Parameters, Parameters]:
        least, best, now = state
        now = _refit(tiles, real, unit, now, config.beta * config.kappa ** index.astype(jnp.float32), scheme, config)
        lost = _lost(tiles, now, scheme, config)
        better = lost < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)
        return jnp.minimum(lost, least), best, now

    start = choose_parameters(tiles, scheme)
    _, best, _ = jax.lax.fori_loop(0, config.turns, one_turn, (_lost(tiles, start, scheme, config), start, start))
    q = quantize_with(w, scheme, best)
    loss = output_loss(w, dequantize(q, jnp.float32), gram)
    return Solution(q, loss, damping=jnp.float32(0), fallback=jnp.bool_(False))


def _refit(
    tiles: Array, real: Array, unit: Array, now: Parameters, beta: Array, scheme: Scheme, config: HQQConfig
) -> Parameters:
    """One turn: e, then z, then s."""
    scale = spread(now.scale)
    code = _codes(tiles, now, scheme)
    residual = (tiles - _values(code, now)) / unit
    magnitude = jnp.abs(residual)
    # A residual of 0 has no direction to shrink in; the bound keeps its power finite.
    kept = jnp.maximum(magnitude - jnp.maximum(magnitude, 1e-8) ** (config.p - 1) / beta, 0.0)
    aim = tiles - jnp.sign(residual) * kept * unit
    zero = jnp.round(_over_tile(real * (code - aim / scale)) / _over_tile(real))
    zero = jnp.clip(zero, 0, 2**scheme.element.bits - 1)
    step = code - spread(zero)
    fitted = _over_tile(step * aim) / jnp.maximum(_over_tile(step * step), 1e-6)
    target = jnp.where(fitted > 0, fitted, now.target)
    stored = scheme.scale.store(target, None, scheme.element)
    return Parameters(stored, scheme.scale.load(stored), zero, target)


def _lost(tiles: Array, parameters: Parameters, scheme: Scheme, config: HQQConfig) -> Array:
    """Σ|e|^p of each tile."""
    return _over_tile(jnp.abs(tiles - _values(_codes(tiles, parameters, scheme), parameters)) ** config.p)


def _codes(tiles: Array, parameters: Parameters, scheme: Scheme) -> Array:
    """Codes as float32."""
    assert isinstance(scheme.element, Int)
    assert parameters.zero_point is not None
    zero = spread(parameters.zero_point)
    return scheme.element.round(exact_ratio(tiles, spread(parameters.scale)), zero) + zero


def _values(code: Array, parameters: Parameters) -> Array:
    assert parameters.zero_point is not None
    return (code - spread(parameters.zero_point)) * spread(parameters.scale)


def _over_tile(x: Array) -> Array:
    return jnp.sum(jnp.sum(x, axis=-1), axis=-2)
