"""The native checkpoint: a folder of packed arrays as they are in memory, with what they mean beside them.

    jquant.json     format and version; each tensor's scheme, shape, dtype and hash; the files of arrays/ with their
                    sizes; and what the writer describes: the model's config, where it comes from
    arrays/PART/    the arrays, by orbax; a part holds some of the tensors, and parts are written and read one by one
    tokenizer.json, tokenizer_config.json

orbax restores arrays of equal shapes into any scheme without a word, and a damaged file may still decode. So the hash
of a tensor covers its scheme, shape, dtype and the bytes of all its arrays, and reading compares. A file that is
missing or cut is found when the folder is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, quantize
from jquant.core.scheme import scheme
from jquant.io.atomic import replacing
from jquant.io.json_file import read_json
from jquant.io.mapped import TensorInfo, shown
from jquant.io.new_folder import appearing_folder, check_new_folder
from jquant.io.processes import is_writer, on_writer, several
from jquant.io.system_errors import quiet, system_errors

DESCRIPTION = "jquant.json"
ARRAYS = "arrays"
FORMAT = "jquant-native"
VERSION = 2
HELD = frozenset(  # dtypes that tensorstore, under orbax, can hold
    [
        "bool",
        "int2",
        "int4",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "bfloat16",
        "float4_e2m1fn",
        "float8_e3m4",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Native:
    """An opened native checkpoint: the table is read and checked, arrays are not read yet."""

    path: Path
    description: dict[str, Any] = field(repr=False)
    _arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def names(self) -> list[str]:
        return list(self.description["tensors"])

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Shapes, and bytes as packed; the type is the scheme, or the dtype of a tensor that has none."""
        infos = {}
        for name, entry in self.description["tensors"].items():
            parts = _parts(_template(entry)).values()
            infos[name] = TensorInfo(
                name=name,
                shape=tuple(entry["shape"]),
                type=entry.get("scheme", entry["dtype"]),
                offset=0,  # the arrays lie in orbax's files, not in one of ours
                nbytes=sum(math.prod(part.shape) * part.dtype.itemsize for part in parts),
            )
        return infos

    @property
    def files(self) -> list[Path]:
        """The files of the arrays."""
        return [self.path / ARRAYS / name for name in self.description["files"]]

    @property
    def sha256(self) -> str:
        """Of all tensors: their names, schemes, shapes, dtypes and bytes. The same content saved again has the same."""
        hashes = {name: entry["sha256"] for name, entry in self.description["tensors"].items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def read(self, name: str) -> np.ndarray | QTensor:
        """A tensor, packed as it was saved; threads may read at once.

        The first call for a tensor of a part reads the whole part, and each is handed out once: no second copy stays
        behind. Asking for one again reads the part again.

        Raises:
            InputError: an array is missing or damaged, or not what the table says.
        """
        if name not in self.description["tensors"]:
            raise InputError(f"{self.path}: there is no tensor {shown(name)} among its {len(self.names)}")
        entry = self.description["tensors"][name]
        with self._lock:
            if any(_key(name, array) not in self._arrays for array in _parts(_template(entry))):
                self._arrays.update(_restore(self.path / ARRAYS / entry["part"], self._keys(entry["part"])))
            arrays = {array: self._arrays.pop(_key(name, array)) for array in _parts(_template(entry))}
        return _assembled(self.path, name, entry, arrays)

    def _keys(self, part: str) -> list[str]:
        table = self.description["tensors"].items()
        return [
            _key(name, array) for name, entry in table if entry["part"] == part for array in _parts(_template(entry))
        ]


def is_native(path: Path) -> bool:
    """Whether a folder is a native checkpoint, damaged or not."""
    return (path / DESCRIPTION).is_file()


def write_native(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray | jax.Array | QTensor],
    description: Mapping[str, Any],
    *,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a checkpoint folder; it appears under its name whole or not at all.

    A killed writer leaves a hidden `.NAME.*.partial` beside it, which the next writer of the same folder removes.

    Args:
        path: a folder that does not exist yet, or is empty.
        tensors: by name; QTensors are written packed.
        description: JSON values kept in jquant.json (model config, provenance, …).
        extra_files: more files of the folder, by name: the tokenizer's.

    Raises:
        InputError: the folder exists and is not empty, or cannot be written; a tensor is empty or of an odd dtype.
    """
    path = Path(path)
    check_new_folder(path)
    try:
        with appearing_folder(path) as partial_folder:
            table = write_part(partial_folder, "all", tensors)
            on_writer(lambda: complete(partial_folder, table, description, extra_files=extra_files))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_part(
    folder: Path, part: str, tensors: Mapping[str, np.ndarray | jax.Array | QTensor]
) -> dict[str, dict[str, Any]]:
    """Saves some tensors of a checkpoint in the making; an earlier attempt at the same part is replaced.

    Of several processes each writes what its devices hold; arrays lie on all their devices.

    Returns:
        Their entries in the table that `complete` takes; of several processes, the writer's alone has any.

    Raises:
        InputError: a tensor is empty or of an odd dtype.
        OSError: the disk is full, …
    """
    _check_tensors(tensors)
    place = folder / ARRAYS / part
    on_writer(lambda: shutil.rmtree(place) if place.exists() else None)
    if not several():
        table = {name: {**_describe(tensor), "part": part} for name, tensor in tensors.items()}
        _save(place, tensors)
        return table
    _save(place, tensors)
    return _read_back(place, part, tensors) if is_writer() else {}


def _read_back(place: Path, part: str, tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of tensors that no process holds whole: hashed as they lie on disk, in host memory."""
    keys = {name: {array: _key(name, array) for array in _parts(tensor)} for name, tensor in tensors.items()}
    found = _restore(place, [key for arrays in keys.values() for key in arrays.values()])
    table = {}
    for name, tensor in tensors.items():
        whole = jax.tree.unflatten(jax.tree.structure(tensor), [found.pop(key) for key in keys[name].values()])
        table[name] = {**_describe(whole), "part": part}
    return table


def read_part(folder: Path, part: str, table: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray | QTensor]:
    """What `write_part` saved. Raises InputError where an array is missing or damaged."""
    places = {name: _parts(_template(entry)) for name, entry in table.items()}
    found = _restore(folder / ARRAYS / part, [_key(name, array) for name in places for array in places[name]])
    return {
        name: _assembled(folder, name, table[name], {array: found[_key(name, array)] for array in places[name]})
        for name in places
    }


def complete(
    folder: Path,
    table: Mapping[str, Mapping[str, Any]],
    description: Mapping[str, Any],
    *,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes what makes the parts in `folder` a checkpoint: the table, and the files beside it."""
    files = dict(_sizes(folder / ARRAYS))
    whole = {**description, "format": FORMAT, "version": VERSION, "tensors": dict(table), "files": files}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    # The description comes last: where it is, all is there.
    for name, content in {**(extra_files or {}), DESCRIPTION: text.encode()}.items():
        with replacing(folder / name) as file:
            file.write(content)


def open_native(path: Path) -> Native:
    """Reads the table of a native checkpoint.

    Raises:
        InputError: the table is missing or damaged, or its version is unknown.
    """
    source = path / DESCRIPTION
    description = read_json(source)
    if description.get("format") != FORMAT or description.get("version") != VERSION:
        raise InputError(
            f"{source}: format {description.get('format')!r} version {description.get('version')!r}; "
            f"this jquant reads {FORMAT} version {VERSION}"
        )
    for part in ("tensors", "files"):
        if not isinstance(description.get(part), dict):
            raise InputError(f"{source}: the table of {part} is missing or damaged")
    for name, entry in description["tensors"].items():
        try:
            _template(entry)
            bytes.fromhex(entry["sha256"])
            _check_part_name(entry["part"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise InputError(f"{source}: the entry of tensor {shown(name)} is damaged: {reason}") from error
    _check_files(path, description["files"])
    return Native(path=path, description=description)


def _check_part_name(part: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", part):  # it becomes a folder's name
        raise ValueError(f"part {part!r}")


def _check_tensors(tensors: Mapping[str, np.ndarray | jax.Array | QTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.size == 0:
            raise InputError(f"tensor {shown(name)} of shape {tensor.shape} is empty: leave it out")
        for array in _parts(tensor).values():
            if str(array.dtype) not in HELD:
                raise InputError(
                    f"tensor {shown(name)} is {array.dtype}, which a native checkpoint cannot hold; "
                    f"it holds {', '.join(sorted(HELD))}"
                )


def _assembled(
    folder: Path, name: str, entry: Mapping[str, Any], arrays: dict[str, np.ndarray]
) -> np.ndarray | QTensor:
    """The tensor of these arrays. Raises InputError where they are not what the entry says."""
    template, what = _template(entry), f"{folder}: tensor {shown(name)}"
    for part, wanted in _parts(template).items():
        if arrays[part].shape != wanted.shape or arrays[part].dtype != wanted.dtype:
            raise InputError(
                f"{what}: array {part} is {arrays[part].dtype}{list(arrays[part].shape)}, {DESCRIPTION} calls for "
                f"{wanted.dtype}{list(wanted.shape)}"
            )
    tensor = jax.tree.unflatten(jax.tree.structure(template), list(arrays.values()))
    if _hash(tensor, entry) != entry["sha256"]:
        raise InputError(f"{what}: {ARRAYS}/ and {DESCRIPTION} do not belong together: one was changed after saving")
    return tensor


def _describe(tensor: np.ndarray | jax.Array | QTensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
    if isinstance(tensor, QTensor):
        entry["scheme"] = str(tensor.scheme)
        if tensor.groups is not None:
            entry["groups"] = True
    return entry | {"sha256": _hash(tensor, entry)}


def _hash(tensor: np.ndarray | jax.Array | QTensor, entry: Mapping[str, Any]) -> str:
    """SHA-256 of what the entry says, then the bytes of each array as memory has them, in the order of the tensor."""
    said = {key: entry[key] for key in ("shape", "dtype", "scheme", "groups") if key in entry}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for array in _parts(tensor).values():
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _parts(tensor: Any) -> dict[str, Any]:
    """The arrays of a tensor by the name of their place in it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tensor)
    return {jax.tree_util.keystr(place, simple=True, separator=".") or "array": leaf for place, leaf in leaves}


def _template(entry: Mapping[str, Any]) -> Any:
    """The tensor that a table entry describes, with the shapes and dtypes of its arrays in the place of them."""
    return _abstract(entry.get("scheme"), tuple(entry["shape"]), entry["dtype"], entry.get("groups") is True)


@lru_cache(maxsize=1024)
def _abstract(spec: str | None, shape: tuple[int, ...], dtype: str, grouped: bool) -> Any:
    array = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    if spec is None:
        return array
    groups = jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), np.dtype(np.int32)) if grouped else None
    return jax.eval_shape(lambda x, columns: quantize(x, scheme(spec), groups=columns), array, groups)


