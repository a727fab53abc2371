"""Record the number-format goldens of tests/goldens/core from independent implementations.

Run in the oracle environment, never in the project's own: it imports numpy, ml_dtypes, torch, compressed_tensors,
torchao and bitsandbytes, and nothing of jquant.

    ORACLE_PYTHON scripts/goldens/core.py [--out tests/goldens/core]

One .npz a family. Entry `meta` is a JSON string: oracle, version, function, config, and `cases`, a list of
{key, spec, input, ...}; the arrays of a case are `KEY/codes`, `KEY/scale`, ...; `input` names an entry of the same
file, or of inputs.npz, which holds the float32 arrays that several families share. What each entry means, and the
oracle's own order of operations, is stated in the family's `config`. One file above 500 lines, because the families
share the inputs and the record of what they are.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, generate_mx_scales
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

SEED = 20_251
Arrays = dict[str, np.ndarray]
Case = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the number-format goldens.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "tests" / "goldens" / "core")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    families: dict[str, Callable[[], tuple[Arrays, dict[str, Any]]]] = {
        "int_full": record_int_full,
        "int_asym": record_int_asym,
        "int_restricted": record_int_restricted,
        "fp8_scaled": record_fp8_scaled,
        "minifloats": record_minifloats,
        "mx": record_mx,
        "mxint8": record_mxint8,
        "nvfp4": record_nvfp4,
        "nf4": record_nf4,
        "nf4_double": record_nf4_double,
    }
    _write(out / "inputs.npz", inputs(), {"seed": SEED, "script": "scripts/goldens/core.py"})
    for name, record in families.items():
        _write(out / f"{name}.npz", *record())


def _write(path: Path, arrays: Arrays, meta: dict[str, Any]) -> None:
    np.savez_compressed(path, **arrays, meta=np.array(json.dumps(meta)))  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {len(meta.get('cases', ()))} cases, {path.stat().st_size:,} bytes")


# --- inputs ----------------------------------------------------------------------------------------------------------


@functools.cache
def inputs() -> Arrays:
    return {"wide": wide(), "plain": plain(), "gauss": gauss(), "ragged": ragged()}


def wide() -> np.ndarray:
    """24 x 256 rows of every awkward kind; each row is meant to be judged by its own scales."""
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((24, 256))
    x[0:5] *= np.array([[1.0], [0.02], [30.0], [1.0], [3e-3]])
    x[5:7] = rng.laplace(size=(2, 256)) * np.where(rng.random((2, 256)) < 0.01, 20.0, 1.0)
    x[7:9] = rng.standard_t(2, size=(2, 256))
    x[9, ::7] = 1e-40  # subnormal float32 values beside normal ones
    x[9, ::11] = -1e-45
    x[10] = 0.0
    x[11, :128] = 0.0
    x[11, 224:] = 0.0
    x[12:16] = _symmetric_and_int4_ties(rng)
    x[16, :128] = _half_integers(rng, -55.0, 200.0)  # int8 asymmetric: scale 1, odd zero point
    x[16, 128:] = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], 128) * rng.choice([-1.0, 1.0], 128)
    x[16, 128::32] = 6.0  # e2m1 ties at block scale 1
    x[17] = np.tile(np.concatenate([_midpoints(nf4_levels()), rng.uniform(-1, 1, 48), [1.0]]), 4)
    x[18] *= 1e-30
    x[19] *= 1e37
    x[20] = np.abs(x[20])
    x[21] = -np.abs(x[21])
    x[22, :128], x[22, 128:] = 0.1, -0.3
    x[23] *= 1e-3
    x[23, 77] = 1000.0
    return x.astype(np.float32)


def plain() -> np.ndarray:
    """`wide` without the rows that would drown the others under one scale for the whole tensor."""
    rng = np.random.default_rng(SEED + 1)
    x = wide()
    x[18] = rng.standard_normal(256) * 1e-6
    x[19] = rng.standard_normal(256) * 1e-4
    x[23] = rng.standard_normal(256)
    return x


def gauss(shape: tuple[int, ...] = (16, 256), scale: float = 0.02, offset: int = 2) -> np.ndarray:
    """Weights as a trained layer has them."""
    return (np.random.default_rng(SEED + offset).standard_normal(shape) * scale).astype(np.float32)


def ragged() -> np.ndarray:
    """8 x 100: no group size of a power of two above 4 divides the row."""
    return gauss((8, 100), 1.0, offset=3)


def _symmetric_and_int4_ties(rng: np.random.Generator) -> np.ndarray:
    groups = [_half_integers(rng, -(2.0**b - 1) / 2, (2.0**b - 1) / 2) for b in range(2, 9)]
    return np.stack([*groups, _half_integers(rng, -3.0, 12.0)]).reshape(4, 256)


def _half_integers(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """128 multiples of 1/2 in [low, high], both ends in every 32: the scale comes out as 1, half of them are ties."""
    x = rng.integers(round(2 * low), round(2 * high) + 1, 128) / 2
    x[::32], x[1::32] = low, high
    return x


def _midpoints(levels: np.ndarray) -> np.ndarray:
    return (levels[:-1] + levels[1:]) / np.float32(2)


# --- integers and scaled fp8 (compressed-tensors) --------------------------------------------------------------------


def record_int_full() -> tuple[Arrays, dict[str, Any]]:
    specs = [f"int{b}:g128" for b in range(2, 9)] + ["int3:g32", "int4:g32", "int4:channel", "int8:channel"]
    specs += ["int4:tensor", "int8:tensor", "int8:token", "int8:b8x64", "int4:b16x128"]
    config = {
        "scale": "max(|min|, |max|) / ((2^b - 1) / 2), float32 division; 0 becomes 2^-23",
        "codes": "rint(clip(x / scale, -2^(b-1), 2^(b-1) - 1)), signed",
        "value": "codes * scale in float32; checked here, stored for int4:g128 alone",
    }
    return _compressed_tensors(specs, config, ["int4:g32", "int4:channel"], ["int4:g128"])


def record_int_asym() -> tuple[Arrays, dict[str, Any]]:
    specs = [f"int{b}:g128:asym" for b in range(2, 9)] + ["int3:g32:asym", "int4:g32:asym", "int4:channel:asym"]
    specs += ["int8:channel:asym", "int4:tensor:asym", "int8:tensor:asym", "int8:token:asym"]
    config = {
        "scale": "(max(max, 0) - min(min, 0)) / (2^b - 1), float32 division; 0 becomes 2^-23",
        "zero": "rint(clip(-2^(b-1) - min / scale, -2^(b-1), 2^(b-1) - 1)), signed; add 2^(b-1) for the unsigned form",
        "codes": "rint(clip(x / scale + zero, -2^(b-1), 2^(b-1) - 1)), signed; add 2^(b-1) for the unsigned form",
        "value": "(codes - zero) * scale in float32; checked here, stored for int4:g128:asym alone",
    }
    return _compressed_tensors(specs, config, ["int4:g32:asym", "int4:channel:asym"], ["int4:g128:asym"])


def record_fp8_scaled() -> tuple[Arrays, dict[str, Any]]:
    specs = ["fp8_e4m3:channel", "fp8_e4m3:tensor", "fp8_e4m3:token", "fp8_e4m3:b16x128", "fp8_e4m3:b8x32"]
    config = {
        "scale": "amax / 448, float32 division; 0 becomes 2^-23",
        "codes": "bit patterns of e4m3fn(clip(x / scale, -448, 448))",
        "value": "codes * scale in float32; checked here, stored for fp8_e4m3:channel alone",
    }
    return _compressed_tensors(specs, config, ["fp8_e4m3:channel"], ["fp8_e4m3:channel"])


def _compressed_tensors(
    specs: list[str], config: dict[str, str], ragged_specs: list[str], keep_value: list[str]
) -> tuple[Arrays, dict[str, Any]]:
    arrays: Arrays = {}
    cases: list[Case] = []
    for spec in specs:
        source = "plain" if ":tensor" in spec else "wide"
        cases.append({"key": spec, "spec": spec, "input": source})
    for spec in ragged_specs:
        cases.append({"key": f"{spec}@ragged", "spec": spec, "input": "ragged", "padding": "zeros to whole groups"})
    for case in cases:
        found = _ct_quantize(inputs()[case["input"]], case["spec"])
        if case["key"] not in keep_value:
            del found["value"]
        arrays |= {f"{case['key']}/{name}": array for name, array in found.items()}
    return arrays, _meta("compressed-tensors", "calculate_qparams; quantize; dequantize", config, cases)


def _ct_quantize(x: np.ndarray, spec: str) -> Arrays:
    element, granularity, *rest = spec.split(":")
    args: dict[str, Any] = {"symmetric": "asym" not in rest}
    args |= {"num_bits": 8, "type": "float"} if element == "fp8_e4m3" else {"num_bits": int(element[3:]), "type": "int"}
    columns = x.shape[1]
    t = torch.from_numpy(x)
    if granularity == "tensor":
        args |= {"strategy": "tensor"}
        low, high = t.min(), t.max()
    elif granularity in ("channel", "token"):
        args |= {"strategy": granularity, "dynamic": granularity == "token"}
        low, high = t.amin(-1, keepdim=True), t.amax(-1, keepdim=True)
    elif granularity.startswith("g"):
        size = int(granularity[1:])
        args |= {"strategy": "group", "group_size": size}
        t = torch.nn.functional.pad(t, (0, -columns % size))
        groups = t.unflatten(-1, (-1, size))
        low, high = groups.amin(-1), groups.amax(-1)
    else:
        height, width = (int(n) for n in granularity[1:].split("x"))
        args |= {"strategy": "block", "block_structure": [height, width]}
        blocks = torch.nn.functional.pad(t, (0, -columns % width, 0, -t.shape[0] % height))
        blocks = blocks.unflatten(0, (-1, height)).unflatten(2, (-1, width))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    qargs = QuantizationArgs(**args)
    scale, zero = calculate_qparams(low, high, qargs)
    codes = quantize(t, scale, zero, qargs)
    value = dequantize(codes, scale, zero, qargs)
    if args["strategy"] != "block":
        sizes = {"tensor": t.numel(), "group": args.get("group_size")}.get(args["strategy"], columns)
        wide_scale, wide_zero = (a.float().reshape(-1).repeat_interleave(sizes) for a in (scale, zero))
        assert torch.equal(value.flatten(), (codes.flatten() - wide_zero) * wide_scale), spec
    found = {"scale": scale.numpy(), "codes": codes[:, :columns].numpy(), "value": value[:, :columns].numpy()}
    if args["type"] == "float":
        found["codes"] = found["codes"].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    else:
        found["codes"] = found["codes"].astype(np.int8)
        if not args["symmetric"]:
            found["zero"] = zero.numpy()
    return found


def record_int_restricted() -> tuple[Arrays, dict[str, Any]]:
    """Written from the definition in numpy; torchao's scales are the witness (its codes use x * (1 / scale))."""
    arrays: Arrays = {}
    cases: list[Case] = []
    for bits, granularity in ((2, "g128"), (3, "g32"), (4, "g128"), (8, "channel")):
        spec, top = f"int{bits}:{granularity}:restricted", 2 ** (bits - 1) - 1
        size = 256 if granularity == "channel" else int(granularity[1:])
        groups = inputs()["wide"].reshape(24, -1, size)
        amax = np.abs(groups).max(-1)
        scale = np.where(amax > 0, amax / np.float32(top), np.float32(1))
        codes = np.clip(np.rint(groups / scale[..., None]), -top, top)
        witness, _ = choose_qparams_affine(
            torch.from_numpy(inputs()["wide"]), MappingType.SYMMETRIC, (1, size), torch.int8, -top, top, eps=1e-45
        )
        assert np.array_equal(witness.numpy().reshape(scale.shape)[amax > 0], scale[amax > 0]), spec
        cases.append({"key": spec, "spec": spec, "input": "wide"})
        arrays |= {f"{spec}/scale": scale, f"{spec}/codes": codes.reshape(24, 256).astype(np.int8)}
    config = {
        "scale": "amax / (2^(b-1) - 1), float32 division; a zero group has 1; equal to torchao's elsewhere",
        "codes": "clip(rint(x / scale), -(2^(b-1) - 1), 2^(b-1) - 1)",
    }
    return arrays, _meta("numpy", "written out here; scales checked with torchao choose_qparams_affine", config, cases)


