"""Writes that the system refuses say so in its words: here files that would grow too large, as on a full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.io.native import write_native
from jquant.io.system_errors import system_errors, write_array
from jquant.qat.checkpoints import Checkpoints

TOO_LARGE = os.strerror(errno.EFBIG)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.mark.parametrize(
    "array", [np.arange(12.0).reshape(3, 4), np.arange(12).reshape(3, 4).T, np.float32(3), np.zeros((2, 0), np.uint8)]
)
def test_arrays_are_read_back_by_numpy(array: np.ndarray) -> None:
    file = io.BytesIO()
    write_array(file, array)
    write_array(file, array)
    file.seek(0)
    for _ in range(2):
        found = np.lib.format.read_array(file)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == np.asarray(array).dtype


def test_arrays_that_cannot_be_written_say_why(tmp_path: Path) -> None:
    with files_up_to(5000), (tmp_path / "x.npy").open("wb") as file, pytest.raises(OSError, match=TOO_LARGE) as caught:
        write_array(file, np.zeros(100_000))
    assert caught.value.errno == errno.EFBIG


def test_checkpoints_that_cannot_be_written_say_why_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, 100_000, dtype=np.uint8)
    with files_up_to(20_000), pytest.raises(InputError, match=f"m: cannot be written: {TOO_LARGE}$"):
        write_native(tmp_path / "m", {"noise": noise}, {})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_states_of_training_that_cannot_be_written_say_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = {"noise": jnp.asarray(np.random.default_rng(0).integers(0, 255, 100_000, dtype=np.uint8))}
    with files_up_to(20_000), pytest.raises(InputError, match=f"the state of step 1 cannot be written: {TOO_LARGE}; "):
        checkpoints.save(1, state, {})
    assert "Traceback" not in capfd.readouterr().err


def test_other_errors_stay() -> None:
    with pytest.raises(ValueError, match="no such thing"), system_errors():
        raise ValueError("no such thing")
