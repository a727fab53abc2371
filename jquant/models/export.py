"""A decoder to a Hugging Face folder that other tools load: names, layouts and configs of theirs.

    hf                   float weights, packed ones decoded
    compressed-tensors   llm-compressor's, for vLLM and transformers
    gptq, gptq_v2        GPTQModel's
    awq                  AutoAWQ's, in the GEMM layout
    bitsandbytes         NF4, with float32 scales or nested ones
    gguf                 llama.cpp's, one file (gguf_export.py)

A part of the model is written at a time. The folder also gets config.json, tokenizer, generation config, chat template,
a model card, and `jquant_export.json`, which says of every packed tensor what its scheme was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jquant import __version__
from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor, dequantize
from jquant.core.qtensor_rows import join_rows
from jquant.core.scheme import Scheme
from jquant.core.scheme import scheme as parse_scheme
from jquant.io import awq, bitsandbytes, compressed_tensors, gptq
from jquant.io.json_file import as_text
from jquant.io.new_folder import appearing_folder, check_new_folder
from jquant.io.packed_layer import PackedLayer
from jquant.io.safetensors_shards import ShardWriter
from jquant.io.tokenizer import Tokenizer
from jquant.models.checkpoint import EXPORT_RECORD, Checkpoint, open_checkpoint
from jquant.models.config import ModelConfig
from jquant.models.gguf_export import export_gguf
from jquant.models.hf_config import config_to_hf
from jquant.models.model_card import model_card
from jquant.models.save import tokenizer_files
from jquant.models.stream import StreamedModel
from jquant.models.tensor_names import Placement, as_stored, hf_placements
from jquant.nn.install import STATIC, activations_of, tensors_of

FORMATS = ("hf", "compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "gguf")
MAX_SHARD = 5 * 10**9  # bytes of a file, as transformers cuts them

Value = jax.Array | np.ndarray | QTensor


@dataclass
class _Written:
    """What the config must say of the layers."""

    layers: dict[str, tuple[Scheme, Scheme | None]] = field(default_factory=dict)  # by name in the checkpoint
    kept: list[str] = field(default_factory=list)  # linear layers in floats
    act_order: bool = False


def export(
    model: str | Path | Checkpoint,
    path: str | Path,
    *,
    format: str,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD,
    evaluation: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Writes a checkpoint, packed or float, in a format of other tools; the folder appears whole or not at all.

    Args:
        model: a checkpoint, opened or named as `open_checkpoint` takes it; it is read and written a part at a time.
        path: a folder that does not exist yet, or is empty; of a `gguf`, a file that does not exist.
        format: one of `FORMATS`.
        dtype: of the float weights; by default as they are held.
        max_shard_bytes: of a weight file; more take an index.
        evaluation: measures it for the model card and the record, a row each, in words; called once all layers have
            been found to fit the format.

    Raises:
        InputError: the format cannot hold a layer (the nearest scheme that it can is named), or the model; the folder
            exists, or cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r}: there are {', '.join(FORMATS)}")
    checkpoint = (model if isinstance(model, Checkpoint) else open_checkpoint(model)).packed()
    if format == "gguf":
        export_gguf(checkpoint, path, dtype="float32" if dtype is None else str(np.dtype(dtype)))
        return
    path, config = Path(path), checkpoint.config
    check_new_folder(path)
    kind = "float32" if dtype is None else str(np.dtype(dtype))
    description = config_to_hf(config, dtype=kind)  # what it has no field for shows before anything is written
    placements, written = hf_placements(config.architecture), _Written()
    if config.tie_embeddings:  # clients have a layer there all the same
        written.kept.append(placements["head.lm_head.weight"].tensor.removesuffix(".weight"))
    streamed = StreamedModel(checkpoint)
    try:
        with appearing_folder(path) as folder:
            room = 8 * len(tensors_of(streamed.abstract)) * max(config.num_experts, 1)
            schemes: dict[str, str] = {}
            with ShardWriter(folder, max_bytes=max_shard_bytes, tensors=room) as writer:
                for prefix, tensors, activations in _parts(streamed):
                    writer.add(_named(prefix, tensors, activations, placements, config, format, dtype, written))
                    schemes |= {prefix + name: str(q.scheme) for name, q in tensors.items() if isinstance(q, QTensor)}
            quantization = _quantization(format, written)
            if quantization is not None:
                description["quantization_config"] = quantization
            if quantization is not None and format.startswith("gptq"):
                (folder / "quantize_config.json").write_text(as_text(quantization), encoding="utf-8")
            if evaluation is not None:
                provenance = {**checkpoint.provenance, "evaluation": dict(evaluation())}
                checkpoint = dataclasses.replace(checkpoint, provenance=provenance)
            tokenizer = checkpoint.tokenizer()
            _add_special_tokens(description, tokenizer)
            record = {"jquant": __version__, "format": format, "schemes": schemes, "provenance": checkpoint.provenance}
            texts = {
                "config.json": as_text(description),
                EXPORT_RECORD: as_text(record),
                "README.md": model_card(checkpoint, format, schemes),
            }
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            for name, content in tokenizer_files(tokenizer).items():
                (folder / name).write_bytes(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _parts(streamed: StreamedModel) -> Iterator[tuple[str, dict[str, Value], dict[str, str]]]:
    """Prefix, tensors and activations: embedding and head, then one block after another; nothing is kept."""
    outer = streamed.outer()
    yield "", tensors_of(outer), activations_of(outer)
    del outer
    for index in range(streamed.depth):
        block = streamed.block(index)
        yield f"blocks.{index}.", tensors_of(block), activations_of(block)


def _named(
    prefix: str,
    tensors: Mapping[str, Value],
    activations: Mapping[str, str],
    placements: Mapping[str, Placement],
    config: ModelConfig,
    format: str,
    dtype: DTypeLike | None,
    written: _Written,
) -> dict[str, np.ndarray]:
    """A part's tensors by the names and in the layout of the format."""
    found: dict[str, np.ndarray] = {}
    number = prefix.split(".")[1] if prefix else ""
    done: set[str] = set()
    for name in tensors:
        if name in done or name.rpartition(".")[2] in STATIC:
            continue
        template = f"blocks.{{}}.{name}" if number else name
        placement = placements.get(template)
        if placement is None:
            raise InputError(f"{prefix}{name} has no place in a {config.architecture} checkpoint")
        names = [ours.removeprefix("blocks.{}.") for ours in placement.ours]
        done |= set(names)
        values = [tensors[each] for each in names]
        path = placement.tensor
        for index, expert in _experts(values, path):
            theirs = path.format(*([number] if number else []), *([] if index is None else [index]))
            owners = [each.rpartition(".")[0] for each in names]
            layer = _layer(owners, expert, activations, tensors, f"{prefix}{name}")
            found |= _tensors(theirs, layer, expert, placement, config, format, dtype, written, f"{prefix}{name}")
    return found


