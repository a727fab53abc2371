"""Bit for bit against what independent implementations recorded (tests/goldens/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.formats import ELEMENTS, NF4, Int
from jquant.core.qtensor import QTensor
from jquant.core.scales import DYNAMIC_MAP
from jquant.core.scheme import scheme
from tests.jitted import dequantize, quantize

FOLDER = Path(__file__).parents[1] / "goldens" / "core"
SHARED = np.load(FOLDER / "inputs.npz")
_quantize = jax.jit(quantize, static_argnames="scheme")


def _cases(file: str) -> list[Any]:
    golden = np.load(FOLDER / f"{file}.npz")
    cases = json.loads(str(golden["meta"]))["cases"]
    return [pytest.param(golden, case, id=case["key"]) for case in cases]


def _run(golden: Any, case: dict[str, Any]) -> tuple[np.ndarray, QTensor]:
    x = golden[case["input"]] if case["input"] in golden else SHARED[case["input"]]
    x = np.asarray(x, np.float32)
    return x, _quantize(jnp.asarray(x), scheme=scheme(case["spec"]))


def _signed(q: QTensor) -> np.ndarray:
    assert isinstance(q.scheme.element, Int)
    return np.asarray(q.codes()).astype(np.int32) - q.scheme.element.offset


def _scales(golden: Any, case: dict[str, Any], q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    ours = np.asarray(q.scales())
    return ours, np.asarray(golden[f"{case['key']}/scale"], np.float32).reshape(ours.shape)


@pytest.mark.parametrize(("golden", "case"), [*_cases("int_full"), *_cases("int_restricted")])
def test_symmetric_integers(golden: Any, case: dict[str, Any]) -> None:
    _, q = _run(golden, case)
    assert np.array_equal(_signed(q), golden[f"{case['key']}/codes"])
    ours, theirs = _scales(golden, case, q)
    zero = ours == 1  # a zero group: our scale is 1, compressed-tensors' 2^-23
    assert np.array_equal(ours[~zero], theirs[~zero])
    assert np.all((theirs[zero] == 2.0**-23) | (theirs[zero] == 1))
    if f"{case['key']}/value" in golden:
        assert np.array_equal(dequantize(q), golden[f"{case['key']}/value"])


@pytest.mark.parametrize(("golden", "case"), _cases("int_asym"))
def test_asymmetric_integers(golden: Any, case: dict[str, Any]) -> None:
    """compressed-tensors rounds x/s + z; we round x/s, then add z, as GPTQ and PyTorch do: only ties may differ."""
    x, q = _run(golden, case)
    ours, theirs = _scales(golden, case, q)
    zero_group = ours == 1
    assert np.array_equal(ours[~zero_group], theirs[~zero_group])
    assert isinstance(q.scheme.element, Int)
    zeros = q.zero_points()
    assert zeros is not None
    theirs_zero = np.asarray(golden[f"{case['key']}/zero"], np.int32).reshape(ours.shape) + q.scheme.element.offset
    assert np.array_equal(np.asarray(zeros)[~zero_group], theirs_zero[~zero_group])
    difference = _signed(q) - golden[f"{case['key']}/codes"]
    per_element = np.repeat(ours, -(-x.shape[1] // ours.shape[1]), axis=1)[:, : x.shape[1]]
    group_is_zero = np.repeat(zero_group, -(-x.shape[1] // ours.shape[1]), axis=1)[:, : x.shape[1]]
    if ours.shape[0] == 1:
        per_element, group_is_zero = (np.broadcast_to(a, x.shape) for a in (per_element, group_is_zero))
    y = x.astype(np.float64) / per_element
    tie = np.abs(np.abs(y - np.floor(y)) - 0.5) < 1e-4 * np.maximum(1, np.abs(y) / 16)
    assert np.all((difference == 0) | tie | group_is_zero)
    assert np.abs(difference[~group_is_zero]).max(initial=0) <= 1
    assert np.mean(difference[~group_is_zero] != 0) < 0.05


@pytest.mark.parametrize(("golden", "case"), _cases("minifloats"))
def test_small_floats(golden: Any, case: dict[str, Any]) -> None:
    element = ELEMENTS[case["spec"]]
    x, codes = golden[f"{case['key']}/x"], golden[f"{case['key']}/codes"]
    assert np.array_equal(jax.jit(element.encode)(jnp.asarray(x)), codes)
    assert np.array_equal(element.encode(jnp.asarray(x)), codes)


@pytest.mark.parametrize(("golden", "case"), _cases("fp8_scaled"))
def test_scaled_fp8(golden: Any, case: dict[str, Any]) -> None:
    _, q = _run(golden, case)
    decode = ELEMENTS["fp8_e4m3"].decode  # as values: the sign of an underflowed zero is theirs to lose
    assert np.array_equal(decode(q.codes()), decode(jnp.asarray(golden[f"{case['key']}/codes"])))
    ours, theirs = _scales(golden, case, q)
    assert np.array_equal(ours[ours != 1], theirs[ours != 1])


@pytest.mark.parametrize(("golden", "case"), _cases("mx"))
def test_mx(golden: Any, case: dict[str, Any]) -> None:
    x, q = _run(golden, case)
    assert np.array_equal(q.codes(), golden[f"{case['key']}/codes"])
    theirs = golden[f"{case['key']}/scale"]
    zero = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(x.shape[0], -1, 32).any(-1) == 0
    assert np.array_equal(np.asarray(q.stored.scale)[~zero], theirs[~zero])
    assert np.all(np.asarray(q.stored.scale)[zero] == 127)  # scale 1; torchao's byte is 0
    if f"{case['key']}/value" in golden:
        assert np.array_equal(dequantize(q), golden[f"{case['key']}/value"])


@pytest.mark.parametrize(("golden", "case"), _cases("mxint8"))
def test_mxint8(golden: Any, case: dict[str, Any]) -> None:
    """Our codes count steps of 2^-6 of OCP's element, so our exponent is six less than OCP's."""
    x, q = _run(golden, case)
    assert np.array_equal(_signed(q), golden["mxint8/codes"])
    assert np.array_equal(dequantize(q), golden["mxint8/value"])
    live = x.reshape(x.shape[0], -1, 32).any(-1)
    assert np.array_equal(np.asarray(q.stored.scale)[live].astype(int) + 6, golden["mxint8/scale"][live])


@pytest.mark.parametrize(("golden", "case"), _cases("nvfp4"))
def test_nvfp4(golden: Any, case: dict[str, Any]) -> None:
    """compressed-tensors bit for bit, but where its block scale underflows e4m3 and it takes 0.125, we take 2^-9."""
    x, q = _run(golden, case)
    key = case["key"]
    assert q.stored.scale2 is not None
    assert np.asarray(q.stored.scale2).ravel()[0] == np.asarray(golden[f"{key}/global_scale"]).ravel()[0]
    ours = np.asarray(ELEMENTS["fp8_e4m3"].decode(q.stored.scale))
    theirs = np.asarray(golden[f"{key}/scale"]).reshape(ours.shape)
    underflow = (theirs == 0.125) & (ours != 0.125)
    assert np.array_equal(ours[~underflow], theirs[~underflow])
    assert np.all(np.isin(ours[underflow], [2.0**-9, 1.0]))
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 16))).reshape(x.shape[0], -1, 16)
    assert underflow.sum() <= 2 * blocks.shape[1] + np.sum(~blocks.any(-1))  # two tiny rows, and blocks of zeros
    apart = np.repeat(underflow, 16, axis=1)[:, : x.shape[1]]
    assert np.array_equal(np.asarray(q.codes())[~apart], golden[f"{key}/codes"][~apart])
    if f"{key}/value" in golden:
        assert np.array_equal(np.asarray(dequantize(q))[~apart], golden[f"{key}/value"][~apart])
    # And where they differ, ours is no further from x.
    if apart.any() and f"{key}/value" in golden:
        error = np.abs(np.asarray(dequantize(q)) - x)[apart].sum()
        assert error <= np.abs(golden[f"{key}/value"] - x)[apart].sum()


@pytest.mark.parametrize(("golden", "case"), _cases("nf4"))
def test_nf4(golden: Any, case: dict[str, Any]) -> None:
    _, q = _run(golden, case)
    assert np.array_equal(golden["levels"], NF4.levels())
    assert np.array_equal(q.codes(), golden[f"{case['key']}/codes"].reshape(q.shape))
    ours, theirs = _scales(golden, case, q)
    assert np.array_equal(ours[theirs > 0], theirs[theirs > 0])
    if f"{case['key']}/value" in golden:
        assert np.array_equal(dequantize(q), golden[f"{case['key']}/value"])


@pytest.mark.parametrize(("golden", "case"), _cases("nf4_double"))
def test_nf4_double_quantization(golden: Any, case: dict[str, Any]) -> None:
    """The offset is a sum in float32, whose order nobody fixes: it and what follows agree to that, codes exactly."""
    _, q = _run(golden, case)
    key = case["key"]
    assert np.array_equal(DYNAMIC_MAP.levels(), golden["dynamic_map"])
    assert np.array_equal(q.codes(), golden[f"{key}/codes"].reshape(q.shape))
    assert q.stored.offset is not None
    assert q.stored.scale2 is not None
    assert np.asarray(q.stored.offset).item() == pytest.approx(np.asarray(golden[f"{key}/offset"]).item(), rel=3e-7)
    assert np.allclose(np.asarray(q.stored.scale2).ravel(), golden[f"{key}/scale2"].ravel(), rtol=1e-6)
    assert np.array_equal(np.asarray(q.stored.scale).ravel(), golden[f"{key}/scale_codes"].ravel())
    assert np.allclose(np.asarray(q.scales()).ravel(), golden[f"{key}/scale"].ravel(), rtol=1e-6)
