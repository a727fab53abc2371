"""Rows of a `QTensor` taken, reordered or joined with another's, without decoding: what checkpoints with fused
projections, or with rows in another order, need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jquant.core import packing
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scales import DoubleQuantizedScale
from jquant.core.scheme import Tensor


def take_rows(q: QTensor, rows: np.ndarray, what: str = "tensor") -> QTensor:
    """The rows of these indices, in this order; codes, scales and zero points are those that q holds.

    Args:
        q: [..., out, in].
        rows: integers [n], each below out.
        what: names the tensor in errors.

    Raises:
        InputError: the scheme's scales reach over several rows, so that a part of them has none of its own.
    """
    if len(rows) == q.matrix_shape[0] and (rows == np.arange(len(rows))).all():
        return q
    index = jnp.asarray(rows)
    planes = tuple(jnp.take(plane, index, axis=-2) for plane in q.planes)
    taken = dataclasses.replace(q, planes=planes, matrix_shape=(len(rows), q.matrix_shape[1]))
    if _in_blocks(q) or isinstance(q.scheme.granularity, Tensor):
        return taken
    _check_a_scale_a_row(q, what)
    zero_planes = None
    if q.zero_planes is not None:
        zeros = jnp.take(_zeros(q), index, axis=-2)
        zero_planes = packing.pack(zeros.swapaxes(-1, -2), q.scheme.element.bits)
    stored = q.stored._replace(scale=jnp.take(q.stored.scale, index, axis=-2))
    return dataclasses.replace(taken, stored=stored, zero_planes=zero_planes)


def join_rows(parts: Sequence[QTensor], what: str = "tensor") -> QTensor:
    """The rows of one after those of another; `take_rows` gives each back.

    Raises:
        InputError: the schemes differ, or a scale that belongs to a whole matrix does.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        if (other.scheme, other.matrix_shape[1]) != (first.scheme, first.matrix_shape[1]):
            raise InputError(
                f"{what}: {first.scheme} and {other.scheme} cannot be joined in one layer: quantize all of its parts "
                "in one scheme"
            )
        if not _equal(first.groups, other.groups):
            raise InputError(f"{what}: its parts group their inputs in different orders: quantize without act-order")
    rows = sum(part.matrix_shape[0] for part in parts)
    planes = tuple(jnp.concatenate(each, axis=-2) for each in zip(*(part.planes for part in parts), strict=True))
    joined = dataclasses.replace(first, planes=planes, matrix_shape=(rows, first.matrix_shape[1]))
    if _in_blocks(first):
        return joined
    shared = ("scale2", "offset") if _a_scale_a_row(first) else ("scale", "scale2", "offset")
    for part in parts[1:]:
        for name in shared:
            if not _equal(getattr(first.stored, name), getattr(part.stored, name)):
                raise InputError(
                    f"{what}: {first.scheme} has scales of a whole matrix, which differ between the parts of this "
                    "joined layer: choose a scheme with scales a group or a channel"
                )
    if isinstance(first.scheme.granularity, Tensor) and all(_equal(_zeros(first), _zeros(part)) for part in parts[1:]):
        return joined
    for part in parts:
        _check_a_scale_a_row(part, what)
    scale = jnp.concatenate([part.stored.scale for part in parts], axis=-2)
    zero_planes = None
    if first.zero_planes is not None:
        zeros = jnp.concatenate([_zeros(part) for part in parts], axis=-2)  # pyright: ignore[reportArgumentType]
        zero_planes = packing.pack(zeros.swapaxes(-1, -2), first.scheme.element.bits)
    return dataclasses.replace(joined, stored=first.stored._replace(scale=scale), zero_planes=zero_planes)


def _in_blocks(q: QTensor) -> bool:
    return q.scheme.block is not None


def _a_scale_a_row(q: QTensor) -> bool:
    return q.scheme.tile(*q.matrix_shape)[0] == 1


def _check_a_scale_a_row(q: QTensor, what: str) -> None:
    if not _a_scale_a_row(q) or isinstance(q.scheme.scale, DoubleQuantizedScale):
        raise InputError(
            f"{what}: scales of {q.scheme} reach over several rows, so its rows cannot be taken apart or joined: "
            "choose a scheme with scales a group or a channel"
        )


def _zeros(q: QTensor) -> Array:
    zeros = q.zero_points()
    return jnp.zeros(()) if zeros is None else zeros


def _equal(a: jax.Array | None, b: jax.Array | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(np.array_equal(np.asarray(a), np.asarray(b)))
