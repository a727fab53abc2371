"""compressed-tensors checkpoints, as llm-compressor writes them and vLLM and transformers load them.

By format, with groups along the inputs and scales [out, groups]:

    pack-quantized         weight_packed int32 [out, ⌈in·b/32⌉], codes value + 2^(b−1); weight_shape; asymmetric ones
                           weight_zero_point int32 [⌈out·b/32⌉, groups], packed along the outputs
    int-quantized          weight int8
    float-quantized        weight fp8 e4m3
    nvfp4-pack-quantized   weight_packed uint8 [out, in/2], low nibble first; scales e4m3, weight_global_scale [1]
    mxfp4-pack-quantized   likewise; scales are exponents, uint8
    mxfp8-quantized        weight fp8 e4m3; scales are exponents, uint8

Inputs are quantized where `input_activations` says so, with their own scales (dynamic) or input_scale (static).

Reference: compressed-tensors 0.19, `compressors`, `quantization/quant_args.py`; SPEC 9.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jquant.core.errors import InputError
from jquant.core.formats import ELEMENTS, Int
from jquant.core.qtensor import QTensor
from jquant.core.scales import FloatScale, NestedScale, PowerOfTwoScale
from jquant.core.scheme import Block, Channel, Granularity, Group, Scheme, Tensor, Token
from jquant.core.scheme import scheme as parse_scheme
from jquant.io.bit_stream import pack_words, unpack_words, word_count
from jquant.io.packed_layer import (
    Arrays,
    PackedLayer,
    built,
    check_shape,
    check_whole_groups,
    codes_of,
    required,
    zero_points_of,
)

PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
TENSORS = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALES = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
}
_FLOAT_SCALES = tuple(FloatScale(name) for name in ("fp32", "fp16", "bf16"))


def format_of(scheme: Scheme, activation: Scheme | None) -> str:
    """The format that holds these.

    Raises:
        InputError: none does; the nearest scheme is named.
    """
    if activation is not None:
        _check_activation(activation)
    element, where = scheme.element, scheme.granularity
    if str(scheme.element.name) == "fp4_e2m1" and where == Group(16) and scheme.scale == NestedScale():
        return NVFP4
    if isinstance(scheme.scale, PowerOfTwoScale) and where == Group(32) and element.name in ("fp4_e2m1", "fp8_e4m3"):
        return MXFP4 if element.name == "fp4_e2m1" else MXFP8
    if isinstance(element, Int) and scheme.scale in _FLOAT_SCALES and isinstance(where, Channel | Group | Tensor):
        whole = element.bits == 8 and scheme.zero_point == "none" and isinstance(where, Channel | Tensor)
        if isinstance(where, Tensor) and not whole:
            raise InputError(
                f"compressed-tensors packs {element.name} with scales per channel or group: {element.name}:channel"
            )
        return INTEGERS if whole and activation is not None else PACKED
    if element.name == "fp8_e4m3" and scheme.scale in _FLOAT_SCALES and isinstance(where, Channel | Tensor | Block):
        return FLOATS
    raise InputError(f"compressed-tensors cannot hold {scheme}; the nearest is {_nearest(scheme)}")


def layer_tensors(layer: PackedLayer, *, what: str) -> dict[str, np.ndarray]:
    """The layer's tensors. Raises InputError where the format cannot hold it."""
    q = layer.weight
    kind = format_of(q.scheme, layer.activation)
    check_whole_groups(q, what)
    if q.groups is not None:
        raise InputError(
            f"{what}: its groups are not of neighbours (act-order dynamic): compressed-tensors cannot hold it; use gptq"
        )
    bits, (rows, columns) = q.scheme.element.bits, q.matrix_shape
    codes, scale = np.asarray(codes_of(q)), np.asarray(q.stored.scale)
    if isinstance(q.scheme.granularity, Tensor):
        scale = scale.reshape(1)
    found: dict[str, np.ndarray]
    if kind == PACKED:
        shape = np.asarray([rows, columns], np.int64)
        found = {"weight_packed": pack_words(codes, bits), "weight_scale": scale, "weight_shape": shape}
        zeros = zero_points_of(q)
        if zeros is not None:
            packed = pack_words(np.ascontiguousarray(np.asarray(zeros).T), bits)
            found["weight_zero_point"] = np.ascontiguousarray(packed.T)
    elif kind == INTEGERS:
        found = {"weight": (codes - np.uint8(128)).view(np.int8), "weight_scale": scale}
    elif kind in (FLOATS, MXFP8):
        found = {"weight": codes.view(_FP8), "weight_scale": scale}
    else:
        if columns % 2:
            raise InputError(f"{what}: {columns} inputs are an odd number: {kind} cannot hold it")
        found = {"weight_packed": codes[:, 0::2] | codes[:, 1::2] << np.uint8(4), "weight_scale": scale}
        if kind == NVFP4:
            assert q.stored.scale2 is not None
            found["weight_scale"] = scale.view(_FP8)
            found["weight_global_scale"] = np.asarray(q.stored.scale2, np.float32).reshape(1)
    return found | _input_tensors(layer)


