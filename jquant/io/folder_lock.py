"""One run at a time in a folder; the lock ends with the process that holds it, which is the run's writer."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jquant.core.errors import InputError
from jquant.io.processes import in_all, is_writer, on_writer, several

try:
    import fcntl
except ImportError:  # Windows: there, two runs in one folder are not told from each other
    fcntl = None

SHOWN_WITHIN_S = 30  # a shared file system may show a new file late
LOCKS = fcntl is not None  # whether a folder in use can be told from one that a killed process left


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds a folder for all processes of a run; it is made where it is not there.

    Raises:
        InputError: it cannot be made, or another process holds it.
    """
    handle = on_writer(lambda: lock(folder))
    try:
        if several():
            _check_shared(folder)
        yield
    finally:
        if handle is not None and is_writer():
            os.close(handle)


def _check_shared(folder: Path) -> None:
    """Raises InputError where a process does not see what the writer puts into the folder."""
    name = on_writer(lambda: _new_file(folder))

    def look() -> None:
        deadline = time.monotonic() + SHOWN_WITHIN_S
        while name not in os.listdir(folder if folder.is_dir() else os.curdir):
            if time.monotonic() > deadline:
                raise InputError(
                    f"{folder.absolute()}: {socket.gethostname()} does not see there what process 0 wrote "
                    f"{SHOWN_WITHIN_S} s ago: choose an --out in a folder that all hosts share"
                )
            time.sleep(0.2)

    try:
        in_all(look)
    finally:
        if is_writer():
            (folder / name).unlink(missing_ok=True)


def _new_file(folder: Path) -> str:
    handle, name = tempfile.mkstemp(prefix=".shared-", dir=folder)
    os.close(handle)
    return Path(name).name


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
