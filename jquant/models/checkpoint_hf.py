"""A Hugging Face folder as a checkpoint, its packed layers left packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import Tensor
from jquant.io.hf_directory import HFDirectory, open_hf_directory
from jquant.io.json_file import read_json_if_there
from jquant.io.tokenizer import tokenizer_from_json
from jquant.models.checkpoint import EXPORT_RECORD, Checkpoint
from jquant.models.checkpoint_readers import DERIVED, NUMBER, Reader, layers_of, read_config, readers_of, sha256_of
from jquant.models.families import config_from_hf
from jquant.models.packed_hf import PackedLayers, packed_layers
from jquant.models.tensor_names import Table, hf_tensors


def open_hf_checkpoint(name: str, path: Path) -> Checkpoint:
    """The folder at `path`; `name` is what the caller wrote."""
    folder = open_hf_directory(path)
    source = path / "config.json"
    depth = folder.config.get("num_hidden_layers")
    config = read_config(partial(config_from_hf, folder.config, str(source)), depth, folder.tensors, source)
    tied_copy = "lm_head.weight" if config.tie_embeddings else None
    names = [tensor for tensor in folder.tensors if not DERIVED.fullmatch(tensor) and tensor != tied_copy]
    table, read = hf_tensors(config.architecture), folder.read
    packed, activations, quantized = None, {}, frozenset[str]()
    if folder.config.get("quantization_config") is not None:
        packed = packed_layers(folder)
        weights = {f"{layer}.weight": layer for layer in packed.readers}
        names = [*(tensor for tensor in names if tensor not in packed.tensors), *weights]
        quantized = frozenset(ours for weight in weights for ours in layers_of(weight, table))
        read = partial(_packed_or_float, packed, weights, folder)
    readers = readers_of(names, table, read, config, path)
    if packed is not None:
        inputs, activations = _inputs(packed, table, path)
        readers |= inputs
    return Checkpoint(
        name=name,
        path=path,
        config=config,
        note=_hf_note(folder),
        readers=readers,
        weights_sha256=partial(sha256_of, tuple(file.path for file in folder.files)),
        tokenizer_reader=lambda: tokenizer_from_json(path),
        activations=activations,
        quantized=quantized,
        provenance=_exported(path),
    )


def _packed_or_float(
    packed: PackedLayers, weights: Mapping[str, str], folder: HFDirectory, name: str
) -> np.ndarray | QTensor:
    return packed.weight(weights[name]) if name in weights else folder.read(name)


def _inputs(packed: PackedLayers, table: Table, path: Path) -> tuple[dict[str, Reader], dict[str, str]]:
    """Readers of the static scales of layers' inputs, and the schemes of inputs, by the decoder's paths."""
    readers: dict[str, Reader] = {}
    activations: dict[str, str] = {}
    for layer, activation in packed.activations.items():
        numbers = NUMBER.findall(f"{layer}.")
        for owner in layers_of(f"{layer}.weight", table):
            if activations.setdefault(owner, str(activation)) != str(activation):
                raise InputError(f"{path}: inputs of {owner}'s experts are quantized in different ways")
            if not isinstance(activation.granularity, Tensor):
                continue
            if len(numbers) == 2:
                raise InputError(f"{path}: static scales for the inputs of single experts are not supported")
            readers[f"{owner}.input_scale"] = partial(_static, packed, layer, "input_scale")
            if activation.zero_point == "integer":
                readers[f"{owner}.input_zero_point"] = partial(_static, packed, layer, "input_zero_point")
    return readers, activations


def _static(packed: PackedLayers, layer: str, name: str) -> np.ndarray:
    return np.asarray(getattr(packed.readers[layer](), name), np.float32)


def _exported(path: Path) -> Mapping[str, Any]:
    """What a folder that `export` wrote says of its making."""
    said = read_json_if_there(path / EXPORT_RECORD).get("provenance", {})
    return said if isinstance(said, dict) else {}


def _hf_note(folder: HFDirectory) -> str:
    types = Counter(info.type for info in folder.tensors.values())
    return f"weights stored as {types.most_common(1)[0][0]}" if types else ""
