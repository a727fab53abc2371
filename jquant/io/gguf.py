"""GGUF version 2 and 3: memory-mapped, and every count, length and offset checked before it is used.

A file may come from anywhere, so nothing is allocated on the word of an unchecked count, and whatever is wrong is an
InputError that names the file and the field or tensor.

Reference: ggml/docs/gguf.md. Stricter than that text where ggml's own reader is (at most 4 axes) and where no known
writer differs (strings are UTF-8, names unique, no arrays of arrays, tensors do not overlap).
"""

from __future__ import annotations

import itertools
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.io.ggml_blocks import BY_ID, BY_NAME, DECODABLE, decode
from jquant.io.mapped import TensorInfo, aligned_empty, check_disjoint, check_memory, map_file, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_AXES = 4  # GGML_MAX_DIMS
DEFAULT_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT

BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {  # enum gguf_type
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_U64 = struct.Struct("<Q")
ENTRY_MEMORY, STRING_MEMORY = 1024, 64  # bytes in memory, at most: of a field or tensor, of a string in an array


@dataclass(frozen=True, kw_only=True, eq=False)
class GGUFFile:
    """An open GGUF: its metadata parsed, its tensors listed, their bytes mapped.

    `metadata` values are int, float, bool, str, list[str] or a numpy array.
    """

    path: Path
    version: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    data: np.ndarray = field(repr=False)  # uint8, the whole file

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as stored: a read-only uint8 view of the file."""
        info = self._info(name)
        return self.data[info.offset : info.offset + info.nbytes]

    def read(self, name: str, *, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor decoded to a float32 array of its shape: `out`, or a fresh one that jax can take over.

        Raises:
            InputError: no such tensor, or its type has no decoder here.
        """
        info = self._info(name)
        block_type = BY_NAME.get(info.type)
        if block_type is None or block_type.decoder is None:
            raise InputError(
                f"{self.path}: tensor {shown(name)} is of {info.type}, which cannot be decoded; "
                f"jquant decodes {', '.join(DECODABLE)}"
            )
        if out is None:
            out = aligned_empty(info.shape, np.dtype(np.float32))
        return decode(block_type, self.raw(name), out=out)

    def read_blocks(self, name: str) -> np.ndarray:
        """uint8 [..., rows, bytes]: a tensor's blocks as they are stored, row by row, copied out of the file.

        Raises:
            InputError: no such tensor, or its type has no known size.
        """
        info = self._info(name)
        block_type = BY_NAME.get(info.type)
        if block_type is None or not info.shape:
            raise InputError(f"{self.path}: tensor {shown(name)} is of {info.type}, which has no rows of known size")
        row = info.shape[-1] // block_type.elements * block_type.nbytes
        blocks = aligned_empty((*info.shape[:-1], row), np.dtype(np.uint8))
        np.copyto(blocks, self.raw(name).reshape(blocks.shape))
        return blocks

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{self.path}: there is no tensor {shown(name)} among its {len(self.tensors)}")
        return self.tensors[name]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Maps a GGUF file and reads its header, metadata and tensor list; no tensor is read.

    Raises:
        InputError: the file cannot be read, is no GGUF of version 2 or 3, or is damaged.
    """
    path = Path(path)
    data = map_file(path)
    cursor = _Cursor(data, path)
    version, tensor_count, field_count = _read_header(cursor)
    metadata = _read_metadata(cursor, field_count)
    entries = _read_tensor_entries(cursor, tensor_count)
    tensors = _place_tensors(entries, cursor.position, _alignment(metadata, path), data.size, path)
    return GGUFFile(path=path, version=version, metadata=metadata, tensors=tensors, data=data)


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of metadata fields."""
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != MAGIC:
        raise InputError(f"{cursor.path}: is no GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise InputError(f"{cursor.path}: is a big-endian GGUF; only little-endian files are read: convert it")
        raise InputError(f"{cursor.path}: GGUF version {version} is not read; versions 2 and 3 are: convert it again")
    return version, cursor.u64("the number of tensors"), cursor.u64("the number of metadata fields")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    cursor.expect(count, 8 + 4 + 1, "metadata fields", ENTRY_MEMORY)
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"the name of metadata field {index}")
        if key in metadata:
            raise InputError(f"{cursor.path}: metadata field {shown(key)} occurs twice")
        what = f"metadata field {shown(key)}"
        metadata[key] = _read_value(cursor, cursor.u32(f"the type of {what}"), what)
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str) -> Any:
    """One value: int, float, bool, str, list[str] or a numpy array."""
    if kind == STRING:
        return cursor.string(what)
    if kind != ARRAY:
        return cursor.numbers(kind, 1, what)[0].item()
    kind = cursor.u32(f"the element type of {what}")
    count = cursor.u64(f"the length of {what}")
    if kind == ARRAY:
        raise InputError(f"{cursor.path}: {what} is an array of arrays, which no known model uses and is not read")
    return cursor.strings(count, what) if kind == STRING else cursor.numbers(kind, count, what)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor as the file lists it: its offset counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    ggml_id: int
    offset: int