# --- small floats (ml_dtypes) ----------------------------------------------------------------------------------------

ELEMENTS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "fp8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "fp8_e3m4": ml_dtypes.float8_e3m4,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}


def record_minifloats() -> tuple[Arrays, dict[str, Any]]:
    arrays: Arrays = {}
    cases: list[Case] = []
    for name, dtype in ELEMENTS.items():
        x = _dense_grid(dtype)
        top = float(ml_dtypes.finfo(dtype).max)
        codes = np.clip(x, -top, top).astype(dtype).view(np.uint8)
        arrays |= {f"{name}/x": x, f"{name}/codes": codes}
        cases.append({"key": name, "spec": name, "input": f"{name}/x", "max": top})
    config = {
        "input": "every finite value, every midpoint, float32 neighbours of both, +-0, subnormals, beyond the maximum",
        "codes": "bit patterns of clip(x, -max, max).astype(element): round to nearest even, saturating",
    }
    return arrays, _meta("ml_dtypes", "astype", config, cases)


def _dense_grid(dtype: Any) -> np.ndarray:
    bits = ml_dtypes.finfo(dtype).bits
    levels = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float32)
    levels = np.unique(levels[np.isfinite(levels)])
    points = np.concatenate([levels, _midpoints(levels)])
    above, below = (np.nextafter(points, np.float32(end)) for end in (np.inf, -np.inf))
    top = levels[-1]
    beyond = top * np.array([1.01, 1.04, 1.0625, 1.125, 1.25, 2, 1e3, 1e20], np.float32)
    tiny = np.array([1e-45, 1e-40, 1.1754944e-38, 1e-20, -0.0], np.float32)
    return np.unique(np.concatenate([points, above, below, beyond, -beyond, tiny, -tiny]).view(np.uint32)).view(
        np.float32
    )


