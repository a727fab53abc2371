"""A linear layer with a frozen packed weight and trained low-rank adapters beside it.

    y = x · Ŵᵀ + b + (α/r) · (x · Aᵀ) · Bᵀ        Ŵ = dequantize(Q) [out, in], A [r, in], B [out, r]

Only A and B are `LoRAParam`s: `nnx.DiffState(0, LoRAParam)` and `nnx.Optimizer(model, tx, wrt=LoRAParam)` train them
and nothing else. With Q in nf4:g64:dq it is QLoRA.

Reference: LoRA, Hu et al., 2106.09685, 4.1; QLoRA, Dettmers et al., 2305.14314, equation 5. Dropout on x, which QLoRA
has, is left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, dequantize
from jquant.nn.linear import Linear, Quantized, QuantizedLinear, matmul_transposed
from jquant.nn.product import PRECISION


class LoRAParam(nnx.Param[Array]):
    """A matrix of an adapter, float32: a type of its own, so that filters tell it from the frozen parameters."""


class LoRALinear(nnx.Module):
    """`QuantizedLinear` with an adapter; takes its place, with the same call."""

    def __init__(
        self,
        weight: QTensor,
        bias: Array | None = None,
        *,
        a: Float[Array, "rank in"],
        b: Float[Array, "out rank"],
        alpha: float,
    ) -> None:
        """
        Args:
            weight: packed [out, in]; nothing trains it.
            bias: [out]; an `nnx.Param`, which filters for `LoRAParam` leave out.
            a: kept in float32.
            b: kept in float32; zeros begin at the output of the packed layer.
            alpha: the adapter's output is multiplied by alpha / rank.

        Raises:
            InputError: shapes do not fit, or alpha is not positive.
        """
        rows, columns = weight.matrix_shape
        rank = a.shape[0]
        if weight.ndim != 2 or a.shape != (rank, columns) or b.shape != (rows, rank):
            raise InputError(
                f"adapter matrices {a.shape} and {b.shape} over a weight {weight.shape}: they must be "
                f"(rank, {columns}) and ({rows}, rank), the weight one matrix [out, in]"
            )
        if not 1 <= rank <= min(rows, columns):
            raise InputError(f"rank {rank} over a weight {weight.shape}: it must be 1 to {min(rows, columns)}")
        if not alpha > 0:
            raise InputError(f"alpha {alpha}: it must be positive; adapters are multiplied by alpha / rank")
        self.weight = Quantized(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.lora_a = LoRAParam(a.astype(jnp.float32))
        self.lora_b = LoRAParam(b.astype(jnp.float32))
        self.scaling = alpha / rank

    def __call__(self, x: Float[Array, "*batch in"], *, dtype: DTypeLike | None = None) -> Float[Array, "*batch out"]:
        """Both products in the dtype of x, added in float32; rounded to `dtype`, by default that of x."""
        bias = None if self.bias is None else self.bias.get_value()
        base = _frozen_product(x, self.weight.get_value(), bias)
        inner = matmul_transposed(x, self.lora_a.get_value())
        adapted = matmul_transposed(inner, self.lora_b.get_value(), dtype=jnp.float32)
        return (base + self.scaling * adapted).astype(x.dtype if dtype is None else dtype)

    @property
    def rank(self) -> int:
        return self.lora_a.get_value().shape[0]

    def update(self) -> Float32[Array, "out in"]:
        """(α/r) · B · A, what training has added to the weight."""
        b, a = self.lora_b.get_value(), self.lora_a.get_value()
        return self.scaling * jnp.matmul(b, a, precision=PRECISION)

    def merged(self) -> Linear:
        """The float layer W = dequantize(Q) + (α/r) · B · A, in the dtype that Q was made from."""
        weight = self.weight.get_value()
        value = (dequantize(weight, jnp.float32) + self.update()).astype(weight.dtype)
        return _float_layer(value, None if self.bias is None else self.bias.get_value())

    def base(self) -> QuantizedLinear:
        """The layer without its adapter."""
        return QuantizedLinear(self.weight.get_value(), None if self.bias is None else self.bias.get_value())


@jax.checkpoint
def _frozen_product(
    x: Float[Array, "*batch in"], weight: QTensor, bias: Float[Array, " out"] | None
) -> Float32[Array, "*batch out"]:
    """x · dequantize(Q)ᵀ + b. The backward pass decodes again: what is kept for it is packed, not a float weight."""
    return matmul_transposed(x, dequantize(weight, x.dtype), bias, dtype=jnp.float32)


def _float_layer(weight: Array, bias: Array | None) -> Linear:
    rows, columns = weight.shape
    layer = nnx.eval_shape(lambda: Linear(columns, rows, use_bias=bias is not None, rngs=nnx.Rngs(0)))
    layer.weight.set_value(weight)
    if layer.bias is not None and bias is not None:
        layer.bias.set_value(bias)
    return layer
