"""What every file of named tensors shares: the mapped bytes, the record of one tensor, and the check of their extents.

Nothing here trusts a file: sizes are Python integers, compared with the file's length before anything is read.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jquant.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies in its file.

    `shape` is outermost first, as numpy has it; `type` is the format's own name ("Q4_1", "BF16"); `offset` counts from
    the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def map_file(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a file as a read-only uint8 array, mapped, not read. The mapping lives as long as the array.

    Raises:
        InputError: there is no such file, it cannot be read, or it is empty or a folder.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0
            mapping = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if mapping is None:
        raise InputError(f"{path}: the file is empty")
    return np.frombuffer(mapping, np.uint8)


ALIGNMENT = 64  # bytes; jax on CPU takes over arrays that start at a multiple of this, and copies others


HUGE = 1 << 21  # bytes of a huge page on x86-64 and of most on ARM64; elsewhere the advice is void


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of any contents that jax can take over without a copy; numpy's own start 16 bytes off.

    The whole huge pages of a large one are asked for as such: the first touch of 64 MiB then takes 6 ms instead of 30.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Linux aligns what is a multiple of a huge page long. Beyond nbytes nothing is touched, so nothing is taken.
        memory = mmap.mmap(-1, -(-nbytes // HUGE) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, 0, nbytes // HUGE * HUGE)
        return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


MARGIN = 64 << 20  # bytes


def check_memory(cost: int, size: int, what: str) -> None:
    """Raises InputError where what is listed in a file of `size` bytes would take much more memory than the file.

    A Python object takes tens of bytes and may be listed in two or three, so a bound on each count is not enough.
    """
    if cost > 2 * size + MARGIN:
        raise InputError(f"{what}: would take some {cost >> 20} MiB of memory to list, far beyond its own {size} bytes")


def check_disjoint(tensors: Iterable[TensorInfo], path: Path) -> None:
    """Raises InputError naming the pair where two tensors of a file share a byte."""
    previous: TensorInfo | None = None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if previous is not None and tensor.offset < previous.offset + previous.nbytes:
            raise InputError(f"{path}: tensors {shown(previous.name)} and {shown(tensor.name)} overlap in the file")
        previous = tensor


def shown(text: str, limit: int = 80) -> str:
    """A string from a file as an error message may carry it: quoted, escaped, on one line, at most `limit` long."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
