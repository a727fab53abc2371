"""Packed layers of Hugging Face folders that other tools wrote: which tensors make one, and as what they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import Scheme
from jquant.io import awq, bitsandbytes, compressed_tensors, gptq
from jquant.io.hf_directory import HFDirectory
from jquant.io.mapped import shown
from jquant.io.packed_layer import PackedLayer

READ = ("gptq", "awq", "compressed-tensors", "bitsandbytes")  # quant_method of config.json


@dataclass(frozen=True, kw_only=True)
class PackedLayers:
    """Layers by their name in the checkpoint, and the tensors that belong to them."""

    readers: Mapping[str, Callable[[], PackedLayer]]
    activations: Mapping[str, Scheme]  # of the inputs of layers that quantize them
    tensors: frozenset[str]

    def weight(self, name: str) -> QTensor:
        """The weight of a layer."""
        return self.readers[name]().weight


def packed_layers(folder: HFDirectory) -> PackedLayers:
    """What quantization_config makes of the folder's tensors; nothing is read yet.

    Raises:
        InputError: the method is not read, a setting is not understood, or a tensor belongs to no layer.
    """
    config, source = folder.config["quantization_config"], f"{folder.path / 'config.json'}: quantization_config"
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or method not in READ:
        raise InputError(f"{source}: quant_method {shown(str(method))} is not read; there are {', '.join(READ)}")
    if method == "compressed-tensors":
        return _compressed_tensors(folder, compressed_tensors.read_config(config, source))
    if method == "bitsandbytes":
        bitsandbytes.check_config(config, source)
        by_layer = _grouped(folder, bitsandbytes.TENSORS, mark="weight.absmax")
        read = partial(bitsandbytes.read_layer, dtype=np.dtype(np.float32))
        return _layers(folder, by_layer, dict.fromkeys(by_layer, read))
    by_layer = _grouped(folder, gptq.TENSORS if method == "gptq" else awq.TENSORS, mark="qweight")
    if method == "gptq":
        read = partial(gptq.read_layer, config=gptq.read_config(config, source), dtype=np.dtype(np.float32))
    else:
        settings = awq.read_config(config, source)
        symmetric = all(awq.all_zeros_are_8(folder.read(f"{name}.qzeros")) for name in by_layer)
        read = partial(awq.read_layer, config=settings, symmetric=symmetric, dtype=np.dtype(np.float32))
    return _layers(folder, by_layer, dict.fromkeys(by_layer, read))


def _compressed_tensors(folder: HFDirectory, config: Mapping[str, Any]) -> PackedLayers:
    by_layer = _grouped(folder, compressed_tensors.TENSORS, mark="weight_scale")
    read, activations = {}, {}
    for name in by_layer:
        group = compressed_tensors.group_of(config, name)
        if group is None:
            raise InputError(f"{folder.path}: layer {shown(name)} has scales, and no group of its config is of it")
        read[name] = partial(compressed_tensors.read_layer, group=group, dtype=np.dtype(np.float32))
        activation = compressed_tensors.activation_of(group, f"{folder.path}: layer {name}")
        if activation is not None:
            activations[name] = activation
    return _layers(folder, by_layer, read, activations)


def _grouped(folder: HFDirectory, names: tuple[str, ...], *, mark: str) -> dict[str, list[str]]:
    """Names of each layer's tensors, by the layer; a layer is what has a tensor of the name `mark`."""
    layers = [name.removesuffix(f".{mark}") for name in folder.tensors if name.endswith(f".{mark}")]
    if not layers:
        raise InputError(f"{folder.path}: its config says that it is quantized, and no tensor is called {mark}")
    return {layer: [name for name in names if f"{layer}.{name}" in folder.tensors] for layer in layers}


def _layers(
    folder: HFDirectory,
    by_layer: Mapping[str, list[str]],
    read: Mapping[str, Callable[..., PackedLayer]],
    activations: Mapping[str, Scheme] | None = None,
) -> PackedLayers:
    def of(layer: str) -> PackedLayer:
        arrays = {name: folder.read(f"{layer}.{name}") for name in by_layer[layer]}
        return read[layer](arrays, what=f"{folder.path}: layer {layer}")

    return PackedLayers(
        readers={layer: partial(of, layer) for layer in by_layer},
        activations=activations or {},
        tensors=frozenset(f"{layer}.{name}" for layer, names in by_layer.items() for name in names),
    )
