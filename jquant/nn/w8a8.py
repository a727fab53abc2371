"""Linear layers that multiply codes: weights and activations both quantized at inference, W8A8 and narrower.

    y = (X_q − z) · W_qᵀ · s_x · s_w + b        int8 × int8 → int32, or fp8 × fp8 → float32

X is quantized per token, from the token itself (dynamic), or per tensor, with a scale found in calibration (static). A
scale of all tokens together found at inference is not offered: what a token gives would depend on those after it.

The gradient of X goes straight through its rounding: it is that of the product with dequantize(W). W has none.

Sums of integers are exact everywhere. Those of fp8 are float32's on CPU; tensor cores keep fewer bits of them (H100,
jax 0.11.2: 1.2e-4 off in relative norm over 576 inputs). On CPU, too, XLA multiplies int8 as fast as it does float32
(jax 0.10.2: 512×1536×576 in 6 ms against 9). On Hopper kernels quantize and multiply (kernels/w8a8_wgmma.py); all
else is one path for all backends.

Reference: SmoothQuant (Xiao et al., 2211.10438), 2 and 5; SPEC 6. Conventions of the codes are those of `quantize`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Float32, Int

from jquant.core.errors import InputError
from jquant.core.formats import Int as IntElement
from jquant.core.qtensor import QTensor, choose_parameters, dequantize, quantize
from jquant.core.scheme import Channel, Scheme, Tensor, Token
from jquant.kernels import dispatch
from jquant.nn.linear import ExpertLinear, Linear, Quantized, grouped_matmul_transposed, matmul_transposed
from jquant.nn.product import PRECISION

_DTYPES = {
    "fp8_e4m3": jnp.float8_e4m3fn,
    "fp8_e5m2": jnp.float8_e5m2,
    "fp8_e4m3fnuz": jnp.float8_e4m3fnuz,
    "fp8_e5m2fnuz": jnp.float8_e5m2fnuz,
}


class InputScale(nnx.Variable[Array]):
    """A scale or zero point of a layer's input, found in calibration: not a Param, because nothing trains it."""


class W8A8Linear(nnx.Module):
    """`Linear` on codes; takes its place, with the same call."""

    def __init__(
        self,
        weight: QTensor,
        bias: Array | None = None,
        *,
        activation: Scheme,
        input_scale: ArrayLike | None = None,
        input_zero_point: ArrayLike | None = None,
    ) -> None:
        """
        Args:
            weight: symmetric int2 … int8, or fp8, one scale a channel or one for all.
            bias: [out], added in float32.
            activation: int8:token, fp8_e4m3:token, …, or int8:tensor, fp8_e4m3:tensor, … with `input_scale`; integers
                may be asymmetric.
            input_scale: of a `tensor` scheme, from `static_parameters`.
            input_zero_point: of an asymmetric `tensor` scheme.

        Raises:
            InputError: the schemes cannot be multiplied as codes, or a scale is missing or one too many.
        """
        _check(weight, activation, input_scale, input_zero_point)
        self.weight = Quantized(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.activation = activation
        self.input_scale = _variable(input_scale)
        self.input_zero_point = _variable(input_zero_point)

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: DTypeLike | None = None) -> Float[Array, "*batch out"]:
        """The product in `dtype`; by default in that of x."""
        rows = x.reshape(-1, x.shape[-1])
        dtype = x.dtype if dtype is None else jnp.dtype(dtype)
        bias, static = _value(self.bias), (_value(self.input_scale), _value(self.input_zero_point))
        found: Array = _linear((self.activation, dtype), rows, self.weight.get_value(), bias, *static)
        return found.reshape(*x.shape[:-1], -1)


class W8A8ExpertLinear(nnx.Module):
    """`ExpertLinear` on codes; a static scale is that of all experts' rows."""

    def __init__(
        self,
        weight: QTensor,
        *,
        activation: Scheme,
        input_scale: ArrayLike | None = None,
        input_zero_point: ArrayLike | None = None,
    ) -> None:
        """Arguments as `W8A8Linear`'s."""
        _check(weight, activation, input_scale, input_zero_point)
        self.weight = Quantized(weight)
        self.activation = activation
        self.input_scale = _variable(input_scale)
        self.input_zero_point = _variable(input_zero_point)

    def __call__(self, x: Float[Array, "rows in"], counts: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """As `ExpertLinear`."""
        static = (_value(self.input_scale), _value(self.input_zero_point))
        return _expert_linear(self.activation, x, self.weight.get_value(), counts, *static)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    plan: tuple[Scheme, DTypeLike],
    x: Array,
    weight: QTensor,
    bias: Array | None,
    scale: Array | None,
    zero: Array | None,
) -> Array:
    activation, dtype = plan
    product = None
    if dtype == jnp.bfloat16:
        product = dispatch.multiply_as_codes(x, weight, activation, bias)
    if product is None:
        product = multiply(quantize_input(x, activation, scale, zero), weight)
        product = product if bias is None else product + bias.astype(jnp.float32)
    return product.astype(dtype)