# --- microscaling (torchao; compressed-tensors as witness) -----------------------------------------------------------

MX = {
    "mxfp4": (torch.float4_e2m1fn_x2, ml_dtypes.float4_e2m1fn),
    "mxfp6_e2m3": ("fp6_e2m3", ml_dtypes.float6_e2m3fn),
    "mxfp6_e3m2": ("fp6_e3m2", ml_dtypes.float6_e3m2fn),
    "mxfp8_e4m3": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
    "mxfp8_e5m2": (torch.float8_e5m2, ml_dtypes.float8_e5m2),
}
MX_MODES = {"": "FLOOR", ":even": "EVEN", ":rceil": "RCEIL", ":ceil": "CEIL"}
MX_WITNESS_BITS = {"mxfp4:even": 4, "mxfp6_e2m3:even": 6}


def record_mx() -> tuple[Arrays, dict[str, Any]]:
    arrays: Arrays = {}
    cases: list[Case] = [
        {"key": name + suffix, "spec": name + suffix, "input": "wide", "mode": mode}
        for name in MX
        for suffix, mode in MX_MODES.items()
    ]
    cases += [
        {"key": f"mxfp4{suffix}@gauss", "spec": f"mxfp4{suffix}", "input": "gauss", "mode": mode}
        for suffix, mode in MX_MODES.items()
    ]
    cases.append({"key": "mxfp4@ragged", "spec": "mxfp4", "input": "ragged", "mode": "FLOOR", "padding": "zeros"})
    for case in cases:
        x, name = inputs()[case["input"]], case["spec"].split(":")[0]
        scale, codes, value = _torchao_mx(x, name, case["mode"])
        arrays |= {f"{case['key']}/scale": scale, f"{case['key']}/codes": codes}
        if case["key"] == name:
            arrays[f"{case['key']}/value"] = value
        if case["key"] in MX_WITNESS_BITS:
            amax = torch.from_numpy(np.abs(x).reshape(x.shape[0], -1, 32).max(-1))
            exponents = generate_mx_scales(amax, MX_WITNESS_BITS[case["key"]]).clamp(0, 255).to(torch.uint8)
            assert np.array_equal(exponents.numpy(), scale), case["key"]
    config = {
        "scale": "E8M0 bytes [rows, blocks of 32]; a zero block has byte 0",
        "codes": "bit patterns of the element, one a byte, sign of zero kept",
        "value": "element * 2^(byte - 127), exact; checked here, stored for the FLOOR mode",
        "witness": "compressed_tensors generate_mx_scales gives the same bytes for mxfp4:even and mxfp6_e2m3:even",
    }
    return arrays, _meta("torchao", "mx_formats.mx_tensor.to_mx, to_dtype", config, cases)


