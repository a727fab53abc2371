"""Records tests/goldens/gguf_blocks.npz and gguf_encoded.npz: ggml's block types, decoded and encoded.

Oracles: gguf-py's `dequantize` and `quantize`, and ggml's own C code (libggml-python), which must agree with them bit
for bit and which encodes what gguf-py cannot.

Run with a Python that has `gguf`, `libggml-python` and numpy:

    ORACLE scripts/goldens/gguf_blocks.py SmolLM2-135M-Instruct.Q4_1.gguf

gguf_blocks.npz: `NAME.raw` and `NAME.values`, blocks of random bytes and of encoded normal numbers with their values.
gguf_encoded.npz: inputs (float16, to be read as float32) and `NAME.INPUT`, the bytes of the types that are encoded in
closed form. Its `meta` holds C's root mean square errors of the others: `rmse[NAME][INPUT]` = [plain, with the weights
`importance` and errors weighted by it], and `odd[NAME]`, plain, row by row.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np

SEED = 20
VALUES = 1024  # of each half: random bytes, and encoded normal numbers
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "NVFP4")
TYPES = ("F32", "F16", "BF16", *BLOCKS)
CLOSED_FORM = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", *SEARCHED)
ROWS, COLUMNS = 16, 512
TENSOR = "token_embd.weight"  # Q8_0 in the file: the one matrix there that is not on a 4-bit grid already
FOLDER = Path(__file__).parents[2] / "tests" / "goldens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="the demo model, for a real weight")
    arguments = parser.parse_args()
    ggml = load_ggml()
    origin = {
        "oracle": "gguf-py gguf.quants",
        "gguf": importlib.metadata.version("gguf"),
        "C": "libggml-python ggml_quantize_chunk",
        "libggml-python": importlib.metadata.version("libggml-python"),
        "numpy": np.__version__,
    }
    record_blocks(ggml, origin)
    record_encoded(ggml, origin, arguments.gguf)


def record_blocks(ggml: ctypes.CDLL, origin: dict[str, str]) -> None:
    rng = np.random.default_rng(SEED)
    normal = rng.standard_normal(VALUES, dtype=np.float32)
    arrays: dict[str, np.ndarray] = {"normal": normal}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        random = rng.integers(0, 256, VALUES // elements * nbytes, dtype=np.uint8)
        raw = np.concatenate([random, encode(ggml, name, normal[None]).reshape(-1)])
        values = dequantize(kind, raw.reshape(-1, nbytes)).reshape(-1)
        check_against_c(ggml, name, raw, values)
        arrays[f"{name}.raw"], arrays[f"{name}.values"] = raw, values
    config = {"seed": SEED, "values": VALUES, "halves": ["random bytes", "normal numbers, encoded"]}
    save("gguf_blocks.npz", arrays | {"origin": np.array(json.dumps(origin | {"config": config}))})


def record_encoded(ggml: ctypes.CDLL, origin: dict[str, str], model: Path) -> None:
    rng = np.random.default_rng(SEED)
    tensor = next(each for each in gguf.GGUFReader(model).tensors if each.name == TENSOR)
    real = dequantize(tensor.tensor_type, tensor.data)[1000 : 1000 + ROWS, :COLUMNS]
    inputs = {
        "gaussian": rng.standard_normal((ROWS, COLUMNS)),
        "laplace": rng.laplace(size=(ROWS, COLUMNS)),
        "real": real,
        "odd": odd_rows(rng),
    }
    inputs = {name: np.asarray(values, np.float16) for name, values in inputs.items()}
    importance = np.exp(1.5 * rng.standard_normal(COLUMNS)).astype(np.float32)
    arrays: dict[str, np.ndarray] = {**inputs, "importance": importance}
    for name in CLOSED_FORM:
        for key, values in inputs.items():
            arrays[f"{name}.{key}"] = encode_both(ggml, name, values.astype(np.float32))
    plain = np.ones_like(importance)
    rmse = {
        name: {
            key: [
                error(ggml, name, values.astype(np.float32), None, plain),
                error(ggml, name, values.astype(np.float32), importance, importance),
            ]
            for key, values in inputs.items()
            if key != "odd"
        }
        for name in WEIGHTED
    }
    x = inputs["odd"].astype(np.float32)
    odd = {name: [error(ggml, name, row[None], None, plain) for row in x] for name in SEARCHED}
    config = {"seed": SEED, "rows": ROWS, "columns": COLUMNS, "real": f"{model.name}: {TENSOR}[1000:{1000 + ROWS}]"}
    meta = origin | {"config": config, "rmse": rmse, "odd": odd}
    save("gguf_encoded.npz", arrays | {"meta": np.array(json.dumps(meta))})


def odd_rows(rng: np.random.Generator) -> np.ndarray:
    """Zeros, constants, equal peaks of either sign, tiny numbers, offsets, a few large ones, steps, sparse rows."""
    normal = rng.standard_normal((ROWS, COLUMNS))
    normal[0] = 0
    normal[1], normal[2] = 0.7, -0.7
    normal[3] = np.where(np.arange(COLUMNS) % 7 == 3, -1, 1) * np.where(np.arange(COLUMNS) % 5 == 0, 2.0, 0.3)
    normal[4] = -normal[3]
    normal[5] *= 1e-6
    normal[6] += 10
    normal[7] -= 10
    normal[8] *= np.where(rng.random(COLUMNS) < 0.02, 100, 1)
    normal[9] = np.arange(COLUMNS) % 33 / 2 - 8
    normal[10, 64:] = 0
    normal[11] = np.abs(normal[11])
    normal[12] **= 3
    normal[13] = np.where(rng.random(COLUMNS) < 0.1, normal[13], 0)
    normal[14] = rng.uniform(-1, 1, COLUMNS)
    normal[15] = np.rint(4 * normal[15]) / 4
    return normal


def encode_both(ggml: ctypes.CDLL, name: str, values: np.ndarray) -> np.ndarray:
    """By gguf-py where it can, and C agrees with it; else by C."""
    raw = encode(ggml, name, values)
    if name != "NVFP4":
        np.testing.assert_array_equal(gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]), raw, err_msg=name)
    return raw


def error(
    ggml: ctypes.CDLL, name: str, values: np.ndarray, importance: np.ndarray | None, weights: np.ndarray
) -> float:
    """Root of the mean of C's squared errors, columns weighted."""
    back = dequantize(gguf.GGMLQuantizationType[name], encode(ggml, name, values, importance))
    squared = (back.astype(np.float64) - values) ** 2
    return float(np.sqrt(np.average(squared, weights=np.broadcast_to(weights, squared.shape))))


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(FOLDER / name, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size:,} bytes")


