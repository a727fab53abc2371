"""The folder of an unfinished run: parts of the checkpoint as they are done, and what enters the next block.

    definition.json       what the run computes; another run does not go on from here
    arrays/PART/          finished tensors (io/native.py)
    parts/PART.json       written after them, last: its being there says that the part is done
    states-N-ROW.npy      what enters block N: of each batch the rows from ROW on, as one device held them

A run that was killed at any point goes on behind its last finished part, and gives the same bits: nothing that later
blocks see is computed twice in different ways. Several processes see one folder: each writes what its devices hold,
and one of them the rest.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.io.atomic import replacing
from jquant.io.folder_lock import locked_folder
from jquant.io.json_file import read_json
from jquant.io.native import ARRAYS, DESCRIPTION, complete, read_part, write_part
from jquant.io.processes import in_all, on_writer
from jquant.io.system_errors import write_array
from jquant.ptq.activations import SPILLED
from jquant.ptq.parts_on_host import Begin, begin_of, from_parts, parts_of

_DEFINITION = "definition.json"
_PARTS = "parts"


class Workdir:
    """An opened folder; made by `open_workdir`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, part: str) -> dict[str, Any] | None:
        """What was said of a part when it was finished; None where it is not."""
        place = self.path / _PARTS / f"{part}.json"
        return on_writer(lambda: read_json(place)["record"] if place.exists() else None)

    def read(self, part: str) -> dict[str, np.ndarray | QTensor]:
        """The tensors of a finished part. Raises InputError where they are damaged."""
        return read_part(self.path, part, read_json(self.path / _PARTS / f"{part}.json")["table"])

    def finish(
        self, part: str, tensors: Mapping[str, np.ndarray | jax.Array | QTensor], record: Mapping[str, Any]
    ) -> None:
        """Saves a part. Raises InputError where it cannot be written, as on a full disk; it is then not there."""
        with self._writing():
            table = write_part(self.path, part, tensors)

            def note() -> None:
                with replacing(self.path / _PARTS / f"{part}.json") as file:
                    file.write(json.dumps({"table": table, "record": record}).encode())

            on_writer(note)

    def save_states(self, index: int, states: Sequence[Any]) -> None:
        """Keeps what enters block `index`, one array a batch, all of one shape; those of blocks long done go."""
        in_all(lambda: self._save_parts(index, states))
        on_writer(lambda: self._drop_states(before=index - 1))

    def _save_parts(self, index: int, states: Sequence[Any]) -> None:
        begins = list(parts_of(states[0], once=True))
        with self._writing(), contextlib.ExitStack() as stack:
            files = {begin: stack.enter_context(replacing(self._states(index, begin))) for begin in begins}
            for state in states:
                for begin, part in parts_of(state, once=True).items():
                    plain = part if part.dtype.isbuiltin == 1 else part.view(np.uint16)
                    write_array(files[begin], plain)

    def load_states(self, index: int, count: int, like: Any, sharding: Any) -> Iterator[jax.Array] | None:
        """What `save_states` kept for this block, batch by batch; None where it is not there.

        Args:
            index: of the block.
            count: of batches.
            like: shape and dtype of one.
            sharding: where it lies, as when it was saved; None for one device.
        """
        if not on_writer(lambda: any(self.path.glob(f"states-{index}-*.npy"))):
            return None
        return self._load_parts(index, count, like, sharding)

    def _load_parts(self, index: int, count: int, like: Any, sharding: Any) -> Iterator[jax.Array]:
        axes = {(0,) * len(like.shape)}
        if sharding is not None:
            axes = {begin_of(place) for place in sharding.addressable_devices_indices_map(like.shape).values()}
        try:
            with contextlib.ExitStack() as stack:
                files = {begin: stack.enter_context(self._states(index, begin).open("rb")) for begin in axes}
                for _ in range(count):
                    parts = {begin: np.lib.format.read_array(file).view(like.dtype) for begin, file in files.items()}
                    yield from_parts(like.shape, sharding, parts)
        except OSError as error:
            raise InputError(
                f"{self.path}: what enters block {index} cannot be read: {error.strerror or error}; all processes must "
                "see the same folder"
            ) from error

    def complete(self, description: Mapping[str, Any], *, extra_files: Mapping[str, bytes] | None = None) -> None:
        """Makes a native checkpoint of the finished parts; `publish` gives it its name."""

        def join() -> None:
            table: dict[str, Any] = {}
            for place in sorted((self.path / _PARTS).glob("*.json")):
                table |= read_json(place)["table"]
            complete(self.path, table, description, extra_files=extra_files)

        with self._writing():
            on_writer(join)

    def publish(self, target: Path) -> None:
        """Takes away what only an unfinished run needs, and gives the folder its final name, at once."""

        def rename() -> None:
            _clear(self.path)
            if target.exists():
                target.rmdir()  # empty, as was checked; a folder replaces another only where that is
            self.path.rename(target)

        with self._writing():
            on_writer(rename)

    def activations(self) -> dict[str, str]:
        """The schemes of layers' inputs, by path, in all finished parts."""
        found: dict[str, str] = {}
        for place in sorted((self.path / _PARTS).glob("*.json")):
            found |= read_json(place)["record"].get("activations", {})
        return found

    @property
    def finished(self) -> int:
        """How many parts an earlier run, or this one, has finished."""
        return on_writer(lambda: len(list((self.path / _PARTS).glob("*.json"))))

    @property
    def is_complete(self) -> bool:
        """Whether only the final name is missing."""
        return on_writer(lambda: (self.path / DESCRIPTION).exists())

    def _states(self, index: int, begin: Begin) -> Path:
        return self.path / f"states-{index}-{begin[0]}.npy"

    def _drop_states(self, *, before: int) -> None:
        for old in self.path.glob("states-*.npy"):
            if int(old.stem.split("-")[1]) < before:
                old.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, InputError) else error
            if isinstance(error, InputError) and not isinstance(cause, OSError):
                raise
            reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:200]
            raise InputError(
                f"{self.path}: cannot be written: {reason}; once it can be, start the same command "
                "again to go on from the last block"
            ) from error


