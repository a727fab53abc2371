"""From a file's tensor names to readers by the decoder's paths, and what all kinds of files share: configs, hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.qtensor_rows import take_rows
from jquant.io.mapped import shown
from jquant.io.tokenizer import one_line
from jquant.models.config import ModelConfig
from jquant.models.tensor_names import Table, Transform, row_order

Reader = Callable[[], "np.ndarray | QTensor"]

# Buffers that old exporters saved beside the weights; the decoder computes them.
DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope_freqs\.weight"
    r"|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"  # GPT-2's causal mask
)
NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")  # in tensor names; written so, no two names mean one place

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "num_experts")


def read_config(read: Callable[[], ModelConfig], depth: object, tensors: Collection[str], source: Path) -> ModelConfig:
    """`read()` of a stranger's config, whose fields may be of any kind and whose number of blocks any number.

    `depth` is that number as the file has it; a block has at least one tensor.
    """
    if type(depth) is int and depth > len(tensors):
        raise InputError(
            f"{source}: its config asks for {depth} blocks and there are tensors for {len(tensors)} at most: "
            "the checkpoint is incomplete"
        )
    try:
        config = read()
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{source}: the model config is damaged: {one_line(error)}") from error
    for name in _SIZES:
        if getattr(config, name) >= 1 << 31:  # beyond any model; shapes and floats of larger ones overflow
            raise InputError(f"{source}: the model config is damaged: {name} is 2³¹ or more")
    return config


def sha256_of(files: tuple[Path, ...]) -> str:
    """Of the files' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def readers_of(
    tensors: Iterable[str],
    table: Table,
    read: Callable[[str], np.ndarray | QTensor],
    config: ModelConfig,
    path: Path,
) -> dict[str, Reader]:
    """By parameter path; matrices of experts that lie apart are stacked."""
    readers: dict[str, Reader] = {}
    stacks: dict[str, dict[int, Reader]] = {}
    for tensor in tensors:
        numbers = NUMBER.findall(tensor)
        template = NUMBER.sub("{}", tensor)
        if template not in table:
            raise InputError(f"{path}: tensor {shown(tensor)} has no place in a {config.architecture} decoder")
        for template_of_ours, transform in table[template]:
            ours = template_of_ours.format(*numbers[:1])
            reader = partial(_transformed, read, tensor, transform, config, f"{path}: tensor for {ours}")
            if len(numbers) == 2:
                stacks.setdefault(ours, {})[int(numbers[1])] = reader
            elif ours in readers:  # some families' tensors go by either of two names
                raise InputError(f"{path}: tensor {shown(tensor)} is not the only one for {ours}")
            else:
                readers[ours] = reader
    for ours, experts in stacks.items():
        if len(experts) != config.num_experts or max(experts) >= config.num_experts:
            raise InputError(
                f"{path}: tensors for {ours} of {len(experts)} experts, its config asks for {config.num_experts}"
            )
        readers[ours] = partial(_stacked, [experts[index] for index in range(config.num_experts)], ours, path)
    return readers


def layers_of(weight: str, table: Table) -> list[str]:
    """The decoder's layers whose weight a tensor is, or is a part of; none where it has no place."""
    number = NUMBER.findall(weight)[:1]
    return [template.format(*number).removesuffix(".weight") for template, _ in table.get(NUMBER.sub("{}", weight), ())]


def _transformed(
    read: Callable[[str], np.ndarray | QTensor], tensor: str, transform: Transform, config: ModelConfig, what: str
) -> np.ndarray | QTensor:
    array = read(tensor)
    if isinstance(array, QTensor):
        order = row_order(transform, config, array.shape[-2])
        if order is None:
            raise InputError(f"{what} is packed, and {shown(tensor)} has inputs where outputs belong: convert it again")
        return take_rows(array, order, what)
    if not jnp.issubdtype(array.dtype, jnp.floating):  # a transform may make floats of it
        raise InputError(f"{what} has dtype {array.dtype}, weights must be floats")
    if not array.ndim:
        raise InputError(f"{what} is a single number, weights are vectors and matrices")
    return transform(array, config)


def _stacked(readers: list[Reader], ours: str, path: Path) -> np.ndarray | QTensor:
    found = [reader() for reader in readers]
    if any(isinstance(each, QTensor) for each in found):
        kinds = {each.scheme if isinstance(each, QTensor) else None for each in found}
        if len(kinds) > 1 or len({each.shape for each in found}) > 1:
            raise InputError(f"{path}: tensors for {ours} of single experts are of different schemes or shapes")
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *found)
    matrices = [np.asarray(each) for each in found]
    shapes = list(dict.fromkeys(matrix.shape for matrix in matrices))
    if len(shapes) > 1:
        raise InputError(f"{path}: tensors for {ours} of one expert have shape {shapes[0]}, of another {shapes[1]}")
    if len({matrix.dtype for matrix in matrices}) > 1:  # numpy knows no common dtype of bfloat16 and float16
        matrices = [matrix.astype(np.float32) for matrix in matrices]
    return np.stack(matrices)
