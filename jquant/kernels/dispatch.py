"""Which implementation runs: the one place that knows, for every kernel, of platform and shape.

    auto        kernels where the platform has them and they are faster, else jnp (the default)
    jnp         never a kernel
    interpret   kernels, their operations run one by one: for tests, on any platform
    tpu         as auto, and on a TPU those kernels that are lowered for it too: fake quantization, GPTQ's block and its
                search of ranges. Untested on hardware: no TPU has run them yet

Set JQUANT_KERNELS before the start, or `override` for a while. What a kernel cannot do runs in jnp, without an error.
Kernels are for one device: arrays that are spread over several stay with XLA, which knows how to divide the work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float

from jquant.core import ste
from jquant.core.errors import InputError
from jquant.core.formats import Element, Int
from jquant.core.qtensor import QTensor, dequantize
from jquant.core.scheme import Channel, Scheme, Tensor
from jquant.core.tiles import Axis
from jquant.kernels import fake_quant as fused
from jquant.kernels import packed_mma, packed_wgmma, quantize_rows, w8a8_wgmma
from jquant.kernels.options import for_tpu
from jquant.kernels.packed_matmul import fits, packed_matmul

# Up to so many rows of x a packed product is faster than decoding the weight first (bench_gpu.py).
FEW_ROWS, FEW_ROWS_ON_HOPPER = 128, 3072

# For programs with many products of float32: among kernels of its own XLA looks for a second a shape. cuBLAS's are up
# to a quarter slower (GPTQ's solver of 4096 in, 14336 out, as it once was: 11.3 s to compile or 2.6, 15 to 20 ms to run
# on an H100), which the few blocks of a model do not make up for.
WITHOUT_TRITON_GEMM = {"xla_gpu_enable_triton_gemm": False}

Mode = Literal["auto", "jnp", "interpret", "tpu"]
Way = Literal["jnp", "kernel", "interpret"]

_chosen: list[Mode] = []  # of `override`, the innermost last
_in_a_hurry: list[bool] = []  # an entry for each `quick_compilation` that has begun


def way() -> Way:
    """How kernels run here and now. Ask outside of jit, or make the answer a static argument."""
    mode = _chosen[-1] if _chosen else os.environ.get("JQUANT_KERNELS", "auto")
    if mode not in get_args(Mode):
        raise InputError(f"JQUANT_KERNELS={mode}: it must be one of {', '.join(get_args(Mode))}")
    if mode == "interpret":
        return "interpret"
    there = mode != "jnp" and (on_cuda() or (mode == "tpu" and jax.default_backend() == "tpu"))
    return "kernel" if there and jax.device_count() == 1 else "jnp"


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Programs are to be ready soon rather than as fast as can be: for work of seconds, as a model's quantization."""
    _in_a_hurry.append(True)
    try:
        yield
    finally:
        _in_a_hurry.pop()


def compiles_quickly() -> bool:
    """Whether it is so here and now, in any thread."""
    return bool(_in_a_hurry)