def dequantize(kind: gguf.GGMLQuantizationType, blocks: np.ndarray) -> np.ndarray:
    if kind.name in ("F32", "F16"):  # gguf-py stores these as arrays and has nothing to decode
        return blocks.view({"F32": "<f4", "F16": "<f2"}[kind.name]).astype(np.float32)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, kind)


def load_ggml() -> ctypes.CDLL:
    """The C library inside the wheel, wherever it lies."""
    files = importlib.metadata.files("libggml-python") or []
    path = next(file.locate() for file in files if file.name == "libggml-base.so")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return ggml


def encode(ggml: ctypes.CDLL, name: str, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """C's bytes of the rows of `values`."""
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    values, (rows, columns) = np.ascontiguousarray(values), values.shape
    raw = np.zeros((rows, columns // elements * nbytes), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = ggml.ggml_quantize_chunk(kind.value, values.ctypes.data, raw.ctypes.data, 0, rows, columns, weights)
    assert written == raw.size, (kind, written, raw.size)
    return raw


def check_against_c(ggml: ctypes.CDLL, name: str, raw: np.ndarray, values: np.ndarray) -> None:
    """C decodes to the same bits; a NaN may be another NaN."""
    if name in ("F32", "F16", "BF16"):
        return
    row = getattr(ggml, f"dequantize_row_{name.lower().replace('_k', '_K')}")
    row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    row.restype = None
    theirs = np.empty_like(values)
    row(raw.ctypes.data, theirs.ctypes.data, values.size)
    np.testing.assert_array_equal(theirs, values, err_msg=name)


if __name__ == "__main__":
    main()
