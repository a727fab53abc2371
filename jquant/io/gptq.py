"""GPTQ checkpoints, as GPTQModel and AutoGPTQ write them: integers of 2, 3, 4 or 8 bits, scales in float16.

    qweight   int32 [in·b/32, out]       codes 0 … 2^b − 1, packed along the inputs
    qzeros    int32 [groups, out·b/32]   the codes of zero, packed along the outputs
    scales    float16 [groups, out]      of bfloat16 models also bfloat16, which is read, not written
    g_idx     int32 [in]                 the group of each input; with act-order in no particular order

Version 1 ("gptq") stores zeros minus one, whole words at a time, where a 0 would borrow: it cannot hold one. Version 2
("gptq_v2") stores them as they are. Symmetric weights have zeros of 2^(b−1).

Reference: GPTQModel, `nn_modules/qlinear`; SPEC 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.qtensor import QTensor
from jquant.core.scales import FloatScale
from jquant.core.scheme import Channel, Group, Scheme
from jquant.io.bit_stream import pack_words, unpack_words
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

Version = Literal["gptq", "gptq_v2"]
BITS = (2, 3, 4, 8)
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def check(scheme: Scheme, activation: Scheme | None) -> None:
    """Raises InputError, naming the nearest scheme, where the format cannot hold these."""
    if activation is not None:
        raise InputError(f"GPTQ checkpoints hold no {activation} activations: use compressed-tensors")
    element = scheme.element
    bits = element.bits if isinstance(element, Int) and element.bits in BITS else 4
    where = scheme.granularity if isinstance(scheme.granularity, Channel | Group) else Group(128)
    zero = ":asym" if scheme.zero_point == "integer" else ""
    nearest = f"int{bits}:{where}{zero}:fp16"
    fits = isinstance(element, Int) and element.bits in BITS and where == scheme.granularity
    if not fits or scheme.scale != FloatScale("fp16"):
        raise InputError(f"GPTQ checkpoints hold int2, int3, int4, int8 with float16 scales, not {scheme}: {nearest}")


def layer_tensors(q: QTensor, *, version: Version, what: str) -> dict[str, np.ndarray]:
    """The layer's tensors. Raises InputError where the format cannot hold it."""
    check(q.scheme, None)
    check_whole_groups(q, what)
    bits, (rows, columns) = q.scheme.element.bits, q.matrix_shape
    for name, size in (("inputs", columns), ("outputs", rows)):
        if size * bits % 32:
            raise InputError(f"{what}: {size} {name} of {bits} bits fill no whole words of 32: GPTQ cannot hold it")
    groups = q.stored.scale.shape[-1]
    found = zero_points_of(q)
    zeros = np.full((rows, groups), 2 ** (bits - 1), np.uint8) if found is None else np.asarray(found)
    if version == "gptq" and not zeros.all():
        raise InputError(f"{what}: has a zero point of 0, which version 1 of GPTQ's format cannot hold: use gptq_v2")
    stored = zeros - np.uint8(version == "gptq")
    order = np.arange(columns, dtype=np.int32) // (columns // groups) if q.groups is None else np.asarray(q.groups)
    return {
        "qweight": np.ascontiguousarray(pack_words(np.asarray(codes_of(q)), bits).T),
        "qzeros": pack_words(np.ascontiguousarray(stored.T), bits),
        "scales": np.ascontiguousarray(np.asarray(q.stored.scale).T),
        "g_idx": order.astype(np.int32),
    }