def _torchao_mx(x: np.ndarray, element: str, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    name, dtype = MX[element]
    columns = x.shape[1]
    t = torch.nn.functional.pad(torch.from_numpy(x), (0, -columns % 32))
    scale, packed = to_mx(t, name, 32, ScaleCalculationMode[mode])
    value = to_dtype(packed, scale, name, 32, torch.float32).reshape(t.shape).numpy()
    codes = (
        unpack_uint4(packed).reshape(t.shape) if dtype is ml_dtypes.float4_e2m1fn else packed.view(torch.uint8)
    ).numpy()
    bytes_ = scale.view(torch.uint8).numpy()
    exact = codes.view(dtype).astype(np.float64) * np.repeat(2.0 ** (bytes_.astype(int) - 127), 32, axis=1)
    assert np.array_equal(value, exact.astype(np.float32))
    return bytes_, codes[:, :columns], value[:, :columns]


def record_mxint8() -> tuple[Arrays, dict[str, Any]]:
    """OCP MX v1.0, sections 5.3.4 and 6.3: int8 with an implied 2^-6, block scale 2^floor(log2 amax)."""
    blocks = inputs()["wide"].astype(np.float64).reshape(24, -1, 32)
    amax = np.abs(blocks).max(-1)
    exponent = np.where(amax > 0, np.frexp(amax)[1] - 1, -127)
    codes = np.clip(np.rint(np.ldexp(blocks, 6 - exponent[..., None])), -127, 127)
    arrays: Arrays = {
        "mxint8/scale": (exponent + 127).astype(np.uint8),
        "mxint8/codes": codes.reshape(24, 256).astype(np.int8),
        "mxint8/value": np.ldexp(codes, exponent[..., None] - 6).reshape(24, 256).astype(np.float32),
    }
    config = {
        "scale": "E8M0 bytes: floor(log2 amax) + 127; a zero block has byte 0",
        "codes": "clip(rint(x / 2^(byte - 127) * 64), -127, 127); the code -128 stays unused",
        "value": "codes * 2^(byte - 127 - 6)",
    }
    cases = [{"key": "mxint8", "spec": "mxint8", "input": "wide"}]
    return arrays, _meta("numpy", "OCP MX v1.0 written out in float64", config, cases)


# --- NVFP4 (compressed-tensors; torchao beside it) -------------------------------------------------------------------


def record_nvfp4() -> tuple[Arrays, dict[str, Any]]:
    arrays: Arrays = {}
    cases: list[Case] = [
        {"key": "nvfp4", "spec": "nvfp4", "input": "plain"},
        {"key": "nvfp4@gauss", "spec": "nvfp4", "input": "gauss"},
        {"key": "nvfp4@ragged", "spec": "nvfp4", "input": "ragged", "padding": "zeros"},
    ]
    for case in cases:
        x = inputs()[case["input"]]
        found = _ct_nvfp4(x) | {f"torchao_{k}": v for k, v in _torchao_nvfp4(x).items()}
        blocks = found["scale"].astype(np.float32)
        differ = np.argwhere(found["codes"] != found["torchao_codes"])
        case["blocks_with_another_torchao_scale"] = int((blocks != found["torchao_scale"]).sum())
        case["codes_that_torchao_has_otherwise"] = len(differ)
        arrays |= {f"{case['key']}/{name}": array for name, array in found.items()}
    config = {
        "global_scale": "g = fl(fl(1 / amax) * 2688)",
        "scale": "e4m3fn(g * (block amax / 6)) as float32; 0 becomes 0.125",
        "codes": "bit patterns of e2m1(clip(x / (scale / g), -6, 6))",
        "value": "element * (scale / g)",
        "torchao_*": "p = amax / 2688; scale = e4m3fn(max((block amax / 6) / p, 2^-6)); "
        "codes = e2m1(x * ((1 / p) / scale)); value = element * (p * scale); torchao_global_scale is p",
    }
    return arrays, _meta(
        "compressed-tensors", "generate_gparam; calculate_qparams; quantize; dequantize", config, cases
    )


def _ct_nvfp4(x: np.ndarray) -> Arrays:
    fp8 = torch.float8_e4m3fn
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, scale_dtype=fp8, zp_dtype=fp8
    )
    columns = x.shape[1]
    t = torch.nn.functional.pad(torch.from_numpy(x), (0, -columns % 16))
    groups = t.unflatten(-1, (-1, 16))
    g = generate_gparam(t.min(), t.max())
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=g)
    codes = quantize(t, scale, zero, args, global_scale=g)
    value = dequantize(codes, scale, zero, args, global_scale=g)
    bits = codes.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return {
        "global_scale": g.numpy(),
        "scale": scale.numpy(),
        "codes": bits[:, :columns],
        "value": value[:, :columns].numpy(),
    }


