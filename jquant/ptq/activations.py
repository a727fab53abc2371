"""The calibration data on its way through the model, batch by batch: in memory, or in files where that is too much."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jquant.core.errors import InputError


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


class OnDisk:
    """One file a batch and key in a folder of its own, removed at the end; nothing stays in memory."""

    def __init__(self, parent: Path) -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="activations-", dir=parent))
        except OSError as error:
            raise InputError(f"{parent}: activations cannot be kept there: {error.strerror or error}") from error
        self.trees: dict[tuple[str, int], tuple[Any, list[np.dtype]]] = {}

    def put(self, key: str, batch: int, value: Any) -> None:
        leaves, structure = jax.tree.flatten(value)
        arrays = [np.asarray(leaf) for leaf in leaves]
        try:
            with self._place(key, batch).open("wb") as file:
                for array in arrays:
                    np.lib.format.write_array(file, _plain(array), allow_pickle=False)
        except OSError as error:
            raise InputError(f"{self.folder}: activations cannot be kept there: {error.strerror or error}") from error
        self.trees[key, batch] = structure, [array.dtype for array in arrays]

    def get(self, key: str, batch: int) -> Any:
        structure, dtypes = self.trees[key, batch]
        with self._place(key, batch).open("rb") as file:
            arrays = [np.lib.format.read_array(file, allow_pickle=False).view(dtype) for dtype in dtypes]
        return jax.tree.unflatten(structure, [jax.device_put(array) for array in arrays])

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


def _plain(array: np.ndarray) -> np.ndarray:
    """As a dtype that the .npy format knows; bfloat16 it does not."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
