"""The folder of a sweep: what defines it, and one JSON file a finished cell.

    sweep.json          the definition (model, text, protocol, layers, numerics) and where it ran
    cells/ID.json       a cell, written by atomic rename; ID is the hash of definition, scheme, method, and for methods
                        beyond rounding their settings and the calibration data they learn from
    cells/ID.lock       held by the process that is computing the cell; the system lets go of it when that one dies

Nothing else is state: a run reads what is there and computes what is missing. Tables, plots and the report are derived.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jquant.core.errors import InputError
from jquant.io.atomic import replacing
from jquant.io.json_file import read_json
from jquant.sweep.results import Cell

MANIFEST = "sweep.json"
CELLS = "cells"
FORMAT = "jquant-sweep"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Store:
    """A sweep folder; `make` puts it on disk, so that a mistake found before leaves nothing behind."""

    path: Path
    definition: Mapping[str, Any] = field(repr=False)
    environment: Mapping[str, Any] = field(repr=False)

    @property
    def manifest(self) -> dict[str, Any]:
        return {**self.definition, "environment": dict(self.environment)}

    def make(self) -> None:
        """Makes the folder where it is not there yet.

        Raises:
            InputError: it cannot be made, or another sweep has come to be there.
        """
        _make(self.path / CELLS)
        with (self.path / CELLS / "sweep.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _found(self.path, self.definition) is None:
                record = {"format": FORMAT, "version": VERSION, "definition": self.definition}
                text = json.dumps(record | {"environment": self.environment}, indent=1, ensure_ascii=False)
                with replacing(self.path / MANIFEST) as file:
                    file.write(f"{text}\n".encode())

    def cell_id(self, scheme: str, method: str, given: Mapping[str, Any] | None = None) -> str:
        """Hash of everything that decides the cell's numbers; `given` is what this method has beyond the definition."""
        record = {"definition": self.definition, "scheme": scheme, "method": method, **(given or {})}
        return hashlib.sha256(_canonical(record)).hexdigest()[:24]

    def read(self, cell_id: str) -> Cell | None:
        """The finished cell, or None.

        Raises:
            InputError: its file is damaged.
        """
        path = self._path(cell_id)
        if not path.exists():
            return None
        try:
            cell = Cell.from_json(read_json(path))
        except TypeError as error:
            raise InputError(f"{path}: is no cell of this version ({error}); delete it to compute it again") from error
        if cell.id != cell_id:
            raise InputError(f"{path}: holds cell {cell.id}; delete it to compute it again")
        return cell

    def write(self, cell: Cell) -> None:
        """Puts a finished cell under its name, whole.

        Raises:
            InputError: the folder is gone, which is not made anew, or cannot be written.
        """
        if not (self.path / CELLS).is_dir():
            raise self._lost()
        text = json.dumps(cell.as_json(), indent=1, ensure_ascii=False) + "\n"
        with replacing(self._path(cell.id)) as file:
            file.write(text.encode())

    @contextlib.contextmanager
    def claim(self, cell_id: str, *, wait: bool) -> Iterator[bool]:
        """Whether this process may compute the cell now; with `wait`, after the one that computes it has ended.

        Raises:
            InputError: the folder is gone, or cannot be written.
        """
        try:
            file = (self.path / CELLS / f"{cell_id}.lock").open("a")
        except FileNotFoundError as error:
            raise self._lost() from error
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        with file as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def _lost(self) -> InputError:
        return InputError(
            f"{self.path}: the sweep's folder is gone since it began: was a shared disk unmounted? Finished cells are "
            "in it; start the sweep again when it is back"
        )

    def _path(self, cell_id: str) -> Path:
        return self.path / CELLS / f"{cell_id}.json"


def open_store(path: str | Path, definition: Mapping[str, Any], environment: Mapping[str, Any]) -> Store:
    """Opens the folder of a sweep with this definition, or names one that `Store.make` will make.

    Raises:
        InputError: the folder holds something else, or a sweep with another definition; the message names the field.
    """
    path = Path(path)
    definition = json.loads(_canonical(definition))  # as it will be read back
    found = _found(path, definition)
    if found is None and path.exists() and (not path.is_dir() or any(entry.name != CELLS for entry in _visible(path))):
        raise InputError(f"{path}: exists, is not empty and is no sweep; choose another --out")
    return Store(path=path, definition=definition, environment=dict(environment if found is None else found))


def _found(path: Path, definition: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The environment of the sweep that lies there; None where there is none. Raises InputError where it is another."""
    manifest = path / MANIFEST
    if not manifest.exists():
        return None
    found = read_json(manifest)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise InputError(f"{manifest}: is not a sweep of this version; choose another --out")
    if found.get("definition") != definition:
        name, theirs, ours = _first_difference(found.get("definition"), definition)
        raise InputError(
            f"{path}: holds another sweep: {name} is {theirs!r} there, {ours!r} here; choose another --out"
        )
    return found.get("environment", {})


def _visible(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(".")]


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror or error}") from error


def _canonical(record: Any) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _first_difference(theirs: Any, ours: Any, name: str = "") -> tuple[str, Any, Any]:
    """The dotted name of the first field that differs, and both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*ours, *theirs]:
            if theirs.get(key) != ours.get(key):
                return _first_difference(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    return name or "definition", theirs, ours
