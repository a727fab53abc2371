"""One run at a time in a folder; the lock ends with the process that holds it, which is the run's writer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jquant.core.errors import InputError
from jquant.io.processes import is_writer, on_writer

try:
    import fcntl
except ImportError:  # Windows: there, two runs in one folder are not told from each other
    fcntl = None

LOCKS = fcntl is not None  # whether a folder in use can be told from one that a killed process left


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds a folder for all processes of a run; it is made where it is not there.

    Raises:
        InputError: it cannot be made, or another process holds it.
    """
    handle = on_writer(lambda: lock(folder))
    try:
        yield
    finally:
        if handle is not None and is_writer():
            os.close(handle)


@contextlib.contextmanager
def locked_here(folder: Path) -> Iterator[None]:
    """`locked_folder` of this process alone."""
    handle = lock(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def lock(folder: Path) -> int | None:
    """The handle that holds the lock, where there are locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise InputError(f"{folder}: another process is at work there; wait for it, or choose another --out") from error
    return handle
