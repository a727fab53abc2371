"""Writers of tiny GGUF and safetensors files from struct and json alone, so that the readers meet another hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

GGUF_FORMATS = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: str, value: Any) -> bytes:
    """The type and the value; "[u8]" is an array of u8."""
    if kind == "str":
        return struct.pack("<I", 8) + _string(value)
    if not kind.startswith("["):
        number, form = GGUF_FORMATS[kind]
        return struct.pack("<I", number) + struct.pack(form, value)
    if kind == "[str]":
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    number, form = GGUF_FORMATS[kind[1:-1]]
    return struct.pack("<IIQ", 9, number, len(value)) + b"".join(struct.pack(form, item) for item in value)


def write_gguf(
    fields: Iterable[tuple[str, str, Any]] = (),
    tensors: Sequence[tuple[str, Sequence[int], int, bytes]] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF file. Fields are (name, kind, value); tensors (name, axes innermost first, ggml id, bytes)."""
    fields = list(fields)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    head += b"".join(_string(name) + _value(kind, value) for name, kind, value in fields)
    offset, body = 0, b""
    for name, axes, ggml_id, raw in tensors:
        head += _string(name) + struct.pack("<I", len(axes)) + struct.pack(f"<{len(axes)}Q", *axes)
        head += struct.pack("<IQ", ggml_id, offset)
        body += raw + b"\0" * (-len(raw) % alignment)
        offset = len(body)
    return head + b"\0" * (-len(head) % alignment) + body


def write_safetensors_bytes(
    entries: Sequence[tuple[str, str, Sequence[int], bytes]], metadata: dict[str, str] | None = None
) -> bytes:
    """A safetensors file. Entries are (name, dtype, shape, bytes)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, dtype, shape, raw in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return raw_safetensors(json.dumps(header).encode(), body)


def raw_safetensors(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.fixture
def gguf_bytes() -> Callable[..., bytes]:
    return write_gguf


@pytest.fixture
def safetensors_bytes() -> Callable[..., bytes]:
    return write_safetensors_bytes


@pytest.fixture
def headed() -> Callable[..., bytes]:
    """A safetensors file from the bytes of its header and its buffer."""
    return raw_safetensors


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes bytes under a fresh name, since a file must not change under its mapping."""
    count = iter(range(1_000_000))

    def write(raw: bytes, suffix: str = "") -> Path:
        path = tmp_path / f"{next(count)}{suffix}"
        path.write_bytes(raw)
        return path

    return write


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The GGUF of the demo model; tests that ask for it are marked slow."""
    from jquant.io.locate import locate_model

    return locate_model("demo")