def _linear_forward(plan: Any, x: Array, weight: QTensor, bias: Array | None, *static: Any) -> tuple[Array, Any]:
    return _linear(plan, x, weight, bias, *static), (x, weight, bias)


def _linear_backward(plan: tuple[Scheme, DTypeLike], kept: Any, cotangent: Array) -> tuple[Any, ...]:
    x, weight, bias = kept
    value = dequantize(weight, x.dtype)
    pull = jax.vjp(lambda x, bias: matmul_transposed(x, value, bias, dtype=plan[1]), x, bias)[1]
    of_x, of_bias = pull(cotangent)
    return of_x, None, of_bias, None, None


_linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_linear(
    activation: Scheme, x: Array, weight: QTensor, counts: Array, scale: Array | None, zero: Array | None
) -> Array:
    return grouped_multiply(quantize_input(x, activation, scale, zero), weight, counts).astype(x.dtype)


def _expert_forward(activation: Scheme, x: Array, weight: QTensor, counts: Array, *static: Any) -> tuple[Array, Any]:
    return _expert_linear(activation, x, weight, counts, *static), (x, weight, counts)


def _expert_backward(_: Scheme, kept: Any, cotangent: Array) -> tuple[Any, ...]:
    x, weight, counts = kept
    value = dequantize(weight, x.dtype)
    pull = jax.vjp(lambda x: grouped_matmul_transposed(x, value, counts), x)[1]
    return *pull(cotangent), None, None, None, None


_expert_linear.defvjp(_expert_forward, _expert_backward)


def w8a8_layer(
    layer: Linear | ExpertLinear,
    weight: QTensor,
    *,
    activation: Scheme,
    input_scale: ArrayLike | None = None,
    input_zero_point: ArrayLike | None = None,
) -> W8A8Linear | W8A8ExpertLinear:
    """The layer that takes this one's place, with the weight given. Raises InputError as `W8A8Linear`."""
    if isinstance(layer, ExpertLinear):
        return W8A8ExpertLinear(
            weight, activation=activation, input_scale=input_scale, input_zero_point=input_zero_point
        )
    bias = None if layer.bias is None else layer.bias.get_value()
    return W8A8Linear(weight, bias, activation=activation, input_scale=input_scale, input_zero_point=input_zero_point)


def static_parameters(lowest: ArrayLike, highest: ArrayLike, activation: Scheme) -> tuple[Array, Array | None]:
    """Scale and zero point (None where symmetric) for inputs between the two values seen in calibration."""
    tile = jnp.asarray([lowest, highest], jnp.float32).reshape(1, 1, 1, 2)
    found = choose_parameters(tile, activation)
    return found.scale.reshape(()), None if found.zero_point is None else found.zero_point.reshape(())


def quantize_input(
    x: Float[Array, "rows in"], activation: Scheme, scale: Array | None = None, zero_point: Array | None = None
) -> QTensor:
    """Codes of activations, a row a token, with scales of their own or the static one given."""
    if scale is None:
        return quantize(x, activation)
    zero = None if zero_point is None else zero_point.reshape(1, 1)
    return quantize(x, activation, scale=scale.reshape(1, 1), zero_point=zero)


def multiply(x: QTensor, weight: QTensor) -> Float32[Array, "rows out"]:
    """dequantize(x) · dequantize(weight)ᵀ, multiplied as codes; of integers only the scaling rounds."""
    codes, weights = narrow_codes(x), narrow_codes(weight)
    kind = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
    last = (((1,), (1,)), ((), ()))
    total = jax.lax.dot_general(codes, weights, last, precision=PRECISION, preferred_element_type=kind)
    shift = _zero_shift(x)
    if shift is not None:
        total = total - shift * jnp.sum(weights, axis=-1, dtype=jnp.int32)
    return total.astype(jnp.float32) * x.scales() * weight.scales().swapaxes(-1, -2)


