"""Folders that appear whole or not at all: written under a hidden name beside the final one, then renamed."""

from __future__ import annotations

import contextlib
import glob
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jquant.core.errors import InputError
from jquant.io.folder_lock import LOCKS, locked_folder, locked_here
from jquant.io.processes import is_writer, on_writer


def check_new_folder(path: Path) -> None:
    """Raises InputError where `path` exists and is not an empty folder."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: exists and is no folder; choose another --out")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path}: exists and is not empty; choose another --out, or remove it first")


@contextlib.contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to write into; it takes the name `path` once the block ends without error, else it is removed.

    Of several processes the writer makes, names and removes it.
    """
    folder = Path(on_writer(lambda: _hidden(path)))
    try:
        with locked_folder(folder):
            yield folder
            on_writer(lambda: _named(folder, path))
    finally:
        if is_writer():
            shutil.rmtree(folder, ignore_errors=True)


def _hidden(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    return tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)


def _named(folder: Path, path: Path) -> None:
    folder.chmod(0o755)  # mkdtemp makes folders that only their owner can enter
    folder.replace(path)


def _remove_abandoned(path: Path) -> None:
    """Removes what killed writers of `path` left; the folder of one still at work is locked."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.partial") if LOCKS else ():
        with contextlib.suppress(OSError, InputError), locked_here(folder):
            shutil.rmtree(folder)