def _input_tensors(layer: PackedLayer) -> dict[str, np.ndarray]:
    if layer.input_scale is None:
        return {}
    assert layer.activation is not None
    found = {"input_scale": np.asarray(layer.input_scale, np.float32).reshape(1)}
    if layer.input_zero_point is not None:
        zero = np.asarray(layer.input_zero_point).reshape(1).astype(np.int32)
        found["input_zero_point"] = (zero - 2 ** (layer.activation.element.bits - 1)).astype(np.int8)
    return found


def read_layer(arrays: Arrays, group: Mapping[str, Any], *, dtype: np.dtype, what: str) -> PackedLayer:
    """The layer that these tensors are, by the settings of its group. Raises InputError where they do not fit."""
    weights, kind = group["weights"], group["format"]
    activation = activation_of(group, what)
    if "weight_packed" not in arrays:
        q = _read_whole(arrays, weights, kind, dtype, what)
    elif kind in (NVFP4, MXFP4):
        q = _read_nibbles(arrays, kind, dtype, what)
    else:
        q = _read_packed(arrays, weights, dtype, what)
    if activation is None or not isinstance(activation.granularity, Tensor):
        return PackedLayer(weight=q, activation=activation)
    scale = required(arrays, "input_scale", tuple(_SCALES), arrays.get("input_scale", np.zeros(1)).ndim, what)
    zero = None
    if activation.zero_point == "integer":
        zero = arrays.get("input_zero_point")
        if zero is None or zero.size != 1:
            raise InputError(f"{what}: tensor input_zero_point is missing")
        zero = np.float32(int(zero.reshape(())) + 2 ** (activation.element.bits - 1))
    if scale.size != 1:
        raise InputError(f"{what}: input_scale holds {scale.size} values; it must be one")
    return PackedLayer(
        weight=q,
        activation=activation,
        input_scale=scale.astype(np.float32).reshape(()),
        input_zero_point=zero,
    )


def _read_packed(arrays: Arrays, weights: Mapping[str, Any], dtype: np.dtype, what: str) -> QTensor:
    bits = weights["num_bits"]
    words = required(arrays, "weight_packed", (np.int32,), 2, what)
    shape = required(arrays, "weight_shape", (np.int64, np.int32), 1, what)
    if shape.size != 2 or shape.min() < 1 or shape.max() >= 1 << 31:
        raise InputError(f"{what}: weight_shape {shape.tolist()} is no shape of a matrix")
    rows, columns = map(int, shape)
    check_shape(words, (rows, word_count(columns, bits)), "weight_packed", what)
    where, scale = _granularity(weights, what), _scale(arrays, what)
    tiles = _tiles(where, rows, columns, what)
    scale = _as_tiles(scale, tiles, what)
    symmetric = weights.get("symmetric", True)
    zeros = None
    if not symmetric:
        packed = required(arrays, "weight_zero_point", (np.int32,), 2, what)
        check_shape(packed, (word_count(rows, bits), tiles[1]), "weight_zero_point", what)
        zeros = np.ascontiguousarray(unpack_words(np.ascontiguousarray(packed.T), bits, rows).T)
    scheme = Scheme(
        element=Int(bits),
        granularity=where,
        scale=FloatScale(_SCALES[scale.dtype]),  # type: ignore[arg-type]
        zero_point="none" if symmetric else "integer",
    )
    return built(unpack_words(words, bits, columns), scheme, scale, zero_points=zeros, dtype=dtype)


