"""Quantizers of weights and inputs for training: what a layer rounds its operands with, and what of it is trained.

Scales are trained as θ = log₂ s: positive whatever the optimizer does, and a step of θ is a relative step of s (TQT,
Jain et al., 1903.08066, 3.2). The gradient of s is LSQ's (core/learned_scale.py).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.learned_scale import fake_quantize_learned, largest_level, lsq_initial_scale
from jquant.core.pact import pact, pact_parameters
from jquant.core.qtensor import QTensor, choose_parameters, quantize
from jquant.core.range_search import search_parameters
from jquant.core.scales import NestedScale
from jquant.core.scheme import Scheme, Tensor
from jquant.core.ste import clipped_ste, fake_quantize, ste
from jquant.core.tiles import Axis, to_tiles
from jquant.kernels import dispatch
from jquant.nn.rounded_input import check_input_scheme, matrix_of_inputs
from jquant.nn.w8a8 import static_parameters

WeightGradient = Literal["clipped_ste", "ste", "lsq"]
InputGradient = Literal["clipped_ste", "ste", "lsq", "pact"]
Start = Literal["range", "mse", "lsq"]
Rounding = Literal["nearest", "stochastic"]
_LARGEST_LOG = 120.0  # of a scale; beyond it products with codes leave float32's range
STRAIGHT = {"clipped_ste": clipped_ste, "ste": ste}


class FakeQuantParam(nnx.Param[Array]):
    """A trained parameter of quantization: log₂ of a scale or bound, a zero point. A Param, or nothing trains it."""


class ObserverState(nnx.Variable[Array]):
    """What an input quantizer has seen: float32 [4], as `Seen`. No Param: the forward pass changes it."""


class OuterLevel(nnx.Variable[Array]):
    """g of a weight's nested scale, float32 [..., 1, 1], where other weights have it too: it follows all of theirs."""


class FakeQuantModule(nnx.Module):
    """A module that quantizes in training: it keeps float32 parameters and computes in the dtype of its input."""


