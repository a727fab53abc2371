"""One quantized layer as other tools store it: a weight and, where the input is quantized too, how.

A format is a module with functions of these; the tensors of a layer go by the names behind the layer's own, as
"weight_packed".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, from_codes
from jquant.core.scales import FloatScale, StoredScale
from jquant.core.scheme import Channel, Group, Scheme

Arrays = Mapping[str, np.ndarray]
# Scales of GPTQ and AWQ: float16, which is what is written here; GPTQModel keeps those of a bfloat16 model as they are.
HALF_SCALES = {np.dtype(np.float16): FloatScale("fp16"), np.dtype(ml_dtypes.bfloat16): FloatScale("bf16")}


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """What a layer's tensors say."""

    weight: QTensor
    activation: Scheme | None = None  # of the input
    input_scale: ArrayLike | None = None  # of an activation's `tensor` scheme
    input_zero_point: ArrayLike | None = None


def built(
    codes: np.ndarray,
    scheme: Scheme,
    scale: np.ndarray,
    *,
    scale2: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    zero_points: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    dtype: np.dtype,
) -> QTensor:
    """The tensor of codes [out, in], with scales as stored."""
    return _built(scheme, dtype, codes, StoredScale(scale, scale2, offset), zero_points, groups)  # type: ignore[arg-type]


@partial(jax.jit, static_argnums=(0, 1))
def _built(
    scheme: Scheme,
    dtype: np.dtype,
    codes: jax.Array,
    stored: StoredScale,
    zero_points: jax.Array | None,
    groups: jax.Array | None,
) -> QTensor:
    return from_codes(codes, scheme, stored, zero_points=zero_points, dtype=dtype, groups=groups)


@jax.jit
def codes_of(q: QTensor) -> jax.Array:
    """Unpacked codes."""
    return q.codes()


@jax.jit
def zero_points_of(q: QTensor) -> jax.Array | None:
    """The code of zero in each tile."""
    return q.zero_points()


def group_size(scheme: Scheme) -> int:
    """−1 for one scale a channel, as all formats here write it. Raises InputError of another granularity."""
    match scheme.granularity:
        case Channel():
            return -1
        case Group(size):
            return size
    raise InputError(f"scales per {scheme.granularity}")


def check_whole_groups(q: QTensor, what: str) -> None:
    """Raises InputError where the last group of a row is shorter."""
    match q.scheme.granularity:
        case Group(size) if q.matrix_shape[1] % size:
            columns = q.matrix_shape[1]
            nearest = max(divisor for divisor in range(1, size) if columns % divisor == 0)
            raise InputError(f"{what}: groups of {size} do not divide {columns} inputs: groups of {nearest} would")


def required(arrays: Arrays, name: str, dtypes: tuple[np.dtype | type, ...], ndim: int, what: str) -> np.ndarray:
    """The array of that name. Raises InputError where it is missing, or of another dtype or number of axes."""
    if name not in arrays:
        raise InputError(f"{what}: tensor {name} is missing")
    array = arrays[name]
    if array.dtype not in [np.dtype(dtype) for dtype in dtypes] or array.ndim != ndim:
        kinds = ", ".join(str(np.dtype(dtype)) for dtype in dtypes)
        raise InputError(f"{what}: {name} is {array.dtype} of {array.ndim} axes; it must be {kinds} of {ndim}")
    return array


def check_shape(array: np.ndarray, shape: tuple[int, ...], name: str, what: str) -> None:
    """Raises InputError where the shape is another."""
    if array.shape != shape:
        raise InputError(f"{what}: {name} has shape {array.shape}; it must be {shape}")