def _experts(values: list[Value], template: str) -> Iterator[tuple[int | None, list[Value]]]:
    """The values as they are; or those of one expert after another, where the checkpoint keeps them apart."""
    if template.count("{}") < 2:
        yield None, values
        return
    for index in range(values[0].shape[0]):
        yield index, [jax.tree.map(lambda array, index=index: array[index], value) for value in values]


def _layer(
    owners: list[str],
    values: list[Value],
    activations: Mapping[str, str],
    tensors: Mapping[str, Value],
    what: str,
) -> PackedLayer | None:
    """The layer that the values make, joined where they are several; None where they are floats."""
    packed = [value for value in values if isinstance(value, QTensor)]
    if not packed:
        return None
    inputs = [_inputs_of(owner, activations, tensors) for owner in owners]
    if len(packed) < len(values) or any(other != inputs[0] for other in inputs[1:]):
        raise InputError(
            f"{what}: the checkpoint keeps {', '.join(owners)} joined in one layer, and they, or their inputs, are "
            "quantized in different ways: let one rule match them all"
        )
    spec, scale, zero_point = inputs[0]
    return PackedLayer(
        weight=join_rows(packed, what),
        activation=None if spec is None else parse_scheme(spec),
        input_scale=scale,
        input_zero_point=zero_point,
    )


def _inputs_of(
    owner: str, activations: Mapping[str, str], tensors: Mapping[str, Value]
) -> tuple[str | None, float | None, float | None]:
    """The scheme of a layer's inputs, and the scale and zero point where they are fixed."""
    static = [tensors.get(f"{owner}.{key}", tensors.get(f"{owner}.inputs.{key}")) for key in STATIC]
    scale, zero_point = (None if each is None else float(np.asarray(each).reshape(())) for each in static)
    return activations.get(owner), scale, zero_point