def _torchao_nvfp4(x: np.ndarray) -> Arrays:
    columns = x.shape[1]
    t = torch.nn.functional.pad(torch.from_numpy(x), (0, -columns % 16))
    p = per_tensor_amax_to_scale(t.abs().max())
    scale, packed = nvfp4_quantize(t, 16, p)
    bits = unpack_uint4(packed).reshape(t.shape).numpy()
    return {"global_scale": p.numpy()[None], "scale": scale.float().numpy(), "codes": bits[:, :columns]}


# --- NF4 (bitsandbytes) ----------------------------------------------------------------------------------------------


def nf4_levels() -> np.ndarray:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu").numpy()


def record_nf4() -> tuple[Arrays, dict[str, Any]]:
    arrays: Arrays = {"levels": nf4_levels()}
    cases: list[Case] = []
    for size in (32, 64, 128):
        spec = f"nf4:g{size}"
        codes, state = _bnb_quantize(inputs()["wide"], size)
        arrays |= {f"{spec}/scale": state.absmax.numpy().reshape(24, -1), f"{spec}/codes": codes}
        cases.append({"key": spec, "spec": spec, "input": "wide"})
        if size == 64:
            arrays[f"{spec}/value"] = _bnb_dequantize(codes, state)
    config = {
        "scale": "block absmax, float32",
        "codes": "number of midpoints fl((l_i + l_(i+1)) / 2) below x * (1 / max(absmax, 1e-38)); "
        "a tie takes the lower index",
        "value": "levels[codes] * absmax, stored for nf4:g64",
    }
    return arrays, _meta("bitsandbytes", "functional.quantize_4bit, dequantize_4bit on CPU", config, cases)


