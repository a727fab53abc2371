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
from jquant.models.decoder import Decoder


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
    description = {"config": model.config.as_json(), "note": note, "provenance": dict(provenance or {})}
    write_native(path, named_tensors(model), description, extra_files=_tokenizer_files(tokenizer))


def named_tensors(model: Decoder) -> dict[str, jax.Array | QTensor]:
    """Every weight by parameter path; shared ones once."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def model_bytes(model: Decoder) -> int:
    """Bytes of all weights as they are held in memory, packed ones packed, shared ones once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))


def packed_bits(model: Decoder) -> float:
    """Bits a weight of all packed tensors together, their padding included; NaN where none is packed."""
    packed = [tensor for tensor in named_tensors(model).values() if isinstance(tensor, QTensor)]
    weights = sum(q.size for q in packed)
    return 8 * sum(q.nbytes for q in packed) / weights if weights else float("nan")


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_to_json(tokenizer, folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