def _read_whole(arrays: Arrays, weights: Mapping[str, Any], kind: str, dtype: np.dtype, what: str) -> QTensor:
    """int8 or fp8."""
    is_float = weights.get("type", "int") == "float"
    weight = required(arrays, "weight", (_FP8 if is_float else np.int8,), 2, what)
    where = _granularity(weights, what)
    tiles = _tiles(where, weight.shape[0], weight.shape[1], what)
    if not weights.get("symmetric", True):
        raise InputError(f"{what}: asymmetric weights that are not packed are not read")
    if kind == MXFP8:
        scale = required(arrays, "weight_scale", (np.uint8,), 2, what)
        check_shape(scale, tiles, "weight_scale", what)
        return built(weight.view(np.uint8), parse_scheme("mxfp8_e4m3"), scale, dtype=dtype)
    scale = _as_tiles(_scale(arrays, what), tiles, what)
    bits = weights["num_bits"]
    element = ELEMENTS["fp8_e4m3"] if is_float else Int(bits)
    codes = weight.view(np.uint8)
    if is_float:
        if ((codes & 0x7F) == 0x7F).any():
            raise InputError(f"{what}: its weight holds a NaN")
    else:
        reach = 2 ** (bits - 1)
        if weight.min() < -reach or weight.max() >= reach:
            raise InputError(f"{what}: its weight holds integers beyond {bits} bits")
        codes = codes + np.uint8(reach)
    scheme = Scheme(element=element, granularity=where, scale=FloatScale(_SCALES[scale.dtype]))  # type: ignore[arg-type]
    return built(codes, scheme, scale, dtype=dtype)


