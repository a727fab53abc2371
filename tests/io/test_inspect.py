"""What inspect says about a file is what was written into it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jquant.core.errors import InputError
from jquant.io.hf_directory import INDEX
from jquant.io.inspect import Inspection, inspect_file, render
from jquant.io.safetensors import write_safetensors


def _gguf(folder: Path, gguf_bytes: Callable[..., bytes]) -> Path:
    tensors = [
        ("blk.0.w", (32, 4), 8, bytes(4 * 34)),
        ("blk.1.w", (32, 4), 8, bytes(4 * 34)),
        ("norm[bold]", (32,), 0, bytes(128)),
        ("odd", (256,), 99, bytes(32)),
    ]
    (folder / "x").write_bytes(gguf_bytes([("general.architecture", "str", "llama")], tensors))
    return folder / "x"


def _shards(folder: Path, _: Callable[..., bytes]) -> Path:
    write_safetensors(folder / "1", {"a": np.zeros((4, 8), np.float16)})
    write_safetensors(folder / "2", {"b": np.zeros(16, np.int8), "c": np.zeros((0, 3), np.float32)})
    (folder / INDEX).write_text('{"weight_map": {"a": "1", "b": "2", "c": "2"}}')
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return folder


def _single(folder: Path, _: Callable[..., bytes]) -> Path:
    write_safetensors(folder / "x", {"a": np.zeros((4, 8), np.float32)})
    return folder / "x"


CASES = {
    "gguf": (_gguf, "GGUF version 3", "llama", 544, 2 * 136 + 128 + 32, {"Q8_0": 8.5, "F32": 32, "ggml type 99": 1}),
    "shards": (_shards, "Hugging Face folder", "LlamaForCausalLM", 48, 64 + 16, {"F16": 16, "I8": 8, "F32": 0}),
    "single": (_single, "safetensors", None, 32, 128, {"F32": 32}),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path, gguf_bytes):
    make, *expected = CASES[request.param]
    return inspect_file(make(tmp_path, gguf_bytes)), expected


def test_counts(case):
    inspection, (form, architecture, parameters, tensor_bytes, bits) = case
    assert inspection.format == form
    assert inspection.architecture == architecture
    assert inspection.parameters == parameters == sum(total.parameters for total in inspection.types)
    assert inspection.tensor_bytes == tensor_bytes == sum(total.bytes for total in inspection.types)
    assert inspection.bits_per_weight == pytest.approx(8 * tensor_bytes / parameters)
    assert {total.type: total.bits_per_weight for total in inspection.types} == bits
    assert len(inspection.tensors) == sum(total.tensors for total in inspection.types)
    assert tensor_bytes < inspection.file_bytes < tensor_bytes + 1500
    path = Path(inspection.path)
    assert path.is_dir() or inspection.file_bytes == path.stat().st_size


def test_as_json_is_plain(case):
    inspection, _ = case
    record = json.loads(json.dumps(inspection.as_json()))
    assert record["parameters"] == inspection.parameters
    assert [tensor["name"] for tensor in record["tensors"]] == [tensor.name for tensor in inspection.tensors]


def _text(inspection: Inspection) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(inspection))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_render_folds_blocks_and_shows_names_as_they_are(tmp_path, gguf_bytes):
    lines = _text(inspect_file(_gguf(tmp_path, gguf_bytes))).splitlines()
    (block,) = [line for line in lines if "blk" in line]
    assert block.split() == ["blk.*.w", "2", "4", "×", "32", "Q8_0", "272", "8.500"]
    assert any(line.startswith("norm[bold] ") for line in lines)
    assert any(line.split() == ["Q8_0", "2", "256", "272", "8.500"] for line in lines)


def test_the_suffix_decides_where_the_content_does_not(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no GGUF file"):
        inspect_file(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="is no safetensors file"):
        inspect_file(tmp_path / "x")
    with pytest.raises(InputError, match="cannot be read"):
        inspect_file(tmp_path / "none")


@pytest.mark.slow
def test_the_demo(demo_gguf):
    inspection = inspect_file(demo_gguf)
    assert inspection.architecture == "llama"
    assert inspection.parameters == 134_515_008
    assert {total.type: total.tensors for total in inspection.types} == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert inspection.bits_per_weight == pytest.approx(5.74, abs=0.01)
    assert len(_text(inspection).splitlines()) < 40
