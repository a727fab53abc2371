"""Tiny checkpoints: the recorded ones, and copies of them that tests may damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jquant.io.hf_directory import SINGLE
from jquant.io.safetensors import open_safetensors, write_safetensors

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def altered(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a recorded checkpoint with other config fields and tensors; None takes one away."""

    def make(
        name: str = "llama_b", config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray | None] | None = None
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        fields = json.loads((GOLDENS / name / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
        file = open_safetensors(GOLDENS / name / SINGLE)
        arrays = {tensor: file.read(tensor) for tensor in file.tensors} | (tensors or {})
        write_safetensors(folder / SINGLE, {k: v for k, v in arrays.items() if v is not None})
        return folder

    return make
