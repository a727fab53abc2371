"""Rows of data in an order that a seed decides, cut into batches, with a place to go on from."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

from jquant.core.errors import InputError

_EPOCHS = 1 << 31  # never reached; grain's own endless repetition has no length that batches of one row could have


class Batches(Protocol):
    """What a trainer reads. Iterators of grain's datasets are such, and so is anything with these methods."""

    def __next__(self) -> Any:
        """A pytree of numpy arrays whose first axes are equal: the rows of one optimizer step."""
        ...

    def get_state(self) -> Any:
        """Where the iterator stands, as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes back, or on, to where an iterator over the same data stood."""
        ...


class RowBatches:
    """Batches of shuffled rows, epoch after epoch without end; each epoch has an order of its own.

    The order is a function of the seed alone. A batch may take rows of two epochs.
    """

    def __init__(self, rows: Any, *, batch: int, seed: int) -> None:
        """
        Args:
            rows: a pytree of numpy arrays with equal first axes, as the windows of a text, int32 [rows, window].
            batch: rows of one optimizer step.
            seed: of the order.

        Raises:
            InputError: arrays of different lengths, or none; fewer rows than a batch takes; grain is not installed.
        """
        lengths = {len(leaf) for leaf in jax.tree.leaves(rows)}
        if len(lengths) != 1:
            raise InputError(f"rows of data: the arrays have first axes {sorted(lengths)}; all must have one length")
        self.rows = lengths.pop()
        if not 1 <= batch <= self.rows:
            raise InputError(f"a batch of {batch} from {self.rows} rows of data; give 1 to {self.rows}, or more data")
        dataset = _grain().MapDataset.source(_Rows(rows, self.rows)).seed(seed).shuffle().repeat(_EPOCHS)
        self._iterator = iter(dataset.batch(batch).to_iter_dataset())

    def __next__(self) -> Any:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


class _Rows:
    """grain's random access to rows of arrays in memory."""

    def __init__(self, rows: Any, length: int) -> None:
        self._rows, self._length = rows, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return jax.tree.map(lambda leaf: np.asarray(leaf[index]), self._rows)

    def __repr__(self) -> str:
        return f"Rows({self._length})"


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise InputError("training data comes through the package 'grain': pip install 'jquant[qat]'") from error
    return grain
