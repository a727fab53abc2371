"""What a checkpoint file or folder holds, from its headers alone: tensors, types, bits per weight."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jquant.core.errors import InputError
from jquant.io.gguf import MAGIC, open_gguf
from jquant.io.hf_directory import open_hf_directory
from jquant.io.mapped import TensorInfo
from jquant.io.safetensors import open_safetensors

NATIVE = "jquant.json"  # DESCRIPTION of io/native.py


@dataclass(frozen=True, kw_only=True)
class InspectedTensor:
    """One stored tensor. Bits per weight count its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class TypeTotal:
    """All tensors of one stored type."""

    type: str
    tensors: int
    parameters: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A checkpoint as stored. `parameters` counts stored values, so a packed word of codes counts as one."""

    path: str
    format: str
    architecture: str | None  # as the file names it; None where it does not
    parameters: int
    tensor_bytes: int
    file_bytes: int  # of all weight files, headers and padding included
    bits_per_weight: float  # of the tensors' bytes over all parameters
    types: tuple[TypeTotal, ...]  # the most bytes first
    tensors: tuple[InspectedTensor, ...]  # in the order of the file

    def as_json(self) -> dict[str, Any]:
        """Plain values, in the order of the fields."""
        return dataclasses.asdict(self)


def inspect_file(path: str | os.PathLike[str]) -> Inspection:
    """Inspects a GGUF file, a safetensors file, a Hugging Face folder or a native checkpoint; no tensor is read.

    Raises:
        InputError: the path is none of these, or what it holds is damaged.
    """
    path = Path(path)
    if (path / NATIVE).is_file():
        from jquant.io.native import open_native  # brings jax, which the other kinds do without

        native = open_native(path)
        config = native.description.get("config")
        named = config.get("architecture") if isinstance(config, dict) else None
        return _inspection(path, "jquant native", named, native.files, native.tensors.values())
    if path.is_dir():
        folder = open_hf_directory(path)
        names = folder.config.get("architectures")
        named = names[0] if isinstance(names, list) and names else folder.config.get("model_type")
        files = [file.path for file in folder.files]
        return _inspection(path, "Hugging Face folder", named, files, folder.tensors.values())
    if _is_gguf(path):
        gguf = open_gguf(path)
        named = gguf.metadata.get("general.architecture")
        return _inspection(path, f"GGUF version {gguf.version}", named, [path], gguf.tensors.values())
    file = open_safetensors(path)
    return _inspection(path, "safetensors", file.metadata.get("architecture"), [path], file.tensors.values())


def _is_gguf(path: Path) -> bool:
    """By the first bytes; a file named .gguf is one too, so that its reader says what is wrong with it."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or path.suffix == ".gguf"
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _inspection(
    path: Path, form: str, architecture: Any, files: Iterable[Path], infos: Iterable[TensorInfo]
) -> Inspection:
    infos = list(infos)
    by_type: dict[str, list[TensorInfo]] = {}
    for info in infos:
        by_type.setdefault(info.type, []).append(info)
    totals = [
        TypeTotal(
            type=kind,
            tensors=len(members),
            parameters=sum(info.size for info in members),
            bytes=sum(info.nbytes for info in members),
            bits_per_weight=_bits_per_weight(members),
        )
        for kind, members in by_type.items()
    ]
    return Inspection(
        path=str(path),
        format=form,
        architecture=architecture if isinstance(architecture, str) else None,
        parameters=sum(info.size for info in infos),
        tensor_bytes=sum(info.nbytes for info in infos),
        file_bytes=sum(file.stat().st_size for file in files),
        bits_per_weight=_bits_per_weight(infos),
        types=tuple(sorted(totals, key=lambda total: -total.bytes)),
        tensors=tuple(
            InspectedTensor(
                name=info.name,
                shape=info.shape,
                type=info.type,
                bytes=info.nbytes,
                bits_per_weight=_bits_per_weight([info]),
            )
            for info in infos
        ),
    )


def _bits_per_weight(infos: Iterable[TensorInfo]) -> float:
    """8 · bytes / values, 0 for nothing."""
    infos = list(infos)
    values = sum(info.size for info in infos)
    return 8 * sum(info.nbytes for info in infos) / values if values else 0.0


def render(inspection: Inspection) -> RenderableType:
    """A summary, the totals by type, and the tensors; those that differ only in a number of their name share a row."""
    summary = Table.grid(padding=(0, 2))
    rows = {
        "file": inspection.path,
        "format": inspection.format,
        "architecture": inspection.architecture or "not stated",
        "parameters": f"{inspection.parameters:,}",
        "bits per weight": f"{inspection.bits_per_weight:.3f}",
        "tensor bytes": f"{inspection.tensor_bytes:,}",
        "file bytes": f"{inspection.file_bytes:,}",
    }
    for name, value in rows.items():
        summary.add_row(name, escape(value))

    totals = _table("type", tensors="right", parameters="right", bytes="right", bits="right")
    for total in inspection.types:
        totals.add_row(
            escape(total.type),
            f"{total.tensors:,}",
            f"{total.parameters:,}",
            f"{total.bytes:,}",
            f"{total.bits_per_weight:.3f}",
        )

    alike: dict[tuple[str, tuple[int, ...], str], list[InspectedTensor]] = {}
    for tensor in inspection.tensors:
        alike.setdefault((re.sub(r"\d+", "*", tensor.name), tensor.shape, tensor.type), []).append(tensor)
    tensors = _table("tensor", count="right", shape="left", type="left", bytes="right", bits="right")
    for (pattern, shape, kind), members in alike.items():
        tensors.add_row(
            escape(pattern if len(members) > 1 else members[0].name),
            f"{len(members):,}",
            " × ".join(map(str, shape)) or "scalar",
            escape(kind),
            f"{sum(tensor.bytes for tensor in members):,}",
            f"{members[0].bits_per_weight:.3f}",
        )
    return Group(summary, "", totals, "", tensors)


def _table(first: str, **columns: Any) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name, justify in columns.items():
        table.add_column(name, justify=justify)
    return table