def read_layer(arrays: Arrays, config: Mapping[str, Any], *, dtype: np.dtype, what: str) -> PackedLayer:
    """The layer that these tensors are. Raises InputError where they do not fit together."""
    bits = config["bits"]
    qweight = required(arrays, "qweight", (np.int32,), 2, what)
    qzeros = required(arrays, "qzeros", (np.int32,), 2, what)
    scales = required(arrays, "scales", tuple(HALF_SCALES), 2, what)
    columns, rows, groups = qweight.shape[0] * 32 // bits, qweight.shape[1], scales.shape[0]
    size = columns if config["group_size"] == -1 else config["group_size"]
    if size < 1 or size > columns or groups != -(-columns // size):
        raise InputError(f"{what}: {groups} groups of {size} for {columns} inputs do not fit together")
    check_shape(scales, (groups, rows), "scales", what)
    check_shape(qzeros, (groups, rows * bits // 32), "qzeros", what)
    codes = unpack_words(np.ascontiguousarray(qweight.T), bits, columns)
    zeros = unpack_words(qzeros, bits, rows).T
    if config["version"] == "gptq":
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    granularity = Channel() if groups == 1 and config["group_size"] == -1 else Group(size)
    symmetric = bool(config["sym"])
    if symmetric and (zeros != 2 ** (bits - 1)).any():
        raise InputError(f"{what}: is said to be symmetric and has zero points other than {2 ** (bits - 1)}")
    scheme = Scheme(
        element=Int(bits),
        granularity=granularity,
        scale=HALF_SCALES[scales.dtype],
        zero_point="none" if symmetric else "integer",
    )
    order = arrays.get("g_idx")
    by_column = None
    if order is not None:
        check_shape(order, (columns,), "g_idx", what)
        if not np.array_equal(order, np.arange(columns) // size):
            by_column = np.asarray(order, np.int32)
            counts = np.bincount(np.clip(by_column, 0, groups - 1), minlength=groups)
            if by_column.min() < 0 or by_column.max() >= groups or (counts[:-1] != size).any():
                raise InputError(f"{what}: g_idx does not put {size} inputs into each of {groups} groups")
    return PackedLayer(
        weight=built(
            codes,
            scheme,
            np.ascontiguousarray(scales.T),
            zero_points=None if symmetric else np.ascontiguousarray(zeros),
            groups=by_column,
            dtype=dtype,
        )
    )


def quantization_config(schemes: Mapping[str, Scheme], *, version: Version, act_order: bool) -> dict[str, Any]:
    """Of config.json, and quantize_config.json beside it. All layers have one scheme.

    Raises:
        InputError: they have not.
    """
    kinds = list(dict.fromkeys(schemes.values()))
    if len(kinds) != 1:
        raise InputError(
            f"GPTQ checkpoints have one scheme for all layers, not {', '.join(map(str, kinds))}: use compressed-tensors"
        )
    scheme = kinds[0]
    return {
        "quant_method": "gptq",
        "bits": scheme.element.bits,
        "group_size": group_size(scheme),
        "sym": scheme.zero_point == "none",
        "desc_act": act_order,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": False,
    }


def read_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields that reading needs. Raises InputError where one is missing or of an unknown kind."""
    version = config.get("checkpoint_format") or ("gptq_v2" if config.get("is_marlin_format") else "gptq")
    found = {"bits": config.get("bits"), "group_size": config.get("group_size"), "sym": config.get("sym", True)}
    if version not in ("gptq", "gptq_v2"):
        raise InputError(f"{source}: checkpoint_format {version!r} of GPTQ is not read; there are gptq, gptq_v2")
    if found["bits"] not in BITS or type(found["bits"]) is not int:
        raise InputError(f"{source}: GPTQ of {found['bits']!r} bits; there are {', '.join(map(str, BITS))}")
    if type(found["group_size"]) is not int or found["group_size"] < -1 or found["group_size"] == 0:
        raise InputError(f"{source}: group_size {found['group_size']!r}; it must be −1 or at least 1")
    if type(found["sym"]) is not bool:
        raise InputError(f"{source}: sym is {found['sym']!r}; it must be true or false")
    if config.get("dynamic"):
        raise InputError(f"{source}: GPTQ with settings of single layers (`dynamic`) is not read")
    return found | {"version": version}