def grouped_multiply(x: QTensor, weight: QTensor, counts: Int[Array, " experts"]) -> Float32[Array, "rows out"]:
    """`multiply` for rows sorted by expert, each with the matrix of its expert."""
    codes, weights = narrow_codes(x), narrow_codes(weight)
    kind = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
    total = jax.lax.ragged_dot(
        codes, weights.swapaxes(-1, -2), counts.astype(jnp.int32), precision=PRECISION, preferred_element_type=kind
    )
    expert = jnp.repeat(jnp.arange(len(counts)), counts, total_repeat_length=len(codes))
    shift = _zero_shift(x)
    if shift is not None:
        total = total - shift * jnp.sum(weights, axis=-1, dtype=jnp.int32)[expert]
    return total.astype(jnp.float32) * x.scales() * weight.scales()[..., 0][expert]


def narrow_codes(q: QTensor) -> Array:
    """Codes in the dtype that is multiplied: int8 with zero at 0, or fp8. Asymmetric ones are shifted to fit."""
    element, codes = q.scheme.element, q.codes()
    if isinstance(element, IntElement):
        return (codes - jnp.uint8(element.offset)).view(jnp.int8)  # modulo 256
    return jax.lax.bitcast_convert_type(codes, _DTYPES[element.name])


def _zero_shift(x: QTensor) -> Array | None:
    """Zero points, shifted as the codes are, [rows or 1, 1]."""
    zero = x.zero_points()
    if zero is None:
        return None
    assert isinstance(x.scheme.element, IntElement), "Scheme refuses zero points elsewhere"
    return zero.astype(jnp.int32) - x.scheme.element.offset


def multipliable(weight: Scheme, activation: Scheme, inputs: int) -> bool:
    """Whether weights and inputs in these schemes can be multiplied as codes, over so many inputs."""
    return _objection(weight, activation, inputs) is None


def check_multipliable(weight: Scheme, activation: Scheme, inputs: int) -> None:
    """Raises InputError where they cannot."""
    objection = _objection(weight, activation, inputs)
    if objection is not None:
        raise InputError(f"weights in {weight} with activations in {activation}: {objection}")


def _objection(weight: Scheme, activation: Scheme, inputs: int) -> str | None:
    integers = [isinstance(scheme.element, IntElement) for scheme in (weight, activation)]
    floats = [scheme.block is None and scheme.element.name in _DTYPES for scheme in (weight, activation)]
    if not all(integers) and not all(floats):
        return f"both must be integers (int2 … int8), or both fp8 ({', '.join(_DTYPES)})"
    if not isinstance(weight.granularity, Channel | Tensor) or weight.zero_point != "none":
        return "weights must be symmetric, with scales per channel or tensor, as int8:channel"
    if not isinstance(activation.granularity, Token | Tensor):
        return "scales of activations are per token, as int8:token, or static, as int8:tensor"
    bits = weight.element.bits + activation.element.bits - (1 if activation.zero_point == "integer" else 2)
    if all(integers) and inputs >= 2 ** (31 - bits):
        return f"over {inputs} inputs sums may exceed int32; use fewer bits or fp8"
    return None


def _check(weight: QTensor, activation: Scheme, scale: object | None, zero_point: object | None) -> None:
    check_multipliable(weight.scheme, activation, weight.matrix_shape[1])
    check_static(f"weights in {weight.scheme} with activations in {activation}", activation, scale, zero_point)


def check_static(pair: str, activation: Scheme, scale: object | None, zero_point: object | None) -> None:
    """Raises InputError where a scale or zero point of the input is missing or one too many."""
    static = isinstance(activation.granularity, Tensor)
    if static != (scale is not None):
        need = "needs an input_scale, from calibration" if static else "finds its scales itself: drop input_scale"
        raise InputError(f"{pair}: {activation} {need}")
    if (static and activation.zero_point == "integer") != (zero_point is not None):
        need = "takes no" if zero_point is not None else "needs an"
        raise InputError(f"{pair}: {activation} {need} input_zero_point")


def _variable(value: object | None) -> InputScale | None:
    return None if value is None else InputScale(jnp.asarray(value, jnp.float32).reshape(()))


def _value(variable: nnx.Variable[Array] | None) -> Array | None:
    return None if variable is None else variable.get_value()
