"""A decoder, float or packed, to a native checkpoint that `load_model` reads back."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jquant.core.qtensor import QTensor
from jquant.io.native import write_native
from jquant.io.tokenizer import Tokenizer, tokenizer_to_json
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.nn.install import activations_of, tensors_of


def save(
    model: Decoder,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    note: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model, its config and tokenizer to a new folder, which appears whole or not at all.

    Args:
        model: packed layers are written packed.
        path: a folder that does not exist yet, or is empty.
        tokenizer: goes beside the weights; without it the folder evaluates nothing but token ids.
        note: what a reader of results must know about the weights.
        provenance: JSON values that say where the weights come from (source, hash, scheme, versions).

    Raises:
        InputError: the folder is not empty or cannot be written.
    """
    description = describe(model.config, note=note, provenance=provenance, activations=activations_of(model))
    write_native(path, tensors_of(model), description, extra_files=tokenizer_files(tokenizer))


def describe(
    config: ModelConfig, *, note: str, provenance: Mapping[str, Any] | None, activations: Mapping[str, str]
) -> dict[str, Any]:
    """What a native checkpoint of a decoder says beside its tensors."""
    record = {"config": config.as_json(), "note": note, "provenance": dict(provenance or {})}
    return record | ({"activations": dict(activations)} if activations else {})


def model_bytes(model: Decoder) -> int:
    """Bytes of all weights as they are held in memory, packed ones packed, shared ones once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))


def packed_bits(model: Decoder) -> float:
    """Bits a weight of all packed tensors together, their padding included; NaN where none is packed."""
    packed = [tensor for tensor in tensors_of(model).values() if isinstance(tensor, QTensor)]
    weights = sum(q.size for q in packed)
    return 8 * sum(q.nbytes for q in packed) / weights if weights else float("nan")


def tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The tokenizer as files of a checkpoint folder."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_to_json(tokenizer, folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
