"""bitsandbytes checkpoints in 4 bits: NF4 and FP4 in blocks along a row, scales in float32 or quantized in turn.

    weight                                    uint8 [out·in/2, 1], two codes a byte, the first in the high nibble
    weight.absmax                             float32 [blocks], or uint8 codes of the dynamic map for nested scales
    weight.quant_map                          float32 [16], the levels
    weight.nested_absmax, .nested_quant_map   float32, of nested scales: a scale for 256, and the dynamic map's levels
    weight.quant_state.bitsandbytes__nf4      the bytes of a JSON object: shape, block size, offset of nested scales

Blocks run on from row to row; only matrices whose rows are whole blocks are held here, as groups of a row.

Reference: bitsandbytes 0.48, `functional.QuantState`; QLoRA (Dettmers et al., 2305.14314).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.core.formats import ELEMENTS
from jquant.core.qtensor import QTensor
from jquant.core.scales import DYNAMIC_MAP, DoubleQuantizedScale, FloatScale
from jquant.core.scheme import Group, Scheme
from jquant.io.packed_layer import Arrays, PackedLayer, built, check_shape, codes_of, required

_STATE = "weight.quant_state.bitsandbytes__nf4"
TENSORS = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    _STATE,
)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED = 256
_MAX_STATE = 4096  # bytes


def check(scheme: Scheme, activation: Scheme | None) -> None:
    """Raises InputError, naming the nearest scheme, where the format cannot hold these."""
    if activation is not None:
        raise InputError(f"bitsandbytes checkpoints in 4 bits hold no {activation} activations: use compressed-tensors")
    where = scheme.granularity
    fits = scheme.element == ELEMENTS["nf4"] and isinstance(where, Group) and where.size in _BLOCKS
    if not fits or scheme.scale not in (FloatScale("fp32"), DoubleQuantizedScale(_NESTED)):
        raise InputError(
            f"bitsandbytes checkpoints hold nf4 in groups of 32 … 4096, not {scheme}: nf4:g64 or nf4:g64:dq"
        )


def layer_tensors(q: QTensor, *, what: str) -> dict[str, np.ndarray]:
    """The layer's tensors. Raises InputError where the format cannot hold it."""
    check(q.scheme, None)
    assert isinstance(q.scheme.granularity, Group)
    size, (rows, columns) = q.scheme.granularity.size, q.matrix_shape
    if columns % size:
        raise InputError(f"{what}: blocks of {size} do not divide {columns} inputs: bitsandbytes cannot hold it")
    if q.groups is not None:
        raise InputError(f"{what}: its groups are not of neighbours (act-order dynamic): bitsandbytes cannot hold it")
    codes = np.asarray(codes_of(q)).reshape(-1)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": size,
        "dtype": "float32",
        "shape": [rows, columns],
    }
    found = {
        "weight": (codes[0::2] << np.uint8(4) | codes[1::2])[:, None],
        "weight.absmax": np.asarray(q.stored.scale).reshape(-1),
        "weight.quant_map": q.scheme.element.levels().astype(np.float32),
    }
    if isinstance(q.scheme.scale, DoubleQuantizedScale):
        assert q.stored.scale2 is not None
        assert q.stored.offset is not None
        state |= {
            "nested_blocksize": _NESTED,
            "nested_dtype": "float32",
            "nested_offset": float(np.asarray(q.stored.offset).reshape(())),
        }
        found["weight.nested_absmax"] = np.asarray(q.stored.scale2).reshape(-1)
        found["weight.nested_quant_map"] = DYNAMIC_MAP.levels().astype(np.float32)
    return found | {_STATE: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def read_layer(arrays: Arrays, *, dtype: np.dtype, what: str) -> PackedLayer:
    """The layer that these tensors are. Raises InputError where they do not fit together."""
    state = _state(required(arrays, _STATE, (np.uint8,), 1, what), what)
    (rows, columns), size = state["shape"], state["blocksize"]
    if columns % size:
        raise InputError(f"{what}: blocks of {size} run from row to row of {columns} inputs, which is not supported")
    blocks = rows * columns // size
    packed = required(arrays, "weight", (np.uint8,), 2, what)
    check_shape(packed, (rows * columns // 2, 1), "weight", what)
    element = ELEMENTS["nf4"]
    levels = required(arrays, "weight.quant_map", (np.float32,), 1, what)
    if not np.array_equal(levels, element.levels()):
        raise InputError(f"{what}: its quant_map is not NF4's")
    codes = np.stack([packed[:, 0] >> np.uint8(4), packed[:, 0] & np.uint8(15)], axis=-1).reshape(rows, columns)
    nested = "nested_blocksize" in state
    absmax = required(arrays, "weight.absmax", (np.uint8 if nested else np.float32,), 1, what)
    check_shape(absmax, (blocks,), "weight.absmax", what)
    scale = absmax.reshape(rows, columns // size)
    if not nested:
        scheme = Scheme(element=element, granularity=Group(size))
        return PackedLayer(weight=built(codes, scheme, scale, dtype=dtype))
    outer = required(arrays, "weight.nested_absmax", (np.float32,), 1, what)
    check_shape(outer, (-(-blocks // _NESTED),), "weight.nested_absmax", what)
    if not np.array_equal(
        required(arrays, "weight.nested_quant_map", (np.float32,), 1, what), DYNAMIC_MAP.levels().astype(np.float32)
    ):
        raise InputError(f"{what}: its nested_quant_map is not the dynamic map")
    offset = np.full((1, 1), state["nested_offset"], np.float32)
    scheme = Scheme(element=element, granularity=Group(size), scale=DoubleQuantizedScale(_NESTED))
    return PackedLayer(weight=built(codes, scheme, scale, scale2=outer, offset=offset, dtype=dtype))


def quantization_config(schemes: Mapping[str, Scheme], *, kept: list[str]) -> dict[str, Any]:
    """Of config.json. Raises InputError where layers have nested scales and others have not."""
    nested = {isinstance(scheme.scale, DoubleQuantizedScale) for scheme in schemes.values()}
    if len(nested) > 1:
        raise InputError("bitsandbytes checkpoints have nested scales everywhere or nowhere: use one scheme")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested.pop(),
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept or None,
    }


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raises InputError where the checkpoint is of another kind."""
    kind = config.get("bnb_4bit_quant_type")
    if not config.get("load_in_4bit") or kind != "nf4":
        raise InputError(f"{source}: of bitsandbytes 4 bits in nf4 are read, not {'8 bits' if kind is None else kind}")


def _state(raw: np.ndarray, what: str) -> dict[str, Any]:
    try:
        if raw.size > _MAX_STATE:
            raise ValueError("too long")
        state = json.loads(raw.tobytes())
        shape, size = state["shape"], state["blocksize"]
        sound = (
            state["quant_type"] == "nf4"
            and len(shape) == 2
            and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
            and size in _BLOCKS
            and state.get("nested_blocksize", _NESTED) == _NESTED
            and ("nested_blocksize" in state) == isinstance(state.get("nested_offset"), float)
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{what}: its quant_state is damaged") from error
    if not sound:
        raise InputError(f"{what}: its quant_state is not one of NF4 that is read: {str(state)[:200]}")
    return state
