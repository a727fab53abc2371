"""Memory and least time are those of the formulas, worked out here by hand for round numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.hardware.devices import DEVICES, Device, Figure, Source
from jquant.hardware.model_shape import ModelShape
from jquant.hardware.roofline import (
    Load,
    Numerics,
    decode,
    memory,
    multiplied_in,
    native_name,
    prefill,
    usable_bytes,
)

SOURCE = Source(title="a test", date="2026")
SHAPE = ModelShape(
    name="round",
    source="a test",
    vocab_size=1000,
    hidden_size=100,
    intermediate_size=300,
    num_layers=10,
    num_heads=10,
    num_kv_heads=5,
    head_dim=10,
    other_parameters=50,
)
# of one block: q, o 2 · 100·100, k, v 2 · 100·50, MLP 3 · 100·300
BLOCKS = 10 * (20_000 + 10_000 + 90_000)


def device(**changes: Any) -> Device:
    """One that reads 1 GB/s and does 1e12 operations a second in floats, 4e12 in int8."""
    values: dict[str, Any] = {
        "name": "round",
        "family": "none",
        "kind": "gpu",
        "memory_gb": Figure(value=10, source=SOURCE),
        "bandwidth_gb_s": Figure(value=1, source=SOURCE),
        "rates": {name: Figure(value=rate, source=SOURCE) for name, rate in (("fp32", 0.5), ("bf16", 1), ("int8", 4))},
        "link_gb_s": Figure(value=0.5, source=SOURCE),
    }
    return Device(**{**values, **changes})


def test_parameters_are_counted() -> None:
    assert SHAPE.block_weights == SHAPE.active_weights == BLOCKS
    assert SHAPE.parameters == BLOCKS + 2 * 100_000 + 50
    assert dataclasses.replace(SHAPE, tie_embeddings=True).parameters == BLOCKS + 100_000 + 50
    assert dataclasses.replace(SHAPE, gated=False).block_weights == BLOCKS - 10 * 30_000
    experts = dataclasses.replace(SHAPE, num_experts=8, experts_per_token=2)
    assert experts.block_weights == 10 * (30_000 + 8 * 90_000)
    assert experts.active_weights == 10 * (30_000 + 2 * 90_000)
    assert experts.touched_weights(1) == pytest.approx(experts.active_weights)
    assert experts.touched_weights(2) == pytest.approx(10 * (30_000 + 8 * (1 - 0.75**2) * 90_000))
    assert experts.touched_weights(1e4) == pytest.approx(experts.block_weights)


@pytest.mark.parametrize(
    ("spec", "bits"), [(None, 16.0), ("int4:g128:fp16", 4.125), ("int8:channel", 8.0), ("nvfp4", 4.5), ("q4_k", 4.5)]
)
def test_weights_take_the_true_bits_of_the_scheme_and_all_else_floats(spec: str | None, bits: float) -> None:
    numerics = Numerics(weights=None if spec is None else scheme(spec))
    found = memory(SHAPE, numerics, Load())
    assert found.weights == pytest.approx(BLOCKS * bits / 8 + 200_050 * 2)
    assert memory(SHAPE, numerics, Load(), devices=4).weights == pytest.approx(found.weights / 4)


def test_the_cache_has_a_scheme_of_its_own() -> None:
    load = Load(batch=3, prompt=60, output=40)
    floats = 2 * 5 * 10 * 10 * 100 * 3  # keys and values · heads · dim · blocks · positions · sequences
    assert memory(SHAPE, Numerics(), load).cache == 2 * floats
    assert memory(SHAPE, Numerics(cache=scheme("int8:token")), load).cache == floats * (8 + 32 / 10) / 8
    assert memory(SHAPE, Numerics(cache=scheme("fp8_e4m3:tensor:fp16")), load).cache == floats * (8 + 16 / 10) / 8
    assert memory(SHAPE, Numerics(cache=scheme("int4:g10:fp16")), load).cache == floats * (4 + 16 / 10) / 8
    # Five heads are cut five ways at most.
    assert memory(SHAPE, Numerics(), load, devices=5).cache == memory(SHAPE, Numerics(), load, devices=10).cache
    windowed = dataclasses.replace(SHAPE, windows=(30,) * 4)
    assert memory(windowed, Numerics(), load).cache == 2 * floats * (6 * 100 + 4 * 30) / 1000


def test_activations_grow_with_tokens_at_once() -> None:
    found = memory(SHAPE, Numerics(), Load(prompt=50, output=1)).activations
    assert found == 50 * (400 + 200 + 900) * 2 + 1000 * 4
    assert memory(SHAPE, Numerics(), Load(prompt=50, output=1, chunk=10)).activations == 10 * 1500 * 2 + 4000
    assert memory(SHAPE, Numerics(), Load(batch=2, prompt=50, output=1)).activations == 2 * found


def test_decoding_alone_reads_the_weights_and_the_cache() -> None:
    step = decode(SHAPE, Numerics(), Load(prompt=100, output=10), device(), context=200)
    assert step.matrices == pytest.approx((BLOCKS + 50) * 2 / 1e9)
    assert step.attention == pytest.approx(2 * 5 * 10 * 10 * 200 * 2 / 1e9)
    assert step.head == pytest.approx(100_000 * 2 / 1e9)
    assert (step.links, step.bound) == (0, "bandwidth")
    packed = decode(SHAPE, Numerics(weights=scheme("int4:g100:fp16")), Load(), device())
    assert packed.matrices == pytest.approx((BLOCKS * 4.16 / 8 + 100) / 1e9)


def test_prefill_of_a_long_prompt_multiplies() -> None:
    load = Load(prompt=10_000, output=1)
    first = prefill(SHAPE, Numerics(), load, device())
    assert first.matrices == pytest.approx(2 * BLOCKS * 10_000 / 1e12)
    assert first.attention == pytest.approx(4 * 10 * 10 * 10 * (10_000 * 10_001 / 2) / 1e12)
    assert first.head == pytest.approx(100_000 * 2 / 1e9)  # one row: reading is longer
    assert first.bound == "rate"
    w8a8 = Numerics(weights=scheme("int8:channel"), inputs=scheme("int8:token"))
    assert prefill(SHAPE, w8a8, load, device()).matrices == pytest.approx(first.matrices / 4)
    weights_only = Numerics(weights=scheme("int8:channel"))
    assert prefill(SHAPE, weights_only, load, device()).matrices == pytest.approx(first.matrices)
    wide = Numerics(float_bits=32)
    assert prefill(SHAPE, wide, load, device()).matrices == pytest.approx(2 * first.matrices)


def test_pieces_of_a_prompt_read_the_weights_each() -> None:
    slow = device(bandwidth_gb_s=Figure(value=1e-3, source=SOURCE))
    whole, pieces = (prefill(SHAPE, Numerics(), Load(prompt=100, output=1, chunk=chunk), slow) for chunk in (None, 25))
    assert pieces.matrices == pytest.approx(4 * whole.matrices, rel=1e-3)
    assert pieces.attention == pytest.approx(2.5 * whole.attention)  # the cache at 25, 50, 75 and 100


def test_windows_bound_what_a_prompt_sees() -> None:
    windowed = dataclasses.replace(SHAPE, windows=(100,) * 10)
    found = prefill(windowed, Numerics(), Load(prompt=1000, output=1), device())
    seen = sum(min(position, 100) for position in range(1, 1001))
    assert found.attention == pytest.approx(4 * 100 * 10 * seen / 1e12)


def test_several_devices_share_the_work_and_send_activations() -> None:
    load = Load(prompt=10_000, output=1)
    one, four = (prefill(SHAPE, Numerics(), load, device(), devices=n) for n in (1, 4))
    assert four.matrices == pytest.approx(one.matrices / 4)
    assert four.links == pytest.approx(2 * 10 * 10_000 * 100 * 2 * (2 * 3 / 4) / 0.5e9)
    assert four.bound == "links"
    assert prefill(SHAPE, Numerics(), load, device(link_gb_s=None), devices=4).links == 0


def test_devices_that_share_a_head_of_the_cache_read_it_each() -> None:
    one, five, ten = (decode(SHAPE, Numerics(), Load(), device(), devices=n).attention for n in (1, 5, 10))
    assert five == pytest.approx(one / 5)
    assert ten == pytest.approx(five)


def test_an_unknown_rate_is_told_from_a_fast_one() -> None:
    unknown = device(rates={"fp32": None, "bf16": None})
    step = decode(SHAPE, Numerics(), Load(), unknown)
    assert step.bound == "unknown rate"
    assert step.matrices == pytest.approx((BLOCKS + 50) * 2 / 1e9)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("int8:channel", "int8"),
        ("int4:g128", "int4"),
        ("int3:g64", None),
        ("fp8_e4m3:channel", "fp8"),
        ("fp8_e5m2:token", "fp8"),
        ("fp8_e4m3fnuz:channel", "fp8fnuz"),
        ("mxfp8_e4m3", "mxfp8"),
        ("mxfp6_e2m3", "mxfp6"),
        ("mxfp4", "mxfp4"),
        ("nvfp4", "nvfp4"),
        ("fp4_e2m1:channel", None),
        ("nf4:g64", None),
        ("mxint8", None),
        ("q4_k", None),
    ],
)
def test_which_units_a_scheme_needs(spec: str, name: str | None) -> None:
    assert native_name(scheme(spec)) == name


@pytest.mark.parametrize(
    ("name", "weights", "inputs", "product"),
    [
        ("h100-sxm", "int8:channel", "int8:token", "int8"),
        ("h100-sxm", "fp8_e4m3:channel", "fp8_e4m3:token", "fp8"),
        ("h100-sxm", "int8:channel", None, "bf16"),
        ("h100-sxm", "int4:g128", "int4:token", "bf16"),
        ("h100-sxm", "int4:g128", "int8:token", "int8"),
        ("a100-80gb", "int4:channel", "int4:token", "int4"),
        ("a100-80gb", "fp8_e4m3:channel", "fp8_e4m3:token", "bf16"),
        ("mi300x", "fp8_e4m3:channel", "fp8_e4m3:token", "bf16"),
        ("mi300x", "fp8_e4m3fnuz:channel", "fp8_e4m3fnuz:token", "fp8fnuz"),
        ("b200", "nvfp4", "nvfp4", "nvfp4"),
        ("mi355x", "nvfp4", "nvfp4", "bf16"),
        ("mi355x", "mxfp4", "mxfp4", "mxfp4"),
        ("xeon-8380", "int8:channel", None, "fp32"),
    ],
)
def test_what_is_multiplied(name: str, weights: str, inputs: str | None, product: str) -> None:
    numerics = Numerics(weights=scheme(weights), inputs=None if inputs is None else scheme(inputs))
    assert multiplied_in(numerics, DEVICES[name]) == product


def test_usable_memory_is_a_share() -> None:
    assert usable_bytes(DEVICES["h100-sxm"]) == 0.9 * 80e9
    assert usable_bytes(DEVICES["m4-max"]) == 0.75 * 128e9
    assert usable_bytes(DEVICES["xeon-8480"]) is None
    assert usable_bytes(DEVICES["xeon-8480"], memory_gb=100) == 80e9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Load(batch=0), "batch 0"),
        (lambda: Load(chunk=0), "chunk 0"),
        (lambda: Numerics(float_bits=8), "floats of 8 bits"),
        (lambda: Numerics(inputs=scheme("int8:token")), "quantize the weights, too"),
        (lambda: prefill(SHAPE, Numerics(), Load(), device(), devices=0), "devices 0"),
        (lambda: decode(SHAPE, Numerics(), Load(), device(bandwidth_gb_s=None)), "bandwidth is not known"),
        (lambda: dataclasses.replace(SHAPE, num_layers=0), "num_layers 0"),
        (lambda: dataclasses.replace(SHAPE, windows=(5,) * 11), "11 windowed blocks of 10"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