def record_nf4_double() -> tuple[Arrays, dict[str, Any]]:
    """Block maxima on a lattice of 1/64, 512 of them: their float32 mean is exact in any order of summation."""
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise

    rng = np.random.default_rng(SEED + 4)
    x = (rng.standard_normal((128, 256)) * 0.5).astype(np.float16).reshape(-1, 64)
    x = np.clip(x, -1.0, 1.0).astype(np.float16)
    x[np.arange(512), rng.integers(0, 64, 512)] = (
        rng.choice([-1, 1], 512) * (64 + rng.gamma(2.0, 20.0, 512).round()) / 64
    ).astype(np.float16)
    x[5] = 0
    arrays: Arrays = {"x_float16": x.reshape(128, 256)}
    x32 = arrays["x_float16"].astype(np.float32)
    codes, state = _bnb_quantize(x32, 64)
    double_codes, double = _bnb_quantize(x32, 64, compress_statistics=True)
    assert np.array_equal(codes, double_codes)
    absmax = state.absmax
    assert double.offset.item() == absmax.double().mean().item()
    table = create_dynamic_map()
    code8, absmax2 = _bnb_reference_op("quantize_blockwise")(absmax - double.offset, table, 256)
    assert np.array_equal(absmax2.numpy(), double.state2.absmax.numpy())
    spec = "nf4:g64:dq"
    nested = table[code8.long()] * absmax2.repeat_interleave(256)
    assert torch.equal(
        dequantize_blockwise(double.absmax, double.state2),
        table[double.absmax.long()] * absmax2.repeat_interleave(256),
    )
    state.absmax = nested + double.offset
    arrays |= {
        "dynamic_map": table.numpy(),
        f"{spec}/codes": codes,
        f"{spec}/absmax": absmax.numpy().reshape(128, 4),
        f"{spec}/offset": double.offset.numpy().reshape(1),
        f"{spec}/scale2": absmax2.numpy(),
        f"{spec}/scale_codes": code8.numpy().reshape(128, 4),
        f"{spec}/scale_codes_cpu_kernel": double.absmax.numpy().reshape(128, 4),
        f"{spec}/scale": state.absmax.numpy().reshape(128, 4),
    }
    value = nf4_levels()[codes] * np.repeat(arrays[f"{spec}/scale"], 64, axis=1)
    assert np.array_equal(_bnb_dequantize(codes, state), value)
    config = {
        "input": "x_float16 cast to float32",
        "offset": "mean(absmax)",
        "scale2": "max |absmax - offset| in blocks of 256 absmaxes, rows in order",
        "scale_codes": "nearest entry of dynamic_map to (absmax - offset) * (1 / scale2), a tie to the lower index: "
        "bitsandbytes' own torch operator, the rule of its CUDA kernel",
        "scale_codes_cpu_kernel": "its C kernel for CPU looks up a table of 65,536 entries and is not always nearest",
        "scale": "dynamic_map[scale_codes] * scale2 + offset, two roundings",
        "codes": "from the unquantized absmax",
        "value": "levels[codes] * scale; checked here, not stored",
    }
    cases = [{"key": spec, "spec": spec, "input": "x_float16"}]
    function = (
        "functional.quantize_4bit(compress_statistics=True), backends.default quantize_blockwise, dequantize_4bit"
    )
    return arrays, _meta("bitsandbytes", function, config, cases)


