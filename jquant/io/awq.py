"""AWQ checkpoints in the GEMM layout, as AutoAWQ writes them: 4 bits, scales in float16, zero points in codes.

    qweight   int32 [in, out/8]          eight outputs a word, nibble i holding output ORDER[i]
    qzeros    int32 [groups, out/8]      likewise
    scales    float16 [groups, out]      GPTQModel also writes bfloat16, which is read, not written

Symmetric weights have zeros of 8, and are read back as symmetric where all zeros of the checkpoint are 8.

Reference: AutoAWQ, `modules/linear/gemm.py`; SPEC 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.qtensor import QTensor
from jquant.core.scales import FloatScale
from jquant.core.scheme import Channel, Group, Scheme
from jquant.io.packed_layer import (
    HALF_SCALES,
    Arrays,
    PackedLayer,
    built,
    check_shape,
    check_whole_groups,
    codes_of,
    group_size,
    required,
    zero_points_of,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TENSORS = ("qweight", "qzeros", "scales")


def check(scheme: Scheme, activation: Scheme | None) -> None:
    """Raises InputError, naming the nearest scheme, where the format cannot hold these."""
    if activation is not None:
        raise InputError(f"AWQ checkpoints hold no {activation} activations: use compressed-tensors")
    where = scheme.granularity if isinstance(scheme.granularity, Channel | Group) else Group(128)
    fits = isinstance(scheme.element, Int) and scheme.element.bits == 4 and where == scheme.granularity
    if not fits or scheme.scale != FloatScale("fp16"):
        raise InputError(
            f"AWQ checkpoints hold int4 with float16 scales, not {scheme}: the nearest is int4:{where}:asym:fp16"
        )


def layer_tensors(q: QTensor, *, what: str) -> dict[str, np.ndarray]:
    """The layer's tensors. Raises InputError where the format cannot hold it."""
    check(q.scheme, None)
    check_whole_groups(q, what)
    rows = q.matrix_shape[0]
    if rows % 8:
        raise InputError(f"{what}: {rows} outputs fill no whole words of 8: AWQ cannot hold it")
    if q.groups is not None:
        raise InputError(f"{what}: its groups are not of neighbours (act-order dynamic): AWQ cannot hold it; use gptq")
    scales, found = np.asarray(q.stored.scale), zero_points_of(q)
    zeros = np.full(scales.shape, 8, np.uint8) if found is None else np.asarray(found)
    return {
        "qweight": _packed(np.asarray(codes_of(q)).T),
        "qzeros": _packed(zeros.T),
        "scales": np.ascontiguousarray(scales.T),
    }


def read_layer(
    arrays: Arrays, config: Mapping[str, Any], *, symmetric: bool, dtype: np.dtype, what: str
) -> PackedLayer:
    """The layer that these tensors are. Raises InputError where they do not fit together."""
    qweight = required(arrays, "qweight", (np.int32,), 2, what)
    qzeros = required(arrays, "qzeros", (np.int32,), 2, what)
    scales = required(arrays, "scales", tuple(HALF_SCALES), 2, what)
    columns, rows, groups = qweight.shape[0], qweight.shape[1] * 8, scales.shape[0]
    size = columns if config["group_size"] == -1 else config["group_size"]
    if size < 1 or size > columns or groups != -(-columns // size):
        raise InputError(f"{what}: {groups} groups of {size} for {columns} inputs do not fit together")
    check_shape(scales, (groups, rows), "scales", what)
    check_shape(qzeros, (groups, rows // 8), "qzeros", what)
    scheme = Scheme(
        element=Int(4),
        granularity=Channel() if config["group_size"] == -1 else Group(size),
        scale=HALF_SCALES[scales.dtype],
        zero_point="none" if symmetric else "integer",
    )
    codes = np.ascontiguousarray(_unpacked(qweight).T)
    zeros = None if symmetric else np.ascontiguousarray(_unpacked(qzeros).T)
    q = built(codes, scheme, np.ascontiguousarray(scales.T), zero_points=zeros, dtype=dtype)
    return PackedLayer(weight=q)


def all_zeros_are_8(qzeros: np.ndarray) -> bool:
    """Whether a layer's zero points are those of symmetric weights."""
    return bool((qzeros.view(np.uint32) == 0x88888888).all())


def quantization_config(schemes: Mapping[str, Scheme], *, kept: list[str]) -> dict[str, Any]:
    """Of config.json. All layers have one group size; `kept` are the linear layers that stay floats.

    Raises:
        InputError: they have not.
    """
    sizes = {group_size(scheme) for scheme in schemes.values()}
    if len(sizes) != 1:
        raise InputError(
            f"AWQ checkpoints have one group size, not {', '.join(map(str, sorted(sizes)))}: use compressed-tensors"
        )
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop(),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept or None,
    }


def read_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields that reading needs. Raises InputError where one is missing or of an unknown kind."""
    version, bits, size = config.get("version", "gemm"), config.get("bits", 4), config.get("group_size", 128)
    if str(version).lower() != "gemm" or bits != 4:
        raise InputError(f"{source}: AWQ of {bits!r} bits in version {version!r} is not read; 4 bits in gemm is")
    if type(size) is not int or size < -1 or size == 0:
        raise InputError(f"{source}: group_size {size!r}; it must be −1 or at least 1")
    return {"group_size": size}


def _packed(nibbles: np.ndarray) -> np.ndarray:
    """uint8 [n, out] to int32 [n, out/8]."""
    eights = nibbles.reshape(len(nibbles), -1, 8)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for place, column in enumerate(ORDER):
        words |= eights[..., column].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def _unpacked(words: np.ndarray) -> np.ndarray:
    """The inverse of `_packed`."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    nibbles = np.empty((*words.shape, 8), np.uint8)
    for place, column in enumerate(ORDER):
        nibbles[..., column] = (unsigned >> np.uint32(4 * place)) & np.uint32(15)
    return nibbles.reshape(len(words), -1)
