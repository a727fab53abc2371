"""The calibration data on its way through the model, batch by batch: in memory, or in files where that is too much."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from jquant.core.errors import InputError
from jquant.io.system_errors import write_array
from jquant.ptq.parts_on_host import Begin, from_parts, parts_of

SPILLED = "activations-"  # begins the names of folders of what goes to disk


class Store(Protocol):
    """Values by batch; each a pytree of arrays."""

    def put(self, key: str, batch: int, value: Any) -> None: ...

    def get(self, key: str, batch: int) -> Any: ...

    def drop(self, key: str) -> None:
        """Forgets all batches of a key."""
        ...


class InMemory:
    """Keeps values as they are, on the device that made them."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, Any]] = {}

    def put(self, key: str, batch: int, value: Any) -> None:
        self.values.setdefault(key, {})[batch] = value

    def get(self, key: str, batch: int) -> Any:
        return self.values[key][batch]

    def drop(self, key: str) -> None:
        self.values.pop(key, None)


class _Kept(NamedTuple):
    """What a file does not say of an array in it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding | None
    begins: tuple[Begin, ...]  # of its parts, as they follow each other


class OnDisk:
    """One file a batch and key in a folder of its own, removed at the end; nothing stays in memory.

    Of arrays that lie on several processes' devices each process keeps its own parts.
    """

    def __init__(self, parent: Path) -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=SPILLED, dir=parent))
        except OSError as error:
            raise InputError(f"{parent}: activations cannot be kept there: {error.strerror or error}") from error
        self.trees: dict[tuple[str, int], tuple[Any, list[_Kept]]] = {}

    def put(self, key: str, batch: int, value: Any) -> None:
        leaves, structure = jax.tree.flatten(value)
        arrays = [parts_of(leaf) for leaf in leaves]
        try:
            with self._place(key, batch).open("wb") as file:
                for part in (part for parts in arrays for part in parts.values()):
                    write_array(file, _plain(part))
        except OSError as error:
            raise InputError(
                f"{self.folder}: activations cannot be kept there: {error.strerror or error}; once they can be, start "
                "the same command again to go on from the last block"
            ) from error
        self.trees[key, batch] = structure, [_kept(*pair) for pair in zip(leaves, arrays, strict=True)]

    def get(self, key: str, batch: int) -> Any:
        structure, kept = self.trees[key, batch]
        with self._place(key, batch).open("rb") as file:
            arrays = [
                from_parts(
                    each.shape,
                    each.sharding,
                    {
                        begin: np.lib.format.read_array(file, allow_pickle=False).view(each.dtype)
                        for begin in each.begins
                    },
                )
                for each in kept
            ]
        return jax.tree.unflatten(structure, arrays)

    def drop(self, key: str) -> None:
        for other, batch in list(self.trees):
            if other == key:
                self._place(key, batch).unlink(missing_ok=True)
                del self.trees[other, batch]

    def close(self) -> None:
        """Removes all files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, key: str, batch: int) -> Path:
        return self.folder / f"{key}-{batch:06d}.npy"


def _kept(leaf: Any, parts: Mapping[Begin, np.ndarray]) -> _Kept:
    sharding = getattr(leaf, "sharding", None)
    spread = sharding if isinstance(sharding, NamedSharding) else None
    return _Kept(tuple(leaf.shape), np.dtype(leaf.dtype), spread, tuple(parts))


def _plain(array: np.ndarray) -> np.ndarray:
    """As a dtype that the .npy format knows; bfloat16 it does not."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