def _sizes(folder: Path) -> list[tuple[str, int]]:
    """Every file below a folder by its path from there, with its bytes."""
    found = [file for file in folder.rglob("*") if file.is_file()]
    return sorted((file.relative_to(folder).as_posix(), file.stat().st_size) for file in found)


def _check_files(path: Path, sizes: Mapping[str, Any]) -> None:
    """Finds what is missing or cut before orbax does, which is less clear about it."""
    there = dict(_sizes(path / ARRAYS))
    for name, size in sizes.items():
        if name not in there:
            raise InputError(f"{path}: file {shown(f'{ARRAYS}/{name}')} is missing: copy the folder again")
        if there[name] != size:
            raise InputError(
                f"{path}: file {shown(f'{ARRAYS}/{name}')} has {there[name]} bytes, saved were {size}: "
                "copy the folder again"
            )


def _key(name: str, part: str) -> str:
    return f"{name}|{part}"


def _save(folder: Path, tensors: Mapping[str, np.ndarray | jax.Array | QTensor]) -> None:
    import orbax.checkpoint as ocp

    # Arrays of jax go as they are: numpy arrays orbax would copy first, all at once.
    arrays = {_key(name, part): array for name, tensor in tensors.items() for part, array in _parts(tensor).items()}
    with system_errors(), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), arrays)


def _restore(folder: Path, keys: list[str]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    try:
        # Each process reads for itself: the order in which tensors are asked for differs.
        alone: dict[str, Any] = {}
        if several():
            options = ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            )
            alone = {"multiprocessing_options": options}
        with quiet("absl"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**alone), **alone) as checkpointer:
            as_numpy = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in keys}
            return checkpointer.restore(folder.absolute(), item=dict.fromkeys(keys, 0), restore_args=as_numpy)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{folder}: the arrays are missing or damaged: {reason}") from error


_ = ml_dtypes  # gives numpy the small floats that dtype names in the table refer to