def multiply_packed(
    x: Float[Array, "*batch in"], q: QTensor, *, dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch out"] | None:
    """x · dequantize(q)ᵀ in `dtype`, by a kernel; None where decoding the weight first is faster, or all there is.

    The gradient of x is that of the product; q has none. Under vmap over x all rows go into one product.
    """
    rows = x.size // x.shape[-1]
    if x.dtype != jnp.bfloat16 or rows == 0 or _kernel_for(rows, q) is None:
        return None
    found: Any = _product(x.reshape(rows, -1), q, jnp.dtype(dtype))
    return found.reshape(*x.shape[:-1], -1)


def _kernel_for(rows: int, q: QTensor) -> Callable[[Array, QTensor, np.dtype[Any]], Array] | None:
    how = way()
    if how == "kernel" and on_hopper():
        if packed_mma.fits(q, rows):
            return lambda x, q, dtype: packed_mma.packed_matmul(x, q, dtype=dtype)
        if packed_wgmma.fits(q, rows):
            many = rows > FEW_ROWS_ON_HOPPER
            return None if many else lambda x, q, dtype: packed_wgmma.packed_matmul(x, q).astype(dtype)
    if how == "jnp" or rows > FEW_ROWS or not fits(q) or for_tpu():
        return None
    return lambda x, q, dtype: packed_matmul(x, q, interpret=how == "interpret").astype(dtype)


def multiply_as_codes(
    x: Float[Array, "rows in"], weight: QTensor, activation: Scheme, bias: Float[Array, " out"] | None = None
) -> BFloat16[Array, "rows out"] | None:
    """x̂ · dequantize(weight)ᵀ + bias of x quantized a row, as codes, by kernels; None where there are none.

    No gradient: codes have none, and nn/w8a8.py has its own. Under vmap over x all rows go into one product.
    """
    if weight.groups is not None or weight.ndim != 2 or not _multiplies(x, weight.shape, weight.scheme, activation):
        return None
    of_rows = jnp.broadcast_to(weight.scales()[:, 0], (weight.shape[0],))
    return _as_codes(activation, jax.lax.stop_gradient(x), weight.planes[0], of_rows, bias)


class Trained(NamedTuple):
    """A product of codes and the values that it is differentiated with."""

    x: BFloat16[Array, "rows in"]
    weight: BFloat16[Array, "out in"]
    product: BFloat16[Array, "rows out"]


def fake_quantize_and_multiply(
    x: Float[Array, "rows in"],
    weight: Float[Array, "out in"],
    schemes: tuple[Scheme, Scheme],
    gradients: tuple[ste.GradientRule, ste.GradientRule],
) -> Trained | None:
    """x̂, Ŵ and x̂ · Ŵᵀ, by kernels that read each operand once; None where there are none. Integers of eight bits.

    Args:
        x: bfloat16.
        weight: float32 masters, or bfloat16.
        schemes: of x and of the weight: per token, per channel.
        gradients: likewise, of the values; the product has none.
    """
    of_x, of_weight = schemes
    if not isinstance(of_weight.granularity, Channel) or not _multiplies(x, weight.shape, of_weight, of_x):
        return None
    operands = (x, weight)
    if not all(fused.fits(scheme, each.shape, each.dtype) for scheme, each in zip(schemes, operands, strict=True)):
        return None
    if not all(rule in (ste.clipped_ste, ste.ste) for rule in gradients):
        return None
    clipped = [rule is ste.clipped_ste and ste.clips(each) for rule, each in zip(gradients, schemes, strict=True)]
    rows = fused.fake_quantize_and_encode(x, of_x, codes="signed", clipped=clipped[0])
    matrix = fused.fake_quantize_and_encode(weight, of_weight, codes="packed", clipped=clipped[1], dtype=x.dtype)
    codes = jax.lax.stop_gradient((rows.codes, rows.scale, matrix.codes, matrix.scale))
    return Trained(rows.value, matrix.value, _multiply_codes(*codes))


def _multiplies(x: Array, shape: tuple[int, ...], weight: Scheme, activation: Scheme) -> bool:
    """Whether a kernel multiplies the codes of both as they are: int8 of eight bits, or fp8 e4m3."""
    if x.dtype != jnp.bfloat16 or way() != "kernel" or not on_hopper():
        return False
    elements: tuple[Element, Element] = (weight.element, activation.element)
    integers = all(isinstance(each, Int) and each.bits == 8 for each in elements)
    if not integers and not all(each.name == "fp8_e4m3" for each in elements):
        return False
    if weight.zero_point != "none" or not isinstance(weight.granularity, Channel | Tensor):
        return False
    return quantize_rows.fits(activation, shape[1], x.dtype) and w8a8_wgmma.fits(len(x), *shape)


def _as_codes(activation: Scheme, x: Array, packed: Array, of_rows: Array, bias: Array | None) -> Array:
    @jax.custom_batching.custom_vmap
    def product(x: Array, packed: Array, of_rows: Array, bias: Array | None) -> Array:
        codes, scales = quantize_rows.quantize_rows(x, activation)
        packed = packed if codes.dtype == jnp.int8 else jax.lax.bitcast_convert_type(packed, codes.dtype)
        wide = None if bias is None else bias.astype(jnp.float32)
        return w8a8_wgmma.matmul(codes, packed, scales, of_rows, wide)

    @product.def_vmap
    def batch(size: int, batched: Any, x: Array, *others: Any) -> tuple[Array, bool]:
        return _all_rows_at_once(product, size, batched, (x, *others))

    return product(x, packed, of_rows, bias)


@jax.custom_batching.custom_vmap
def _multiply_codes(codes: Array, scales: Array, packed: Array, of_rows: Array) -> Array:
    return w8a8_wgmma.matmul(codes, packed, scales, of_rows)


@_multiply_codes.def_vmap
def _multiply_batch(size: int, batched: Any, *operands: Array) -> tuple[Array, bool]:
    return _all_rows_at_once(_multiply_codes, size, batched, operands, of_rows=2)


def _decode_and_multiply(x: Array, q: QTensor, dtype: np.dtype[Any]) -> Array:
    weight = dequantize(q, x.dtype)
    product = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return product.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, q: QTensor, dtype: np.dtype[Any]) -> Array:
    return _batched(x, q, dtype)


