"""Records tests/goldens/gguf_blocks.npz: blocks of every ggml type that jquant decodes, and their values.

Oracles: gguf-py's `dequantize` for the values, and ggml's own C code (libggml-python), which must agree with it bit for
bit and which encodes the realistic half of the blocks.

Run with a Python that has `gguf`, `libggml-python` and numpy:
`python scripts/goldens/gguf_blocks.py`.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np

SEED = 20
VALUES = 1024  # of each half: random bytes, and encoded normal numbers
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K")
TARGET = Path(__file__).parents[2] / "tests" / "goldens" / "gguf_blocks.npz"


def main() -> None:
    rng = np.random.default_rng(SEED)
    ggml = load_ggml()
    normal = rng.standard_normal(VALUES, dtype=np.float32)
    arrays: dict[str, np.ndarray] = {"normal": normal}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        random = rng.integers(0, 256, VALUES // elements * nbytes, dtype=np.uint8)
        raw = np.concatenate([random, encode(ggml, kind, normal, VALUES // elements * nbytes)])
        values = dequantize(kind, raw.reshape(-1, nbytes))
        check_against_c(ggml, name, raw, values)
        arrays[f"{name}.raw"], arrays[f"{name}.values"] = raw, values
    origin = {
        "oracle": "gguf-py gguf.quants.dequantize",
        "gguf": importlib.metadata.version("gguf"),
        "encoder": "libggml-python ggml_quantize_chunk",
        "libggml-python": importlib.metadata.version("libggml-python"),
        "numpy": np.__version__,
        "config": {"seed": SEED, "values": VALUES, "halves": ["random bytes", "normal numbers, encoded"]},
    }
    np.savez_compressed(TARGET, origin=np.array(json.dumps(origin)), **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


def dequantize(kind: gguf.GGMLQuantizationType, blocks: np.ndarray) -> np.ndarray:
    if kind.name in ("F32", "F16"):  # gguf-py stores these as arrays and has nothing to decode
        return blocks.view({"F32": "<f4", "F16": "<f2"}[kind.name]).astype(np.float32).reshape(-1)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, kind).reshape(-1)


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


def encode(ggml: ctypes.CDLL, kind: gguf.GGMLQuantizationType, values: np.ndarray, nbytes: int) -> np.ndarray:
    raw = np.zeros(nbytes, np.uint8)
    written = ggml.ggml_quantize_chunk(kind.value, values.ctypes.data, raw.ctypes.data, 0, 1, values.size, None)
    assert written == nbytes, (kind, written, nbytes)
    return raw


def check_against_c(ggml: ctypes.CDLL, name: str, raw: np.ndarray, values: np.ndarray) -> None:
    """C decodes the K and _0/_1 types to the same bits; a NaN may be another NaN."""
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