class WeightQuantizer(FakeQuantModule):
    """Ŵ = dequantize(quantize(W)), with a gradient; scales from the range of W, or trained."""

    def __init__(
        self,
        matrix: Float[Array, "*stack out in"],
        scheme: Scheme,
        *,
        gradient: WeightGradient = "clipped_ste",
        start: Start = "mse",
        rounding: Rounding = "nearest",
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """
        Args:
            matrix: the weight that it will quantize, [..., out, in]; trained scales start from it.
            scheme: of the weight.
            gradient: `clipped_ste` and `ste` take scales from the range at each step; `lsq` trains them, and zero
                points where the scheme has them.
            start: of trained scales: from the `range`, of least squared error (`mse`), or the `lsq` paper's.
            rounding: `stochastic` needs `rngs`, and scales that are not trained.
            rngs: a stream of it drives stochastic rounding.

        Raises:
            InputError: the scheme does not fit the weight, or the choices do not go together.
        """
        for name, value, kind in (("gradient", gradient, WeightGradient), ("start", start, Start)):
            _check_choice(name, value, kind)
        if scheme.block is not None and (gradient == "lsq" or rounding == "stochastic"):
            raise InputError(f"{scheme} finds its codes and scales itself: use clipped_ste, rounded to nearest")
        if rounding == "stochastic" and (gradient == "lsq" or rngs is None):
            raise InputError("stochastic rounding: it goes with clipped_ste or ste, and needs a key for its choices")
        self.scheme = self.final_scheme = scheme  # the former is wider in stages of gradual bits
        self.gradient = gradient
        self.rounding = rounding
        self.enabled = True
        self.rngs = rngs.fork() if rounding == "stochastic" and rngs is not None else None
        jax.eval_shape(
            lambda w: quantize(w, scheme), jax.ShapeDtypeStruct(matrix.shape, jnp.float32)
        )  # fits, or says why
        trained = _start(matrix.astype(jnp.float32), scheme, start) if gradient == "lsq" else (None, None)
        self.log_scale = None if trained[0] is None else FakeQuantParam(jnp.log2(trained[0]))
        self.zero_point = None if trained[1] is None else FakeQuantParam(trained[1])
        self.level: OuterLevel | None = nnx.data(None)  # by qat/second_level.py; without it g is that of W

    def __call__(
        self, matrix: Float[Array, "..."], *, axis: Axis = -1, dtype: DTypeLike | None = None
    ) -> Float[Array, "..."]:
        """Ŵ; W itself while not enabled.

        Args:
            matrix: W[..., out, in], or W[..., in, out] where the axis is −2.
            axis: of the inputs.
            dtype: of Ŵ; by default that of W.
        """
        if not self.enabled:
            return matrix if dtype is None else matrix.astype(dtype)
        if self.log_scale is None and self.rngs is None:
            rule = STRAIGHT[self.gradient]
            return dispatch.fake_quantize(
                matrix, self.scheme, gradient=rule, outer=self._outer(), axis=axis, dtype=dtype, keep="bound"
            )
        dtype = matrix.dtype if dtype is None else dtype
        wide = matrix if dtype == matrix.dtype else matrix.astype(jnp.float32)  # so as to be rounded once, at the end
        if self.log_scale is not None:
            scale, zero = self.parameters()
            value = fake_quantize_learned(wide, scale, self.scheme, zero_point=zero, outer=self._outer(), axis=axis)
            return value.astype(dtype)
        key = None if self.rngs is None else self.rngs()
        turned = wide if axis == -1 else wide.swapaxes(-1, -2)
        rule, outer = STRAIGHT[self.gradient], self._outer()
        value = fake_quantize(turned, self.scheme, gradient=rule, key=key, outer=outer, keep="input")
        if axis == -2:  # the barrier: as in nn/rounded_input.py, whose bits these are
            value = jax.lax.optimization_barrier(value.swapaxes(-1, -2))
        return value.astype(dtype)

    def quantize(self, matrix: Float[Array, "*stack out in"]) -> QTensor:
        """The packed weight whose values are Ŵ, to nearest."""
        scale, zero = (None, None) if self.log_scale is None else self.parameters()
        return quantize(matrix, self.scheme, scale=scale, zero_point=zero, outer=self._outer())

    def _outer(self) -> Array | None:
        nested = isinstance(self.scheme.scale, NestedScale)
        return None if self.level is None or not nested else self.level.get_value()

    def parameters(self) -> tuple[Float32[Array, "*stack r c"], Float32[Array, "*stack r c"] | None]:
        """Trained scales and zero points."""
        assert self.log_scale is not None
        return _exp2(self.log_scale), None if self.zero_point is None else self.zero_point.get_value()

    def set_scheme(self, scheme: Scheme) -> None:
        """Goes on with another scheme of the same tiles, as in gradual bits; the range that scales cover stays."""
        if self.log_scale is not None:
            shift = jnp.log2(_reach(self.scheme) / _reach(scheme))
            self.log_scale.set_value(self.log_scale.get_value() + shift)
            if self.zero_point is not None:
                self.zero_point.set_value(self.zero_point.get_value() * (_reach(scheme) / _reach(self.scheme)))
        self.scheme = scheme


class Seen(NamedTuple):
    """Running means over batches of what inputs were, and the weight they have gathered."""

    low: Float32[Array, ""]
    high: Float32[Array, ""]
    magnitude: Float32[Array, ""]  # mean |x|
    weight: Float32[Array, ""]  # 1 − momentum^batches: divides out the start from zero

    def means(self) -> Seen:
        """Without the bias of the start."""
        divisor = jnp.maximum(self.weight, jnp.finfo(jnp.float32).tiny)
        return Seen(self.low / divisor, self.high / divisor, self.magnitude / divisor, self.weight)


class InputQuantizer(FakeQuantModule):
    """x̂ = dequantize(quantize(x)) of a layer's input, with a gradient.

    By the scheme's granularity: `token` and groups take their scales from each row (dynamic); `tensor` has one scale,
    from running means of the range (static), or trained. A nested scale has its outer level a row.
    """

    def __init__(self, scheme: Scheme, *, gradient: InputGradient = "clipped_ste", momentum: float = 0.9) -> None:
        """
        Args:
            scheme: int8:token, mxfp8, …; int8:tensor, int4:tensor:asym, …
            gradient: `lsq` and `pact` train the scale of a `tensor` scheme.
            momentum: of the running means, as in batch normalization.

        Raises:
            InputError: the choices do not go together.
        """
        _check_choice("activation_gradient", gradient, InputGradient)
        check_input_scheme(scheme)
        static = isinstance(scheme.granularity, Tensor)
        if gradient in ("lsq", "pact") and not static:
            raise InputError(f"activations in {scheme} by {gradient}: it trains one scale for all, as int8:tensor")
        if gradient == "pact" and not isinstance(scheme.element, Int):
            raise InputError(f"activations in {scheme} by pact: it clips integers; use intN:tensor, or lsq")
        self.scheme = scheme
        self.gradient = gradient
        self.momentum = momentum
        self.enabled = True
        self.observing = static and gradient not in ("lsq", "pact")
        self.calibrated = self.observing or not static
        self.seen = ObserverState(jnp.zeros(4, jnp.float32)) if static else None
        self.log_scale = FakeQuantParam(jnp.zeros((), jnp.float32)) if gradient in ("lsq", "pact") else None
        learns_zero = gradient == "lsq" and scheme.zero_point == "integer"
        self.zero_point = FakeQuantParam(jnp.zeros((), jnp.float32)) if learns_zero else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """x̂ in the dtype of x; x itself while not enabled. Updates what it has seen while observing."""
        if self.seen is not None and self.observing:
            self.seen.set_value(jnp.stack(_updated(Seen(*self.seen.get_value()), x, self.momentum)))
        if not self.enabled:
            return x
        rows = matrix_of_inputs(x, self.scheme)
        if self.seen is None:
            # A byte an element costs a GPU least memory; on CPU masks are slow, and steps took 6 % longer with them.
            keep = "input" if dispatch.on_cpu() else "mask"
            quantized = fake_quantize(rows, self.scheme, gradient=STRAIGHT[self.gradient], keep=keep)
        elif self.gradient == "pact":
            self._check_calibrated()
            assert self.log_scale is not None
            quantized = pact(rows, _exp2(self.log_scale), self.scheme)
        elif self.gradient == "lsq":
            scale, zero = self.parameters()
            factor = (x.shape[-1] * largest_level(self.scheme)) ** -0.5
            quantized = fake_quantize_learned(
                rows, scale.reshape(1, 1), self.scheme, zero_point=_tile(zero), gradient_scale=float(factor)
            )
        else:
            scale, zero = self.parameters()
            quantized = fake_quantize(
                rows, self.scheme, gradient=STRAIGHT[self.gradient], scale=_tile(scale), zero_point=_tile(zero)
            )
        return quantized.reshape(x.shape)

    def parameters(self) -> tuple[Array, Array | None]:
        """Scale and zero point (None where symmetric) of a `tensor` scheme. Raises InputError before calibration."""
        self._check_calibrated()
        assert self.seen is not None
        if self.gradient == "pact":
            assert self.log_scale is not None
            return pact_parameters(_exp2(self.log_scale), self.scheme)
        if self.log_scale is not None:
            return _exp2(self.log_scale), None if self.zero_point is None else self.zero_point.get_value()
        seen = Seen(*self.seen.get_value()).means()
        return static_parameters(seen.low, seen.high, self.scheme)

    def start_from_seen(self) -> None:
        """Sets trained parameters from what was observed, and observes no more.

        LSQ starts from 2·mean|x|/√q_max, with zero points from the range (LSQ+, 3.2); PACT's bound from the range.

        Raises:
            InputError: nothing was observed.
        """
        if self.seen is None or self.log_scale is None:
            return
        seen = Seen(*self.seen.get_value()).means()
        if float(seen.weight) == 0 or float(seen.magnitude) == 0:
            raise InputError(f"activations in {self.scheme} by {self.gradient}: no input was seen; run some batches")
        if self.gradient == "pact":
            bound = seen.high if self.scheme.zero_point == "integer" else jnp.maximum(seen.high, -seen.low)
            self.log_scale.set_value(jnp.log2(jnp.maximum(bound, jnp.finfo(jnp.float32).smallest_normal)))
        elif self.zero_point is not None or not isinstance(self.scheme.element, Int):
            scale, zero = static_parameters(seen.low, seen.high, self.scheme)
            self.log_scale.set_value(jnp.log2(scale))
            if self.zero_point is not None and zero is not None:
                self.zero_point.set_value(zero)
        else:
            self.log_scale.set_value(jnp.log2(2 * seen.magnitude / largest_level(self.scheme) ** 0.5))
        self.observing, self.calibrated = False, True

    def _check_calibrated(self) -> None:
        if not self.calibrated:
            raise InputError(
                f"activations in {self.scheme} by {self.gradient}: their scale is not set; "
                "call jquant.qat.calibrate(model, batches) after prepare"
            )


@partial(jax.jit, static_argnums=(1, 2))
def _start(matrix: Array, scheme: Scheme, start: Start) -> tuple[Array, Array | None]:
    if start == "lsq":
        return lsq_initial_scale(matrix, scheme), None
    tiles = to_tiles(matrix, scheme)
    found = choose_parameters(tiles, scheme) if start == "range" else search_parameters(tiles, scheme)
    target = found.target
    return jnp.where(target > 0, target, 1.0), found.zero_point


def _updated(seen: Seen, x: Array, momentum: float) -> Seen:
    wide = jax.lax.stop_gradient(x).astype(jnp.float32)
    now = Seen(jnp.min(wide), jnp.max(wide), jnp.mean(jnp.abs(wide)), jnp.float32(1))
    return Seen(*(momentum * old + (1 - momentum) * new for old, new in zip(seen, now, strict=True)))


def _tile(parameter: Array | None) -> Array | None:
    return None if parameter is None else parameter.reshape(1, 1)


def _exp2(parameter: FakeQuantParam) -> Array:
    """2^θ, for any θ a normal positive number."""
    return jnp.exp2(jnp.clip(parameter.get_value().astype(jnp.float32), -_LARGEST_LOG, _LARGEST_LOG))


def _reach(scheme: Scheme) -> float:
    """What the range is divided by to give the scale."""
    if scheme.zero_point == "integer":
        return largest_level(scheme)
    return scheme.element.reach  # pyright: ignore[reportAttributeAccessIssue]


def _check_choice(name: str, value: str, kind: object) -> None:
    if value not in get_args(kind):
        raise InputError(f"{name} {value!r}: there are {', '.join(get_args(kind))}")