def _product_forward(x: Array, q: QTensor, dtype: np.dtype[Any]) -> tuple[Array, QTensor]:
    return _batched(x, q, dtype), q


def _product_backward(_: np.dtype[Any], q: QTensor, cotangent: Array) -> tuple[Array, None]:
    return jnp.matmul(cotangent.astype(jnp.bfloat16), dequantize(q, jnp.bfloat16)), None


_product.defvjp(_product_forward, _product_backward)


def _batched(x: Array, q: QTensor, dtype: np.dtype[Any]) -> Array:
    @jax.custom_batching.custom_vmap
    def product(x: Array, q: QTensor) -> Array:
        return (_kernel_for(len(x), q) or _decode_and_multiply)(x, q, dtype)

    @product.def_vmap
    def batch(size: int, batched: Any, x: Array, q: QTensor) -> tuple[Array, bool]:
        return _all_rows_at_once(product, size, batched, (x, q))

    return product(x, q)


def _all_rows_at_once(
    product: Callable[..., Array], size: int, batched: Sequence[Any], operands: tuple[Any, ...], *, of_rows: int = 1
) -> tuple[Array, bool]:
    """A rule for vmap: rows of all go into one product; of weights of their own, as experts have, one after another.

    The first `of_rows` operands have rows along their first axis.
    """
    if any(jax.tree.leaves(batched[of_rows:])) or not all(batched[:of_rows]):
        each = jax.tree.map(
            lambda leaf, is_: leaf if is_ else jnp.broadcast_to(leaf, (size, *leaf.shape)), operands, tuple(batched)
        )
        return jax.lax.map(lambda one: product(*one), each), True
    rows = [each.reshape(-1, *each.shape[2:]) for each in operands[:of_rows]]
    return product(*rows, *operands[of_rows:]).reshape(size, operands[0].shape[1], -1), True


def fake_quantize(
    x: Float[Array, "..."],
    scheme: Scheme,
    *,
    gradient: ste.GradientRule | None = None,
    outer: Float[Array, "*batch 1 1"] | None = None,
    axis: Axis = -1,
    dtype: DTypeLike | None = None,
    keep: fused.Keep = "input",
) -> Float[Array, "..."]:
    """`core.ste.fake_quantize`, by the kernel where there is one.

    Args:
        x: [..., out, in], or [..., in, out] where the axis is −2.
        scheme: of x; static under jit.
        gradient: as there; a rule of one's own is never the kernel's.
        outer: as there; the kernel is for other scales.
        axis: of the inputs.
        dtype: of the result, rounded once from float32; by default that of x.
        keep: see `kernels.fake_quant.fake_quantize`.
    """
    how = way()
    gradient = ste.clipped_ste if gradient is None else gradient
    if how != "jnp" and gradient in (ste.clipped_ste, ste.ste) and fused.fits(scheme, x.shape, x.dtype, axis):
        clipped = gradient is ste.clipped_ste and ste.clips(scheme)
        return fused.fake_quantize(
            x, scheme, clipped=clipped, axis=axis, dtype=dtype, keep=keep, interpret=how == "interpret"
        )
    dtype = x.dtype if dtype is None else dtype
    wide = x if dtype == x.dtype else x.astype(jnp.float32)  # or it would be rounded to the dtype of x first
    kept = "mask" if keep == "input" else "input"
    return ste.fake_quantize(wide, scheme, gradient=gradient, outer=outer, keep=kept, axis=axis).astype(dtype)


@contextlib.contextmanager
def override(mode: Mode) -> Iterator[None]:
    """Another mode than JQUANT_KERNELS says. Forgets all compiled programs, as those of models hold what was chosen."""
    _chosen.append(mode)
    jax.clear_caches()
    try:
        yield
    finally:
        _chosen.pop()
        jax.clear_caches()


def on_cpu() -> bool:
    """Whether programs run on CPU by default, where sizes of stretches and batches are others."""
    return jax.default_backend() == "cpu"


def on_hopper() -> bool:
    """Whether it is one of compute capability 9.0, whose tensor cores kernels/packed_wgmma.py is for."""
    return on_cuda() and float(jax.devices()[0].compute_capability) == 9.0


def on_cuda() -> bool:
    """Whether programs run by default on an NVIDIA GPU that has what kernels use: compute capability 8.0, of Ampere."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    cuda = "cuda" in getattr(device.client, "platform_version", "").lower()
    return cuda and float(getattr(device, "compute_capability", 0)) >= 8.0