def _bnb_quantize(x: np.ndarray, size: int, **options: bool) -> tuple[np.ndarray, Any]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.from_numpy(x), blocksize=size, quant_type="nf4", **options)
    flat = packed.flatten().numpy()
    return np.stack([flat >> 4, flat & 15], axis=1).reshape(x.shape), state


def _bnb_dequantize(codes: np.ndarray, state: Any) -> np.ndarray:
    from bitsandbytes.functional import dequantize_4bit

    flat = codes.reshape(-1, 2)
    packed = torch.from_numpy((flat[:, :1] << 4) | flat[:, 1:])
    return dequantize_4bit(packed, state).numpy()


def _bnb_reference_op(name: str) -> Callable[..., Any]:
    """bitsandbytes' device-independent torch operator, which the CPU build hides behind a C kernel."""
    import bitsandbytes._ops as registry
    import bitsandbytes.backends.default.ops as default_ops

    found: dict[str, Callable[..., Any]] = {}
    register = registry.register_kernel
    registry.register_kernel = lambda kernel, _device: lambda function: found.setdefault(kernel, function)
    try:
        importlib.reload(default_ops)
    finally:
        registry.register_kernel = register
    return found[f"bitsandbytes::{name}"]


def _meta(oracle: str, function: str, config: dict[str, str], cases: list[Case]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in (oracle, "torch", "numpy")}
    return {
        "oracle": oracle,
        "version": versions[oracle],
        "environment": versions,
        "function": function,
        "config": config,
        "seed": SEED,
        "script": "scripts/goldens/core.py",
        "cases": cases,
    }


if __name__ == "__main__":
    main()
