"""GGUF version 3, written: metadata, then tensors, which may come one at a time.

The list of tensors stands before their bytes, so these wait in a file of their own until all are there.

Reference: ggml/docs/gguf.md.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jquant.core.errors import InputError
from jquant.io.atomic import replacing
from jquant.io.ggml_blocks import BY_NAME
from jquant.io.gguf import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, MAX_AXES, NUMBERS, STRING
from jquant.io.mapped import shown

_KINDS = {dtype: number for number, dtype in NUMBERS.items()}
Tensor = tuple[str, str, tuple[int, ...], np.ndarray]  # name, ggml type, shape outermost first, bytes


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[Tensor]) -> None:
    """Writes a file that appears under its name only once it is whole.

    Args:
        path: of the file.
        metadata: bool, int (written as uint32 where it fits), float (float32), str, list[str], or a numpy array.
        tensors: taken one by one.

    Raises:
        InputError: a value of another kind, a tensor of the wrong size or twice, or no write access.
    """
    fields = b"".join(_string(name) + _value(name, value) for name, value in metadata.items())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as data:
            infos = _collect(data, tensors)
            head = MAGIC + struct.pack("<IQQ", 3, len(infos), len(metadata)) + fields + b"".join(infos)
            data.seek(0)
            with replacing(path) as file:
                file.write(head + bytes(-len(head) % DEFAULT_ALIGNMENT))
                shutil.copyfileobj(data, file, 1 << 22)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _collect(data: BinaryIO, tensors: Iterable[Tensor]) -> list[bytes]:
    """Writes the tensors' bytes; their entries of the list."""
    infos: list[bytes] = []
    names: set[str] = set()
    offset = 0
    for name, kind, shape, raw in tensors:
        block = BY_NAME[kind]
        flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
        if name in names or not 1 <= len(shape) <= MAX_AXES or shape[-1] % block.elements:
            raise InputError(
                f"tensor {shown(name)} of shape {shape} in {kind}: it is there twice, or has no whole blocks"
            )
        if flat.size != int(np.prod(shape)) // block.elements * block.nbytes:
            raise InputError(f"tensor {shown(name)}: {flat.size} bytes for {shape} in {kind}")
        names.add(name)
        axes = shape[::-1]
        infos.append(
            _string(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes) + struct.pack("<IQ", block.ggml_id, offset)
        )
        data.write(flat.data)
        data.write(bytes(-flat.size % DEFAULT_ALIGNMENT))
        offset += flat.size + -flat.size % DEFAULT_ALIGNMENT
    return infos


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(name: str, value: Any) -> bytes:
    """The kind and the value."""
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        dtype = np.dtype("<u4" if 0 <= value < 1 << 32 else "<i8")
        return struct.pack("<I", _KINDS[dtype]) + np.asarray(value, dtype).tobytes()
    if isinstance(value, float):
        return struct.pack("<I", _KINDS[np.dtype("<f4")]) + np.float32(value).tobytes()
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray) and value.dtype.newbyteorder("<") in _KINDS:
        kind = _KINDS[value.dtype.newbyteorder("<")]
        return struct.pack("<IIQ", ARRAY, kind, value.size) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    raise InputError(f"metadata field {name}: a {type(value).__name__} cannot be written")
