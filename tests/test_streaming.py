"""A model is quantized in the memory of a few of its blocks, however many it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jquant.io.native import open_native
from tests.processes import ROOT
from tests.streaming import WINDOW, WINDOWS, block_bytes, write_deep

HIDDEN = 1024
BLOCK = block_bytes(HIDDEN)  # 67 MB
WORKSPACE = 6 * 4 * HIDDEN * 4 * HIDDEN  # of solving the widest matrix, as the preflight has it: 101 MB
RUNTIME = 250_000_000  # stacks and arenas of threads, compiled programs

pytestmark = pytest.mark.slow  # on Linux: memory is read from /proc


def _quantized(
    folder: Path, layers: int, hidden: int, room: int, method: str = "rtn", *, compiled: Path | None = None
) -> dict[str, int]:
    """`compiled`: a folder of programs, which a run before this one has made."""
    write_deep(folder / "model", layers, hidden)
    # Freed memory goes back to the system at once: what is measured is what is in use.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": str(ROOT)}
    if compiled is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    words = [sys.executable, "-m", "tests.streaming", str(folder / "model"), str(folder / "out"), str(room), method]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Two blocks, the workspace of one layer and the runtime; at 12 blocks less than the weights in floats take."""
    room = 2 * BLOCK + WORKSPACE + RUNTIME
    small = tmp_path / "small"
    small.mkdir()
    base = _quantized(small, 2, 64, room)["most"]  # of the runtime: a model that weighs nothing
    peaks = []
    for layers in (3, 6, 12):
        folder = tmp_path / str(layers)
        folder.mkdir()
        found = _quantized(folder, layers, HIDDEN, room)
        peaks.append(found["most"] - base)
        parts = {path.name for path in (folder / "out" / "arrays").iterdir()}
        assert parts == {"outer", *(f"block-{index:04d}" for index in range(layers))}
        assert len(open_native(folder / "out").names) == 9 * layers + 2
        if layers == 12:
            assert found["whole"] is None  # the limit holds: all weights at once find no room
    print(f"peaks beyond the runtime's {base / 1e6:.0f} MB: {[f'{peak / 1e6:.0f} MB' for peak in peaks]}")
    assert max(peaks) < 2 * BLOCK + WORKSPACE
    assert peaks[-1] < peaks[0] + BLOCK / 2


def test_nor_does_that_of_a_method_that_learns_from_data(tmp_path: Path) -> None:
    """GPTQ: two blocks and the activations, beyond what the runtime and the programs take; at 6 blocks as at 2.

    The widest layer's Gram matrix weighs a block. Its factor is made in the same memory, when of the block's weights a
    quarter and what is packed are left; the solution takes 0.4 of a block more. Runtime and programs are those
    of half the width, whose programs are as many and as long. Compiling them takes 100 MB for a while, in the first
    block: here that was done before.
    """
    peaks: dict[tuple[int, int], int] = {}
    for run, (layers, hidden) in enumerate([(2, HIDDEN // 2), (2, HIDDEN // 2), (2, HIDDEN), (2, HIDDEN), (6, HIDDEN)]):
        folder = tmp_path / str(run)
        folder.mkdir()
        found = _quantized(folder, layers, hidden, 10**10, "gptq", compiled=tmp_path / "compiled")
        peaks[layers, hidden] = found["most"]  # the second of equal runs finds its programs
    print(f"peaks by layers and width: { {key: f'{peak / 1e6:.0f} MB' for key, peak in peaks.items()} }")
    activations = 4 * WINDOWS * WINDOW * 8 * HIDDEN  # what enters a block, and each of its groups of layers
    for layers in (2, 6):
        grown = peaks[layers, HIDDEN] - peaks[2, HIDDEN // 2]
        assert grown < 2 * (BLOCK - block_bytes(HIDDEN // 2)) + activations / 2
    assert peaks[6, HIDDEN] < peaks[2, HIDDEN] + BLOCK / 4  # of four more
