"""x · dequantize(Q)ᵀ for few rows of x, from the packed codes: what a matrix takes to read is what the product takes.

    y = Σ_groups s_g · Σ_{k in g} x_k·(code_k − zero)

A program takes `rows` of the weight and walks along the inputs. A byte holds 8/bits neighbours, so it is met by as many
slices of x, each every (8/bits)-th input of it: nothing is put back in order. Levels are exact in bfloat16 (but for
codebooks, rounded once); products are summed in float32, a group at a time where groups are wide, and then scaled.

Reference: Frantar et al., MARLIN, 2408.11743, for what bounds such kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jquant.core.formats import Codebook, Element, Int
from jquant.core.formats import Float as FloatElement
from jquant.core.qtensor import QTensor

_SLOTS = 16  # rows of x are padded to at least so many: what a tensor core takes


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut."""

    rows: int = 64  # of the weight, a program
    inputs: int = 128  # a step
    warps: int = 4
    stages: int = 3


def fits(q: QTensor) -> bool:
    """Whether the kernel reads such a weight: one plane of codes, groups of neighbours in a row."""
    element = q.scheme.element
    if q.scheme.block is not None or q.groups is not None or q.ndim != 2 or element.bits not in (2, 4, 8):
        return False
    if not (isinstance(element, Int | FloatElement) or (isinstance(element, Codebook) and element.bits <= 4)):
        return False
    tile_rows, group = q.scheme.tile(*q.matrix_shape)
    rows, columns = q.matrix_shape
    return tile_rows == 1 and rows % 64 == 0 and columns % 256 == 0 and (group % 256 == 0 or 256 % group == 0)


def packed_matmul(
    x: Float[Array, "batch in"], q: QTensor, *, tiling: Tiling | None = None, interpret: bool = False
) -> Float32[Array, "batch out"]:
    """x · dequantize(q)ᵀ.

    Args:
        x: rounded to bfloat16.
        q: `fits(q)` must hold.
        tiling: by default what was fastest on an H100.
        interpret: run the kernel's operations one by one, on any platform.
    """
    from jax.experimental import pallas as pl

    tiling = Tiling() if tiling is None else tiling
    out, columns = q.matrix_shape
    element = q.scheme.element
    neighbours = 8 // element.bits
    batch = len(x)
    slots = max(_SLOTS, 1 << (batch - 1).bit_length())
    slices = jnp.pad(x.astype(jnp.bfloat16), ((0, slots - batch), (0, 0)))
    slices = slices.T.reshape(columns // neighbours, neighbours, slots).swapaxes(0, 1)
    table = jnp.asarray(_table(element), jnp.bfloat16)
    zero = q.zero_points()
    scales = q.scales()
    operands = [q.planes[0], slices, scales, *([] if zero is None else [zero.astype(jnp.float32)]), table]
    whole = [pl.BlockSpec(each.shape, partial(_origin, each.ndim)) for each in operands]
    whole[0] = pl.BlockSpec((tiling.rows, columns // neighbours), lambda i: (i, 0))
    for index in range(2, len(operands) - 1):
        whole[index] = pl.BlockSpec((tiling.rows, scales.shape[1]), lambda i: (i, 0))
    group = q.scheme.tile(out, columns)[1]
    found = pl.pallas_call(
        partial(_kernel, element, group, zero is not None, tiling, columns),
        grid=(out // tiling.rows,),
        in_specs=whole,
        out_specs=pl.BlockSpec((tiling.rows, slots), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((out, slots), jnp.float32),
        interpret=interpret,
        name="packed_matmul",
        **_options(interpret, tiling),
    )(*operands)
    return found[:, :batch].T


def _origin(ndim: int, _: Any) -> tuple[int, ...]:
    return (0,) * ndim


def _kernel(
    element: Element, group: int, has_zero: bool, tiling: Tiling, columns: int, codes: Any, x: Any, *refs: Any
) -> None:
    from jax.experimental import pallas as pl

    scales, zeros, table, out = (refs[0], refs[1], refs[2], refs[3]) if has_zero else (refs[0], None, refs[1], refs[2])
    neighbours = 8 // element.bits
    width = tiling.inputs // neighbours

    def one_step(step: Any, total: Array) -> Array:
        packed = codes[:, pl.ds(step * width, width)].astype(jnp.int32)
        part = jnp.zeros(total.shape, jnp.float32)
        for index in range(neighbours):
            code = (packed >> (element.bits * index)) & (2**element.bits - 1)
            level = _levels(
                code, element, None if group < tiling.inputs else zeros, table, step * tiling.inputs // group
            )
            if group < tiling.inputs:
                level = _scaled(level, element, scales, zeros, step, group // neighbours, tiling.inputs // group)
            part += jnp.dot(level, x[index, pl.ds(step * width, width), :], preferred_element_type=jnp.float32)
        if group < tiling.inputs:
            return total + part
        return total + part * scales[:, step * tiling.inputs // group][:, None]

    start = jnp.zeros((tiling.rows, x.shape[-1]), jnp.float32)
    out[...] = jax.lax.fori_loop(0, columns // tiling.inputs, one_step, start)


def _levels(code: Array, element: Element, zeros: Any, table: Any, group: Any) -> Array:
    """The levels of codes, in bfloat16."""
    if isinstance(element, Int):
        origin = jnp.float32(element.offset) if zeros is None else zeros[:, group][:, None]
        if element.bits == 8:
            return (code.astype(jnp.float32) - origin).astype(jnp.bfloat16)
        # 128 + code has these bits in bfloat16: no conversion.
        raised = jax.lax.bitcast_convert_type((code | 0x4300).astype(jnp.int16), jnp.bfloat16)
        return raised - (origin + 128.0).astype(jnp.bfloat16)
    if isinstance(element, FloatElement):
        magnitude = code & (2 ** (element.bits - 1) - 1)
        sign = (code >> (element.bits - 1)) << 15
        bits = (magnitude << (7 - element.mantissa_bits)) + ((127 - element.bias) << 7)
        normal = jax.lax.bitcast_convert_type((bits | sign).astype(jnp.int16), jnp.bfloat16)
        tiny = magnitude.astype(jnp.float32) * jnp.where(sign > 0, -element.smallest, element.smallest)
        return jnp.where(magnitude >> element.mantissa_bits > 0, normal, tiny.astype(jnp.bfloat16))
    return table[code]


def _scaled(level: Array, element: Element, scales: Any, zeros: Any, step: Any, width: int, count: int) -> Array:
    """Levels times the scales of narrow groups, `count` of them in a step, rounded to bfloat16 as a decoded weight."""
    from jax.experimental import pallas as pl

    rows = level.shape[0]
    scale = scales[:, pl.ds(step * count, count)]
    spread = level.reshape(rows, count, width).astype(jnp.float32)
    if zeros is not None:
        assert isinstance(element, Int), "others have no zero point"
        spread = spread - (zeros[:, pl.ds(step * count, count)] - element.offset)[:, :, None]
    return (spread * scale[:, :, None]).astype(jnp.bfloat16).reshape(level.shape)


def _table(element: Element) -> np.ndarray:
    """Levels by code, of codebooks."""
    if not isinstance(element, Codebook):
        return np.zeros(16, np.float32)
    return np.pad(element.levels(), (0, 16 - len(element.values)), mode="edge")


def _options(interpret: bool, tiling: Tiling) -> dict[str, Any]:
    if interpret:
        return {}
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages)}
