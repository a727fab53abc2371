"""A folder that `save` wrote as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jquant.core.errors import InputError
from jquant.io import native
from jquant.io.tokenizer import one_line, tokenizer_from_json
from jquant.models.checkpoint import Checkpoint
from jquant.models.config import ModelConfig


def open_native_checkpoint(name: str, path: Path) -> Checkpoint:
    """The folder at `path`; `name` is what the caller wrote."""
    opened = native.open_native(path)
    return Checkpoint(
        name=name,
        path=path,
        config=ModelConfig.from_json(opened.description.get("config"), str(path)),
        note=str(opened.description.get("note", "")),
        readers={tensor: partial(opened.read, tensor) for tensor in opened.names},
        weights_sha256=lambda: opened.sha256,
        tokenizer_reader=lambda: tokenizer_from_json(path),
        activations=_activations(opened.description, path),
        quantized=frozenset(
            tensor.removesuffix(".weight")
            for tensor, entry in opened.description["tensors"].items()
            if "scheme" in entry
        ),
        provenance=_provenance(opened.description),
    )


def _provenance(description: Mapping[str, Any]) -> Mapping[str, Any]:
    found = description.get("provenance", {})
    return found if isinstance(found, dict) else {}


def _activations(description: Mapping[str, Any], path: Path) -> dict[str, str]:
    found = description.get("activations", {})
    if not isinstance(found, dict) or not all(isinstance(spec, str) for spec in found.values()):
        raise InputError(f"{path}: the schemes of activations are damaged: {one_line(ValueError(found))}")
    return found
