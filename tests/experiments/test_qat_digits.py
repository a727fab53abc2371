"""The experiment on digits runs, and its packed models predict what the trained ones did."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from experiments.qat_digits import Data, Net, one_seed, quantized
from jquant.nn.rounded_input import PackedLayer
from jquant.nn.surgery import named_modules
from jquant.qat.convert import convert


def stripes(count: int) -> Data:
    """Images whose brightest column says the digit: learned in few steps."""
    rng = np.random.Generator(np.random.Philox(0))
    labels = rng.integers(0, 8, count).astype(np.int32)
    images = 0.3 * rng.random((count, 8, 8, 1), np.float32)
    images[np.arange(count), :, labels] += 0.7
    return Data(images, labels)


@pytest.mark.slow
def test_one_seed() -> None:
    found = one_seed(stripes(300), 0, epochs=6, held_out=60, widths=(2,))
    assert list(found) == ["float", "float, trained on", "int2 PTQ rtn", "int2 PTQ mse", "int2 QAT"]
    assert found["float, trained on"] > 60
    assert found["int2 QAT"] >= found["int2 PTQ rtn"]


def test_packed_models_hold_the_bits_asked_for() -> None:
    packed = convert(quantized(Net(rngs=nnx.Rngs(0)), stripes(80), 2, learned=True))
    schemes = {path: str(layer.weight.get_value().scheme) for path, layer in named_modules(packed, PackedLayer)}  # type: ignore[attr-defined]
    assert schemes == {"second": "int2:channel", "third": "int2:channel"} | dict.fromkeys(
        ("first", "last"), "int8:channel"
    )
