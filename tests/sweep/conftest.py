"""A sweep with made-up but lifelike numbers: what 24 schemes do to a 135M-parameter model."""

from __future__ import annotations

import dataclasses
import math

import pytest

from jquant.sweep.results import Cell, Sweep

REFERENCE_NLL = math.log(36.002)
QUANTIZED_WEIGHTS = 106_168_320

# scheme, element, granularity, group size, bits per weight, SQNR in dB
SCHEMES = (
    ("int8", "int8", "channel", None, 8.028, 40.1),
    ("int8:g128", "int8", "group", 128, 8.25, 44.0),
    ("int6:g64", "int6", "group", 64, 6.5, 32.9),
    ("int5:g64", "int5", "group", 64, 5.5, 26.7),
    ("int4:tensor", "int4", "tensor", None, 4.0, 7.2),
    ("int4", "int4", "channel", None, 4.028, 15.6),
    ("int4:g128", "int4", "group", 128, 4.25, 19.2),
    ("int4:g64", "int4", "group", 64, 4.5, 20.4),
    ("int4:g32", "int4", "group", 32, 5.0, 21.7),
    ("int4:g128:asym", "int4", "group", 128, 4.281, 20.0),
    ("int4:g32:asym:fp16", "int4", "group", 32, 4.625, 22.6),
    ("int4:b32x32", "int4", "block", None, 4.031, 17.0),
    ("int3:g64", "int3", "group", 64, 3.5, 13.9),
    ("int3:g32:bf16", "int3", "group", 32, 3.5, 15.2),
    ("int2:g32", "int2", "group", 32, 3.0, 6.1),
    ("fp8_e4m3", "fp8_e4m3", "channel", None, 8.028, 31.5),
    ("fp8_e5m2", "fp8_e5m2", "channel", None, 8.028, 25.6),
    ("mxfp8_e4m3", "fp8_e4m3", "group", 32, 8.25, 31.4),
    ("mxfp6_e2m3", "fp6_e2m3", "group", 32, 6.25, 30.1),
    ("mxint8", "int8", "group", 32, 8.25, 43.0),
    ("mxfp4", "fp4_e2m1", "group", 32, 4.25, 18.6),
    ("nvfp4", "fp4_e2m1", "group", 16, 4.5, 20.6),
    ("nf4", "nf4", "group", 64, 4.5, 20.9),
    ("nf4:dq", "nf4", "group", 64, 4.127, 20.8),
)


def _cell(scheme: str, element: str, granularity: str, group: int | None, bits: float, sqnr: float) -> Cell:
    noise = 10 ** (-sqnr / 10)
    kl = 9.0 * noise**0.95
    nll = REFERENCE_NLL + 0.75 * kl + 0.002 * math.sin(40 * sqnr)
    return Cell(
        id=f"{abs(hash_of(scheme)):012x}",
        scheme=scheme,
        method="rtn",
        element=element,
        granularity=granularity,
        group_size=group,
        bits_per_weight=bits,
        quantized_bytes=int(QUANTIZED_WEIGHTS * bits / 8),
        model_bytes=int(QUANTIZED_WEIGHTS * bits / 8) + 113_393_664,
        mse=0.017 * noise,
        mae=0.09 * noise**0.5,
        max_error=1.6 * noise**0.5,
        sqnr_db=sqnr,
        cosine=1 - noise / 2,
        perplexity=math.exp(nll),
        nll=nll,
        stderr=0.071 + 0.01 * kl,
        kl=kl,
        kl_stderr=0.04 * kl,
        top1=math.exp(-1.1 * kl**0.5),
        top1_stderr=0.004,
        tokens_scored=8176,
        seconds_quantize=0.4 + bits / 20,
        seconds_evaluate=7.1 + 0.1 * math.cos(sqnr),
    )


def hash_of(scheme: str) -> int:
    """The same on every run, unlike hash()."""
    return int.from_bytes(scheme.encode()[-5:], "big")


def make_sweep() -> Sweep:
    """The 24 cells, their reference, and a manifest as a sweep writes it."""
    reference = Cell(
        id="000000000000",
        scheme="float",
        method="none",
        element="float32",
        granularity="tensor",
        group_size=None,
        bits_per_weight=32.0,
        quantized_bytes=QUANTIZED_WEIGHTS * 4,
        model_bytes=538_060_032,
        mse=0.0,
        mae=0.0,
        max_error=0.0,
        sqnr_db=math.inf,
        cosine=1.0,
        perplexity=36.002,
        nll=REFERENCE_NLL,
        stderr=0.071,
        kl=0.0,
        kl_stderr=0.0,
        top1=1.0,
        top1_stderr=0.0,
        tokens_scored=8176,
        seconds_quantize=0.0,
        seconds_evaluate=6.9,
    )
    manifest = {
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "sha256": "9d2f1c6b2f64b9a1d5ac6a1cd9f4a6b3b0c0a1f1e6f7c2f6f1d7a9b5d3e8c412",
            "parameters": 134_515_008,
            "note": "The weights were 4-bit (Q4_1) in the file and were decoded to float32 on load.",
        },
        "text": {
            "name": "pydoc:evaluation",
            "sha256": "51c0a8f4fd2c5b6c1f7d3d0a2b8e6f9a4c3d2e1f0a9b8c7d6e5f4a3b2c1d0e9f",
        },
        "protocol": {"window": 512, "stride": 512, "windows": 16, "tokens_total": 38_412, "add_bos": False},
        "environment": {
            "jquant": "0.1.0",
            "jax": "0.10.2",
            "python": "3.11.7",
            "platform": "Linux x86_64",
            "device": {"kind": "cpu", "count": 1},
        },
    }
    return Sweep(manifest=manifest, reference=reference, cells=tuple(_cell(*row) for row in SCHEMES))


@pytest.fixture(scope="session")
def sweep() -> Sweep:
    return make_sweep()


@pytest.fixture(scope="session")
def methods_sweep() -> Sweep:
    """Some of the schemes, each by five methods that lose less and less."""
    whole = make_sweep()
    chosen = [cell for cell in whole.cells if cell.scheme.startswith("int") and cell.granularity == "group"]
    cells = [
        dataclasses.replace(
            cell, id=f"{cell.id}{index}", method=method, kl=cell.kl * 0.8**index, perplexity=cell.perplexity - index / 9
        )
        for cell in chosen
        for index, method in enumerate(("rtn", "rtn-mse", "hqq", "awq+gptq", "unheard-of"))
    ]
    return dataclasses.replace(whole, cells=tuple(cells))
