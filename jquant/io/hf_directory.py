"""A checkpoint folder as Hugging Face lays it out: config.json beside one safetensors file or an index of several.

What a folder may reach: an index names files by plain relative paths. A weight file may be a symbolic link only to a
file of the same folder, or, in the Hub's cache (`CACHE/REPO/snapshots/REVISION`), to a file of `CACHE/REPO/blobs` or of
`CACHE/blobs/XX`, which its repositories share. Pickled weights are never opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.io.json_file import read_json, read_json_if_there
from jquant.io.mapped import TensorInfo, shown
from jquant.io.safetensors import SafetensorsFile, open_safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARED_BLOB = re.compile("[0-9a-f]{64}")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, kw_only=True, eq=False)
class HFDirectory:
    """An open checkpoint folder. `generation_config` is empty where the folder has none."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    generation_config: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)  # offsets count within the tensor's own file
    files: tuple[SafetensorsFile, ...] = field(repr=False)
    file_of: dict[str, SafetensorsFile] = field(repr=False)  # by tensor name

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored: a read-only view of its file in the stored dtype.

        Raises:
            InputError: no such tensor, or its dtype is not known here.
        """
        if name not in self.file_of:
            raise InputError(f"{self.path}: there is no tensor {shown(name)} among its {len(self.tensors)}")
        return self.file_of[name].read(name)


def open_hf_directory(path: str | os.PathLike[str]) -> HFDirectory:
    """Reads a checkpoint folder's configs and the headers of its weight files; no tensor is read.

    Raises:
        InputError: a file is missing, damaged or outside the folder, or the index and its files disagree.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: is no folder")
    config_file = path / "config.json"
    if not config_file.exists():
        raise InputError(f"{path}: has no config.json: it is no Hugging Face checkpoint{_gguf_hint(path)}")
    config = read_json(config_file)
    if (path / SINGLE).exists():
        file = open_safetensors(_inside(path, SINGLE, path))
        file_of = dict.fromkeys(file.tensors, file)
    elif (path / INDEX).exists():
        file_of = _open_shards(path, path / INDEX)
    else:
        raise _no_weights(path)
    return HFDirectory(
        path=path,
        config=config,
        generation_config=read_json_if_there(path / "generation_config.json"),
        tensors={name: file.tensors[name] for name, file in file_of.items()},
        files=tuple({file.path: file for file in file_of.values()}.values()),
        file_of=file_of,
    )


def _open_shards(folder: Path, index: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor that the index lists. Index and files must agree on what there is."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map must map tensor names to file names")
    shards: dict[str, SafetensorsFile] = {}
    for name in dict.fromkeys(weight_map.values()):
        shards[name] = open_safetensors(_inside(folder, name, index))
    for tensor, name in weight_map.items():
        if tensor not in shards[name].tensors:
            raise InputError(f"{index}: places tensor {shown(tensor)} in {shown(name)}, which does not hold it")
    for name, shard in shards.items():
        unlisted = next((tensor for tensor in shard.tensors if weight_map.get(tensor) != name), None)
        if unlisted is not None:
            raise InputError(f"{shard.path}: holds tensor {shown(unlisted)}, which {INDEX} does not place there")
    return {tensor: shards[name] for tensor, name in weight_map.items()}


def _inside(folder: Path, name: str, source: Path) -> Path:
    """The path of an existing weight file, refused where the name or a link leads out of the folder."""
    pure = PurePosixPath(name)
    plain = not pure.is_absolute() and not PureWindowsPath(name).drive and "\\" not in name and "\0" not in name
    if not name or not plain or ".." in pure.parts:
        raise InputError(f"{source}: names {shown(name)}, which is not a plain path inside the folder")
    try:
        root, target = folder.resolve(), (folder / pure).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise InputError(f"{source}: names {shown(name)}, which cannot be found: download it again") from error
    if not target.is_relative_to(root) and not _in_hub_cache(root, target):
        raise InputError(f"{source}: {shown(name)} is a link to {target}, outside the folder: copy the file there")
    return folder / pure


def _in_hub_cache(snapshot: Path, target: Path) -> bool:
    """Whether `target` is a blob of the repository whose snapshot the folder is, or one that repositories share."""
    if snapshot.parent.name != "snapshots":
        return False
    repository = snapshot.parent.parent
    shared = repository.parent / "blobs" / target.name[:2] / target.name
    return target.parent == repository / "blobs" or (
        target == shared and _SHARED_BLOB.fullmatch(target.name) is not None
    )


def _no_weights(folder: Path) -> InputError:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        return InputError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which may run code and are not read: "
            f"save the model again with save_pretrained, which writes {SINGLE}"
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"; {others[0]} is not one of them" if others else _gguf_hint(folder)
    return InputError(f"{folder}: has neither {SINGLE} nor {INDEX}{found}")


def _gguf_hint(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    return f"; it holds {files[0]}: give the path of that file" if files else ""