def _read_tensor_entries(cursor: _Cursor, count: int) -> list[_Entry]:
    cursor.expect(count, 8 + 4 + 4 + 8, "tensors", ENTRY_MEMORY)
    entries: dict[str, _Entry] = {}
    for index in range(count):
        name = cursor.string(f"the name of tensor {index}")
        what = f"tensor {shown(name)}"
        if name in entries:
            raise InputError(f"{cursor.path}: {what} is listed twice")
        axes = cursor.u32(f"the number of axes of {what}")
        if axes > MAX_AXES:
            raise InputError(f"{cursor.path}: {what} claims {axes} axes; at most {MAX_AXES} are allowed")
        shape = tuple(cursor.u64(f"axis {axis} of {what}") for axis in range(axes))[::-1]
        if 0 in shape:
            raise InputError(f"{cursor.path}: {what} has shape {shape}; every axis must be at least 1")
        ggml_id = cursor.u32(f"the type of {what}")
        entries[name] = _Entry(name=name, shape=shape, ggml_id=ggml_id, offset=cursor.u64(f"the offset of {what}"))
    return list(entries.values())


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{path}: general.alignment is {shown(str(alignment))}; it must be a power of two")
    return alignment


def _place_tensors(entries: list[_Entry], end: int, alignment: int, size: int, path: Path) -> dict[str, TensorInfo]:
    """Absolute extents, each inside the file and none over another.

    A type that is not in the table has no known size: its tensor is listed as reaching to the next one.
    """
    start = -(-end // alignment) * alignment
    starts = sorted({start + entry.offset for entry in entries} | {size})
    following = dict(itertools.pairwise(starts))
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        what = f"{path}: tensor {shown(entry.name)}"
        offset = start + entry.offset
        if entry.offset % alignment:
            raise InputError(f"{what} lies at offset {entry.offset}, which is no multiple of the alignment {alignment}")
        if offset > size:
            raise InputError(f"{what} starts at byte {offset}, the file has {size}: it is truncated or damaged")
        block_type = BY_ID.get(entry.ggml_id)
        info = TensorInfo(
            name=entry.name,
            shape=entry.shape,
            type=f"ggml type {entry.ggml_id}" if block_type is None else block_type.name,
            offset=offset,
            nbytes=following.get(offset, size) - offset,
        )
        if block_type is not None:
            row = entry.shape[-1] if entry.shape else 1
            if row % block_type.elements:
                raise InputError(f"{what} has rows of {row}, no multiple of {info.type}'s {block_type.elements}")
            nbytes = info.size // block_type.elements * block_type.nbytes
            if offset + nbytes > size:
                raise InputError(f"{what} reaches to byte {offset + nbytes}, the file has {size}: it is truncated")
            info = TensorInfo(name=info.name, shape=info.shape, type=info.type, offset=offset, nbytes=nbytes)
        tensors[entry.name] = info
    check_disjoint(tensors.values(), path)
    return tensors


class _Cursor:
    """Reads forward through the mapped file and never past its end."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.path = path
        self.position = 0
        self._data = data.data
        self._size = data.size
        self._memory = 0  # bytes that what is listed so far takes

    def expect(self, count: int, least: int, what: str, memory: int) -> None:
        """Refuses a count whose items, of at least `least` bytes each, cannot fit into the rest of the file.

        Also one of items, of `memory` bytes each once they are read, that with all before would take too much.
        """
        if count > (self._size - self.position) // least:
            raise InputError(f"{self.path}: claims {count} {what}, more than its {self._size} bytes can hold")
        self._memory += count * memory
        check_memory(self._memory, self._size, f"{self.path}: the {count} {what}")

    def take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes."""
        if count > self._size - self.position:
            raise InputError(
                f"{self.path}: is truncated or damaged: {what} needs {count} bytes at byte {self.position}, "
                f"the file has {self._size}"
            )
        start = self.position
        self.position += count
        return self._data[start : self.position]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what} is not UTF-8: {error.reason} at its byte {error.start}") from error

    def strings(self, count: int, what: str) -> list[str]:
        """A string array. A vocabulary has 50,000 entries and more, so the loop is written for speed."""
        self.expect(count, 8, f"strings in {what}", STRING_MEMORY)
        data, size, position, unpack = self._data, self._size, self.position, _U64.unpack_from
        texts: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    raise InputError(f"{self.path}: is truncated or damaged in string {len(texts)} of {what}")
                texts.append(str(data[start:position], "utf-8"))
        except struct.error as error:
            raise InputError(f"{self.path}: is truncated or damaged in string {len(texts)} of {what}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: string {len(texts)} of {what} is not UTF-8: {error.reason}") from error
        self.position = position
        return texts

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        """`count` numbers or booleans, copied out of the file."""
        dtype = np.dtype("u1") if kind == BOOL else NUMBERS.get(kind)
        if dtype is None:
            raise InputError(f"{self.path}: {what} has value type {kind}; GGUF knows 0 to 12")
        values = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if kind != BOOL:
            return values.copy()
        if (values > 1).any():
            raise InputError(f"{self.path}: {what} holds a boolean that is neither 0 nor 1")
        return values.astype(bool)
