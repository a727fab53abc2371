"""A GGUF file as a checkpoint: decoded to floats, or in the blocks of the file."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jquant.core.errors import InputError
from jquant.core.formats import GGML_BLOCKS, GGMLBlock
from jquant.core.qtensor import QTensor, in_blocks
from jquant.io.gguf import GGUFFile, open_gguf
from jquant.io.tokenizer_gguf import tokenizer_from_gguf
from jquant.models.checkpoint import Checkpoint
from jquant.models.checkpoint_readers import DERIVED, layers_of, read_config, readers_of, sha256_of
from jquant.models.config import ModelConfig
from jquant.models.families import config_from_gguf
from jquant.models.tensor_names import gguf_tensors

_BLOCKS = {block.name.removeprefix("ggml_").upper(): block for block in GGML_BLOCKS.values()}  # by ggml's name

# What can stay packed; a file may have other tensors in blocks too, as a table of positions.
_PACKABLE = re.compile(r"(_proj|^embed|lm_head)\.weight$")


def open_gguf_checkpoint(name: str, path: Path) -> Checkpoint:
    """The file at `path`; `name` is what the caller wrote."""
    file = open_gguf(path)
    depth = file.metadata.get(f"{file.metadata.get('general.architecture')}.block_count")
    config = read_config(partial(config_from_gguf, file.metadata, file.tensors, str(path)), depth, file.tensors, path)
    config = _with_rope_divisors(config, file)
    names = [tensor for tensor in file.tensors if not DERIVED.fullmatch(tensor)]
    table = gguf_tensors(file.metadata["general.architecture"])
    decoded = Checkpoint(
        name=name,
        path=path,
        config=config,
        note=_gguf_note(file, "decoded to floats: all losses here are measured against these decoded weights, not"),
        readers=readers_of(names, table, file.read, config, path),
        weights_sha256=partial(sha256_of, (path,)),
        tokenizer_reader=lambda: tokenizer_from_gguf(file.metadata, source=str(path)),
    )
    packed = readers_of(names, table, partial(_blocks_or_floats, file), config, path)
    kept = {ours: reader for ours, reader in packed.items() if _PACKABLE.search(ours)}
    note = _gguf_note(file, "read as they are: losses here are theirs, with no comparison")
    quantized = frozenset(
        layer for name in names if _block_of(file, name) is not None for layer in layers_of(name, table)
    )
    form = dataclasses.replace(decoded, note=note, readers=decoded.readers | kept, quantized=quantized)
    return dataclasses.replace(decoded, packed_form=form)


def _blocks_or_floats(file: GGUFFile, name: str) -> np.ndarray | QTensor:
    """The tensor in the blocks of its file; decoded where it is a vector or no quantized type."""
    block = _block_of(file, name)
    if block is None:
        return file.read(name)
    return in_blocks(jnp.asarray(file.read_blocks(name)), block, columns=file.tensors[name].shape[-1])


def _block_of(file: GGUFFile, name: str) -> GGMLBlock | None:
    info = file.tensors[name]
    return _BLOCKS.get(info.type) if len(info.shape) > 1 else None


def _with_rope_divisors(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    if "rope_freqs.weight" not in file.tensors:
        return config
    divisors = file.read("rope_freqs.weight")
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise InputError(f"{file.path}: tensor rope_freqs.weight holds a value that is not positive and finite")
    try:
        return dataclasses.replace(config, rope_divisors=tuple(float(value) for value in divisors.ravel()))
    except InputError as error:
        raise InputError(f"{file.path}: tensor rope_freqs.weight: {error}") from error


def _gguf_note(file: GGUFFile, use: str) -> str:
    """Says so where the weights were quantized before they came here, and what that means in their `use`."""
    sizes = Counter[str]()
    for info in file.tensors.values():
        sizes[info.type] += info.size
    largest = sizes.most_common(1)[0][0] if sizes else "F32"
    if largest in ("F32", "F16", "BF16"):
        return f"weights stored as {largest}"
    bits = 8 * sum(info.nbytes for info in file.tensors.values()) / max(sum(sizes.values()), 1)
    return (
        f"the weights come from a GGUF already quantized to {largest} ({bits:.2f} bits a weight overall) and {use} "
        "against the original model"
    )