@contextlib.contextmanager
def open_workdir(path: Path, definition: Mapping[str, Any]) -> Iterator[Workdir]:
    """The folder of an unfinished run with this definition, made where it is not there; locked while in use.

    Raises:
        InputError: it holds another run, is in use, or cannot be made.
    """
    definition = json.loads(json.dumps(definition))  # as it will be read back
    with locked_folder(path):
        workdir = Workdir(path)
        complete_already = workdir.is_complete
        on_writer(lambda: _prepare(path, definition, is_complete=complete_already))
        yield workdir


def _prepare(path: Path, definition: Mapping[str, Any], *, is_complete: bool) -> None:
    begun = (path / _DEFINITION).exists()
    found = read_json(path / _DEFINITION) if begun else definition
    try:
        if begun and not is_complete and found != definition and not any((path / _PARTS).glob("*.json")):
            _clear(path)  # a run that was refused, or stopped before it had anything: nothing is lost
            shutil.rmtree(path / ARRAYS, ignore_errors=True)
            begun = False
        _clear_spilled(path)  # of a run that was killed: whoever opens the folder has it alone
        if not is_complete:
            (path / _PARTS).mkdir(exist_ok=True)
            (path / ARRAYS).mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror or error}") from error
    if begun:
        _check_same(path, found, definition)
    elif not is_complete:
        with replacing(path / _DEFINITION) as file:
            file.write((json.dumps(definition, indent=1) + "\n").encode())


def _clear(path: Path) -> None:
    """Takes away what only an unfinished run needs, its definition last."""
    for states in path.glob("states-*.npy"):
        states.unlink(missing_ok=True)
    shutil.rmtree(path / _PARTS, ignore_errors=True)
    _clear_spilled(path)
    (path / _DEFINITION).unlink(missing_ok=True)


def _clear_spilled(path: Path) -> None:
    for folder in path.glob(f"{SPILLED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    difference = _difference(found, wanted)
    if difference is not None:
        name, there, here = difference
        raise InputError(
            f"{path}: holds an unfinished run whose {name} differs ({_short(there)} there, {_short(here)} here); "
            "finish that one, or remove the folder"
        )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry that differs, inside of mappings by its path, and what it is on both sides; hashes last."""
    for name in sorted(dict.fromkeys((*wanted, *found)), key=lambda name: name.endswith("sha256")):
        there, here = found.get(name), wanted.get(name)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            inside = _difference(there, here)
            assert inside is not None, "they differ"
            return f"{name}.{inside[0]}", *inside[1:]
        return name, there, here
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
