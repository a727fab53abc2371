"""Packed layers of strangers: whatever is wrong with tensors or settings is an InputError that names the layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.qtensor import quantize
from jquant.core.scheme import scheme
from jquant.io import awq, bitsandbytes, compressed_tensors, gptq
from jquant.io.packed_layer import PackedLayer

W = jnp.asarray(np.random.default_rng(0).standard_normal((32, 64)), jnp.float32)
DTYPE = np.dtype(np.float32)
Case = tuple[dict[str, np.ndarray], dict[str, Any], Callable[[dict[str, np.ndarray], dict[str, Any]], PackedLayer]]


def _compressed(spec: str) -> Case:
    q = quantize(W, scheme(spec))
    arrays = compressed_tensors.layer_tensors(PackedLayer(weight=q), what="x")
    config = compressed_tensors.quantization_config({"x": (q.scheme, None)}, [])

    def read(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> PackedLayer:
        group = compressed_tensors.group_of(compressed_tensors.read_config(config, "layer x"), "x")
        if group is None:
            raise InputError("layer x is in no group")
        return compressed_tensors.read_layer(arrays, group, dtype=DTYPE, what="layer x")

    return arrays, config, read


def _gptq() -> Case:
    q = quantize(W, scheme("int4:g32:asym:fp16"))
    arrays = gptq.layer_tensors(q, version="gptq_v2", what="x")
    config = gptq.quantization_config({"x": q.scheme}, version="gptq_v2", act_order=False)
    return (
        arrays,
        config,
        lambda a, c: gptq.read_layer(a, gptq.read_config(c, "layer x"), dtype=DTYPE, what="layer x"),
    )


def _awq() -> Case:
    q = quantize(W, scheme("int4:g32:asym:fp16"))
    config = awq.quantization_config({"x": q.scheme}, kept=[])

    def read(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> PackedLayer:
        settings = awq.read_config(config, "layer x")
        return awq.read_layer(arrays, settings, symmetric=False, dtype=DTYPE, what="layer x")

    return awq.layer_tensors(q, what="x"), config, read


def _nf4(spec: str) -> Case:
    q = quantize(W, scheme(spec))
    config = bitsandbytes.quantization_config({"x": q.scheme}, kept=[])

    def read(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> PackedLayer:
        bitsandbytes.check_config(config, "layer x")
        return bitsandbytes.read_layer(arrays, dtype=DTYPE, what="layer x")

    return bitsandbytes.layer_tensors(q, what="x"), config, read


CASES: dict[str, Callable[[], Case]] = {
    **{
        spec: (lambda spec=spec: _compressed(spec))
        for spec in ("int4:g32", "int3:g32:asym", "fp8_e4m3:channel", "nvfp4", "mxfp4", "mxfp8_e4m3")
    },
    "gptq": _gptq,
    "awq": _awq,
    "nf4": lambda: _nf4("nf4:g32"),
    "nf4 nested": lambda: _nf4("nf4:g32:dq"),
}
_ODD = (None, -1, 0, 3, 2**40, 1.5, "x", [], {}, True, [None], float("nan"))


@pytest.mark.parametrize("name", CASES)
def test_sound_layers_are_read(name: str) -> None:
    arrays, config, read = CASES[name]()
    assert read(arrays, config).weight.shape == W.shape


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_scales_of_bfloat16(name: str) -> None:
    """As GPTQModel writes them."""
    arrays, config, read = CASES[name]()
    half = {"scales": arrays["scales"].astype(jnp.bfloat16)}
    q, rounded = read(arrays, config).weight, read({**arrays, **half}, config).weight
    assert str(rounded.scheme) == "int4:g32:asym:bf16"
    assert np.array_equal(rounded.codes(), q.codes())
    assert np.array_equal(rounded.scales(), q.scales().astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("name", CASES)
def test_damage_is_named(name: str) -> None:
    rng = np.random.default_rng(sum(map(ord, name)))
    arrays, config, read = CASES[name]()
    refused = []
    for _ in range(300):
        damaged, settings = dict(arrays), copy.deepcopy(config)
        if rng.random() < 0.5:
            _damage_setting(settings, rng)
        else:
            _damage_array(damaged, rng)
        try:
            read(damaged, settings)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert [message for message in refused if "layer x" not in message] == []


def _damage_array(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    name = sorted(arrays)[rng.integers(len(arrays))]
    array = arrays[name]
    match rng.integers(6):
        case 0:
            del arrays[name]
        case 1:
            arrays[name] = array[: len(array) // 2]
        case 2:
            arrays[name] = array.astype(np.float64) if array.dtype.itemsize > 1 else array.astype(np.int16)
        case 3:
            arrays[name] = array.reshape(-1)
        case 4:
            arrays[name] = array[None]
        case _:
            raw = bytearray(np.ascontiguousarray(array).tobytes())
            raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
            arrays[name] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)


def _damage_setting(settings: dict[str, Any], rng: np.random.Generator) -> None:
    """A value somewhere in the config is gone or odd."""
    places: list[tuple[dict[str, Any], str]] = []
    waiting: list[dict[str, Any]] = [settings]
    while waiting:
        node = waiting.pop()
        places += [(node, key) for key in node]
        waiting += [value for value in node.values() if isinstance(value, dict)]
    node, key = places[rng.integers(len(places))]
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = _ODD[rng.integers(len(_ODD))]
