"""The order of the data: decided by the seed, another each epoch, and gone on with from a kept place."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.qat.batches import RowBatches

ROWS = np.arange(24, dtype=np.int32).reshape(12, 2)


def _take(batches: RowBatches, count: int) -> np.ndarray:
    return np.stack([next(batches) for _ in range(count)])


def test_each_epoch_has_every_row_in_an_order_of_its_own() -> None:
    epochs = _take(RowBatches(ROWS, batch=4, seed=0), 6).reshape(2, 12, 2)
    for epoch in epochs:
        np.testing.assert_array_equal(epoch[epoch[:, 0].argsort()], ROWS)
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(_take(RowBatches(ROWS, batch=4, seed=0), 6).reshape(2, 12, 2), epochs)
    assert not np.array_equal(_take(RowBatches(ROWS, batch=4, seed=1), 3).reshape(12, 2), epochs[0])


def test_batches_of_one_row() -> None:
    rows = _take(RowBatches(ROWS, batch=1, seed=0), 24)
    wanted = _take(RowBatches(ROWS, batch=4, seed=0), 6)
    np.testing.assert_array_equal(rows.reshape(24, 2), wanted.reshape(24, 2))


def test_a_kept_place_is_json_and_is_gone_on_from() -> None:
    batches = RowBatches({"x": ROWS, "y": ROWS[:, 0]}, batch=5, seed=3)
    next(batches)
    place = json.loads(json.dumps(batches.get_state()))
    after = [next(batches) for _ in range(4)]
    other = RowBatches({"x": ROWS, "y": ROWS[:, 0]}, batch=5, seed=3)
    other.set_state(place)
    for wanted in after:
        found = next(other)
        np.testing.assert_array_equal(found["x"], wanted["x"])
        np.testing.assert_array_equal(found["y"], wanted["x"][:, 0])


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"first axes \[3, 12\]"):
        RowBatches({"x": ROWS, "y": ROWS[:3]}, batch=1, seed=0)
    with pytest.raises(InputError, match="a batch of 13 from 12 rows"):
        RowBatches(ROWS, batch=13, seed=0)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match=r"pip install 'jquant\[qat\]'"):
        RowBatches(ROWS, batch=4, seed=0)
