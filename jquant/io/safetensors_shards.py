"""A checkpoint's safetensors files written tensor by tensor: what was added is on disk, not in memory.

The header comes first and is known last, so room is left for it, which spaces fill (the format allows that).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jquant.core.errors import InputError
from jquant.io.hf_directory import INDEX, SINGLE
from jquant.io.json_file import as_text
from jquant.io.mapped import shown
from jquant.io.safetensors import dtype_name

_ENTRY = 320  # bytes of a header's entry, a long name included
_METADATA = {"format": "pt"}  # transformers asks for it


class ShardWriter:
    """Adds tensors to `model.safetensors`, or to files of at most so many bytes and an index of them.

    A context: files get their names, and the index is written, where it ends without error.
    """

    def __init__(self, folder: Path, *, max_bytes: int, tensors: int) -> None:
        """
        Args:
            folder: it is there.
            max_bytes: of a file; a tensor larger than that has its own.
            tensors: at most so many will be added.
        """
        self.folder, self.max_bytes = folder, max_bytes
        self.room = _ENTRY * tensors + 4096
        self.shards: list[dict[str, dict[str, Any]]] = []
        self.total = 0
        self._file: BinaryIO | None = None
        self._end = 0

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Tensors by name, the widest first.

        Raises:
            InputError: a dtype that the format lacks, or a name that was there.
            OSError: the disk is full, …
        """
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            array = np.ascontiguousarray(tensors[name])
            if any(name in shard for shard in self.shards):
                raise InputError(f"tensor {shown(name)} is written twice")
            if self._file is None or (self._end and self._end + array.nbytes > self.max_bytes):
                self._close()
                self._open()
            assert self._file is not None
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            self._file.write(little.reshape(-1).view(np.uint8).data)
            offsets = [self._end, self._end + array.nbytes]
            self.shards[-1][name] = {
                "dtype": dtype_name(array.dtype, name),
                "shape": list(array.shape),
                "data_offsets": offsets,
            }
            self._end, self.total = offsets[1], self.total + array.nbytes

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()

    def _finish(self) -> None:
        self._close()
        count = len(self.shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for index, name in enumerate(names):
            self._path(index).rename(self.folder / name)
        if count > 1:
            places = {tensor: name for shard, name in zip(self.shards, names, strict=True) for tensor in shard}
            record = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
            (self.folder / INDEX).write_text(as_text(record), encoding="utf-8")

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05}.partial"

    def _open(self) -> None:
        self._file = self._path(len(self.shards)).open("wb")
        self._file.seek(8 + self.room)
        self.shards.append({})
        self._end = 0

    def _close(self) -> None:
        if self._file is None:
            return
        header = json.dumps({"__metadata__": _METADATA, **self.shards[-1]}, separators=(",", ":")).encode()
        if len(header) > self.room:
            raise InputError(
                f"{self._path(len(self.shards) - 1)}: the header needs {len(header)} bytes, not {self.room}"
            )
        self._file.seek(0)
        self._file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self._file.close()
        self._file = None