def _tensors(
    theirs: str,
    layer: PackedLayer | None,
    values: list[Value],
    placement: Placement,
    config: ModelConfig,
    format: str,
    dtype: DTypeLike | None,
    written: _Written,
    what: str,
) -> dict[str, np.ndarray]:
    module = theirs.removesuffix(".weight")
    is_layer = theirs.endswith(".weight") and values[0].ndim == 2 and not what.startswith("embed.")
    if layer is None or format == "hf":
        if layer is None and is_layer:
            written.kept.append(module)
        floats = [np.asarray(_decoded(value) if isinstance(value, QTensor) else value) for value in values]
        joined = floats[0] if len(floats) == 1 else np.concatenate(floats)
        array = np.asarray(placement.inverse(joined, config))
        return {theirs: array if dtype is None else array.astype(np.dtype(dtype))}
    if not is_layer:
        raise InputError(f"{what} is packed, and {format} packs linear layers only: leave it in floats, or export gguf")
    if placement.inverse is not as_stored:
        raise InputError(
            f"{what}: a {config.architecture} checkpoint keeps it turned, in {theirs}, and no {format} layer is made "
            "of that: export hf"
        )
    written.layers[module] = (layer.weight.scheme, layer.activation)
    written.act_order |= layer.weight.groups is not None
    return {f"{module}.{name}": array for name, array in _PACKERS[format](layer, what).items()}


def _gptq(version: gptq.Version) -> Callable[[PackedLayer, str], dict[str, np.ndarray]]:
    def pack(layer: PackedLayer, what: str) -> dict[str, np.ndarray]:
        _check(gptq.check, layer, what)
        return gptq.layer_tensors(layer.weight, version=version, what=what)

    return pack


def _awq(layer: PackedLayer, what: str) -> dict[str, np.ndarray]:
    _check(awq.check, layer, what)
    return awq.layer_tensors(layer.weight, what=what)


def _bitsandbytes(layer: PackedLayer, what: str) -> dict[str, np.ndarray]:
    _check(bitsandbytes.check, layer, what)
    return bitsandbytes.layer_tensors(layer.weight, what=what)


def _compressed_tensors(layer: PackedLayer, what: str) -> dict[str, np.ndarray]:
    _check(compressed_tensors.format_of, layer, what)
    return compressed_tensors.layer_tensors(layer, what=what)


def _check(holds: Callable[[Scheme, Scheme | None], object], layer: PackedLayer, what: str) -> None:
    try:
        holds(layer.weight.scheme, layer.activation)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


_PACKERS: dict[str, Callable[[PackedLayer, str], dict[str, np.ndarray]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq("gptq"),
    "gptq_v2": _gptq("gptq_v2"),
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}


def _quantization(format: str, written: _Written) -> dict[str, Any] | None:
    """quantization_config of config.json. Raises InputError where the format has none for these layers."""
    if format == "hf":
        return None
    if not written.layers:
        raise InputError(f"no layer is packed, so {format} has nothing to hold: quantize the model first, or export hf")
    if format == "compressed-tensors":
        return compressed_tensors.quantization_config(written.layers, written.kept)
    schemes = {name: weight for name, (weight, _) in written.layers.items()}
    if format in ("awq", "bitsandbytes"):
        settings = awq if format == "awq" else bitsandbytes
        return settings.quantization_config(schemes, kept=written.kept)
    version: gptq.Version = "gptq" if format == "gptq" else "gptq_v2"
    return gptq.quantization_config(schemes, version=version, act_order=written.act_order)


@jax.jit
def _decoded(q: QTensor) -> jax.Array:
    return dequantize(q, jnp.float32)


def _add_special_tokens(description: dict[str, Any], tokenizer: Tokenizer) -> None:
    if tokenizer.bos_id is not None:
        description["bos_token_id"] = tokenizer.bos_id
    if tokenizer.eos_ids:
        description["eos_token_id"] = tokenizer.eos_ids[0] if len(tokenizer.eos_ids) == 1 else list(tokenizer.eos_ids)