def _read_nibbles(arrays: Arrays, kind: str, dtype: np.dtype, what: str) -> QTensor:
    packed = required(arrays, "weight_packed", (np.uint8,), 2, what)
    rows, columns = packed.shape[0], packed.shape[1] * 2
    codes = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(rows, columns)
    scheme = parse_scheme("nvfp4" if kind == NVFP4 else "mxfp4")
    size = scheme.tile(rows, columns)[1]
    scale = required(arrays, "weight_scale", (_FP8,) if kind == NVFP4 else (np.uint8,), 2, what)
    check_shape(scale, (rows, -(-columns // size)), "weight_scale", what)
    scale2 = None
    if kind == NVFP4:
        outer = arrays.get("weight_global_scale")
        if outer is None or outer.size != 1:
            raise InputError(f"{what}: tensor weight_global_scale is missing")
        scale2 = outer.astype(np.float32).reshape(1, 1)
    return built(codes, scheme, scale.view(np.uint8), scale2=scale2, dtype=dtype)


def _tiles(where: Granularity, rows: int, columns: int, what: str) -> tuple[int, int]:
    try:
        tile_rows, tile_columns = where.tile(rows, columns)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    return -(-rows // tile_rows), -(-columns // tile_columns)


def _scale(arrays: Arrays, what: str) -> np.ndarray:
    scale = arrays.get("weight_scale")
    if scale is None or scale.dtype not in _SCALES:
        given = "is missing" if scale is None else f"is {scale.dtype}; it must be float32, float16 or bfloat16"
        raise InputError(f"{what}: tensor weight_scale {given}")
    return scale


def _as_tiles(scale: np.ndarray, tiles: tuple[int, int], what: str) -> np.ndarray:
    if scale.size != tiles[0] * tiles[1]:
        raise InputError(f"{what}: weight_scale has shape {scale.shape}; it must be {tiles}")
    return np.ascontiguousarray(scale.reshape(tiles))


# The config -----------------------------------------------------------------------------------------------------------


def quantization_config(layers: Mapping[str, tuple[Scheme, Scheme | None]], kept: list[str]) -> dict[str, Any]:
    """Of config.json.

    Args:
        layers: scheme of the weight and of the input of each quantized linear layer, by its name in the checkpoint.
        kept: names of the linear layers that stay floats.
    """
    by_kind: dict[tuple[Scheme, Scheme | None], list[str]] = {}
    for name, kind in layers.items():
        by_kind.setdefault(kind, []).append(name)
    groups = {}
    for index, ((weight, activation), names) in enumerate(by_kind.items()):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(by_kind) == 1 else names,
            "weights": _arguments(weight),
            "input_activations": None if activation is None else _arguments(activation, of_input=True),
            "output_activations": None,
            "format": format_of(weight, activation),
        }
    formats = list(dict.fromkeys(group["format"] for group in groups.values()))
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": kept,
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def read_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The groups and what is ignored, checked. Raises InputError where a field is missing or not understood."""
    groups, ignore = config.get("config_groups"), config.get("ignore") or []
    if (
        not isinstance(groups, Mapping)
        or not groups
        or not all(isinstance(group, Mapping) for group in groups.values())
    ):
        raise InputError(f"{source}: quantization_config has no config_groups")
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise InputError(f"{source}: ignore of quantization_config must be a list of names")
    if config.get("quantization_status", "compressed") != "compressed":
        raise InputError(f"{source}: quantization_status {config['quantization_status']!r} is not read; compressed is")
    if config.get("kv_cache_scheme") is not None:
        raise InputError(f"{source}: a quantized KV cache (kv_cache_scheme) is not supported")
    for name, group in groups.items():
        targets, weights = group.get("targets"), group.get("weights")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise InputError(f"{source}: {name}: targets must be a list of names")
        if not isinstance(weights, Mapping):
            raise InputError(f"{source}: {name}: quantizes no weights, which is not supported")
        if group.get("output_activations") is not None:
            raise InputError(f"{source}: {name}: quantized outputs are not supported")
    whole = config.get("format")
    return {
        "ignore": ignore,
        "groups": [_checked_group(group, whole, f"{source}: {name}") for name, group in groups.items()],
    }


def group_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The group that a linear layer is of, by its name; None where it stays in floats."""
    if any(_matches(pattern, name) for pattern in config["ignore"]):
        return None
    for group in config["groups"]:
        if any(_matches(target, name) or target == "Linear" for target in group["targets"]):
            return group
    return None


def _checked_group(group: Mapping[str, Any], whole: Any, what: str) -> dict[str, Any]:
    weights = group["weights"]
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if type(bits) is not int or kind not in ("int", "float") or not (2 <= bits <= 8):
        raise InputError(f"{what}: weights of {bits!r} bits of type {kind!r} are not read")
    found = group.get("format") or whole
    if found not in (PACKED, INTEGERS, FLOATS, NVFP4, MXFP4, MXFP8, "naive-quantized"):
        raise InputError(f"{what}: format {found!r} is not read")
    if kind == "float" and (found == PACKED or bits != (4 if found in (NVFP4, MXFP4) else 8)):
        raise InputError(f"{what}: floats of {bits} bits in format {found!r} are not read")
    if weights.get("actorder") in ("group", "dynamic"):
        raise InputError(f"{what}: act-order by group is not read")
    _granularity(weights, what)
    _activation(group.get("input_activations"), what)
    return {**group, "format": found}


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), name) is not None
        except re.error as error:
            raise InputError(f"pattern {pattern!r} of quantization_config: {error}") from error
    return pattern == name


def _granularity(weights: Mapping[str, Any], what: str) -> Granularity:
    strategy, size, block = weights.get("strategy"), weights.get("group_size"), weights.get("block_structure")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return Tensor()
    if strategy == "channel":
        return Channel()
    if strategy in ("group", "tensor_group") and type(size) is int and size > 0:
        return Group(size)
    if (
        strategy == "block"
        and isinstance(block, list)
        and len(block) == 2
        and all(type(n) is int and n > 0 for n in block)
    ):
        return Block(*block)
    raise InputError(f"{what}: scales of strategy {strategy!r} and group_size {size!r} are not read")


def activation_of(group: Mapping[str, Any], what: str) -> Scheme | None:
    """The scheme of the inputs of a group's layers; None where they stay floats."""
    return _activation(group.get("input_activations"), what)


def _activation(arguments: Any, what: str) -> Scheme | None:
    if arguments is None:
        return None
    if not isinstance(arguments, Mapping):
        raise InputError(f"{what}: input_activations is {arguments!r}; it must be an object")
    bits, kind, strategy = arguments.get("num_bits", 0), arguments.get("type"), arguments.get("strategy")
    if type(bits) is not int:
        raise InputError(f"{what}: inputs of {bits!r} bits; it must be a whole number")
    dynamic, size = arguments.get("dynamic", False), arguments.get("group_size")
    head = f"int{bits}" if kind == "int" else {8: "fp8_e4m3", 4: "fp4_e2m1"}.get(bits, "?")
    zero = "" if arguments.get("symmetric", True) else ":asym"
    if strategy == "token" and dynamic is True:
        spec = f"{head}:token{zero}"
    elif strategy == "tensor" and dynamic is False:
        spec = f"{head}:tensor{zero}"
    elif strategy == "group" and dynamic is True and kind == "float" and size == 32:
        spec = {8: "mxfp8_e4m3", 4: "mxfp4"}.get(bits, "?")
    else:
        raise InputError(f"{what}: inputs of {bits} bits with scales per {strategy}, dynamic {dynamic}, are not read")
    try:
        return parse_scheme(spec)
    except InputError as error:
        raise InputError(f"{what}: inputs of {bits!r} bits of type {kind!r}: {error}") from error


def _check_activation(activation: Scheme) -> None:
    where, element = activation.granularity, activation.element
    plain = activation.scale == FloatScale("fp32") and isinstance(where, Token | Tensor)
    mx = str(activation) in ("mxfp8_e4m3", "mxfp4")
    if not mx and not (plain and (isinstance(element, Int) or element.name == "fp8_e4m3")):
        raise InputError(f"compressed-tensors cannot hold activations in {activation}; the nearest is int8:token")


def _arguments(scheme: Scheme, *, of_input: bool = False) -> dict[str, Any]:
    """A scheme as `QuantizationArgs`."""
    where, nested = scheme.granularity, scheme.scale == NestedScale()
    strategy, size, block = {
        Tensor: ("tensor", None, None),
        Channel: ("channel", None, None),
        Token: ("token", None, None),
        Group: ("tensor_group" if nested else "group", getattr(where, "size", None), None),
        Block: ("block", None, [getattr(where, "rows", 0), getattr(where, "columns", 0)]),
    }[type(where)]
    found = {
        "num_bits": scheme.element.bits,
        "type": "int" if isinstance(scheme.element, Int) else "float",
        "symmetric": scheme.zero_point == "none",
        "strategy": strategy,
        "group_size": size,
        "block_structure": block,
        "dynamic": of_input and not isinstance(where, Tensor),
        "actorder": None,
    }
    if nested:
        found["scale_dtype"] = "torch.float8_e4m3fn"
    elif isinstance(scheme.scale, PowerOfTwoScale):
        found["scale_dtype"] = "torch.uint8"
    return found


def _nearest(scheme: Scheme) -> str:
    element, where = scheme.element, scheme.granularity
    if isinstance(element, Int):
        fits = where if isinstance(where, Channel | Group) else Group(128)
        return f"int{element.bits}:{fits}" + (":asym" if scheme.zero_point == "integer" else "")
    if element.bits == 8:
        return "fp8_e4m3:channel"
    if element.bits == 4:
        return "nvfp4"
    return f"int{min(max(element.bits, 2), 8)}:g128"
