"""Safetensors: a JSON header and one buffer. Read by mapping, checked like any file from a stranger; written whole.

Reference: https://huggingface.co/docs/safetensors (format). As there, the tensors must fill the buffer without a gap
and no name may occur twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jquant.core.errors import InputError
from jquant.io.atomic import replacing
from jquant.io.json_file import parse_json
from jquant.io.mapped import TensorInfo, check_disjoint, map_file, shown

MAX_HEADER = 100_000_000  # bytes; the reference implementation's limit
MAX_AXES = 64  # numpy's limit
MAX_BYTES = 1 << 62  # of one tensor, an axis of 0 counted as 1: numpy refuses larger shapes even where they are empty

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class SafetensorsFile:
    """An open safetensors file: its header parsed, its tensors listed, their bytes mapped."""

    path: Path
    metadata: dict[str, str] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    data: np.ndarray = field(repr=False)  # uint8, the whole file

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored: a read-only view of the file in the stored dtype, perhaps not aligned in memory.

        Raises:
            InputError: no such tensor, or its dtype is not known here.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path}: there is no tensor {shown(name)} among its {len(self.tensors)}")
        info = self.tensors[name]
        dtype = DTYPES.get(info.type)
        if dtype is None:
            raise InputError(
                f"{self.path}: tensor {shown(name)} is of dtype {shown(info.type)}, which cannot be read; "
                f"jquant reads {', '.join(DTYPES)}"
            )
        raw = self.data[info.offset : info.offset + info.nbytes]
        if info.type == "BOOL" and (raw > 1).any():
            raise InputError(f"{self.path}: tensor {shown(name)} holds a boolean that is neither 0 nor 1")
        return raw.view(dtype).reshape(info.shape)


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Maps a safetensors file and reads its header; no tensor is read.

    Raises:
        InputError: the file cannot be read, or is no sound safetensors file.
    """
    path = Path(path)
    data = map_file(path)
    if data.size < 8:
        raise InputError(f"{path}: is no safetensors file: it has {data.size} bytes")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER, data.size - 8):
        raise InputError(f"{path}: is truncated or no safetensors file: a header of {length} bytes in {data.size}")
    header = parse_json(data[8 : 8 + length].tobytes(), f"{path}: the header", size=data.size)
    metadata = _check_metadata(header.pop("__metadata__", {}), path)
    start = 8 + length
    tensors = {name: _tensor_info(name, entry, start, data.size, path) for name, entry in header.items()}
    check_disjoint(tensors.values(), path)
    covered = start + sum(info.nbytes for info in tensors.values())
    if covered != data.size:
        raise InputError(f"{path}: {data.size - covered} bytes belong to no tensor: the file is damaged")
    return SafetensorsFile(path=path, metadata=metadata, tensors=tensors, data=data)


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ must map names to strings")
    return metadata


def _tensor_info(name: str, entry: Any, start: int, size: int, path: Path) -> TensorInfo:
    """One entry of the header: {"dtype": …, "shape": […], "data_offsets": [begin, end]}, offsets within the buffer."""
    what = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{what}: its entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise InputError(f"{what}: dtype must be a string")
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise InputError(f"{what}: shape must be a list of at most {MAX_AXES} numbers ≥ 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{what}: data_offsets must be two numbers [begin, end]")
    begin, end = offsets
    if start + end > size:
        raise InputError(f"{what} reaches to byte {start + end}, the file has {size}: it is truncated")
    if dtype in DTYPES:
        itemsize = DTYPES[dtype].itemsize
        if math.prod(shape) * itemsize != end - begin:
            raise InputError(f"{what}: {dtype} of shape {tuple(shape)} does not take the {end - begin} bytes it claims")
        if math.prod(max(axis, 1) for axis in shape) * itemsize > MAX_BYTES:
            raise InputError(f"{what}: shape {tuple(shape)} is too large")
    return TensorInfo(name=name, shape=tuple(shape), type=dtype, offset=start + begin, nbytes=end - begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a safetensors file that appears under `path` only once it is whole.

    The widest dtypes come first, so every tensor is aligned; equal input gives equal bytes.

    Raises:
        InputError: a dtype that the format lacks, a name it reserves, metadata other than strings, or no write access.
    """
    for name, array in tensors.items():
        if name == "__metadata__":
            raise InputError(f"{path}: the tensor name __metadata__ is reserved by the format")
        try:
            dtype_name(array.dtype, name)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    _check_metadata(dict(metadata or {}), Path(path))
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": dtype_name(array.dtype, name),
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.ascontiguousarray(tensors[name]).reshape(-1)
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(little.view(np.uint8).data)


def dtype_name(dtype: np.dtype, tensor: str) -> str:
    """The format's word for a dtype. Raises InputError naming the tensor where it has none."""
    little = dtype.newbyteorder("<")
    if little not in _NAMES:
        raise InputError(
            f"tensor {shown(tensor)} is {dtype}, which safetensors cannot hold; "
            f"it holds {', '.join(str(dtype) for dtype in _NAMES)}"
        )
    return _NAMES[little]
