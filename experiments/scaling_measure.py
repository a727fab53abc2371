"""One measurement of experiments/scaling.py, in a process of its own: `python -m experiments.scaling_measure JSON`.

Seconds are the least of several runs of a compiled stage (of training steps their mean): of wall time, and of processor
time, all threads together, which other processes on the machine disturb less. Memory is the largest resident set of a
compiled run, beside what the process held once JAX had started. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from experiments.scaling_theory import WINDOW
from jquant.data.blocks import Windows, text_windows
from jquant.data.text import load_text
from jquant.evaluation.perplexity import perplexity
from jquant.io.tokenizer import Tokenizer
from jquant.models.checkpoint import open_checkpoint
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.models.save import save
from jquant.ptq.recipe import one_rule
from jquant.qat.batches import RowBatches
from jquant.qat.config import QATConfig
from jquant.qat.losses import next_token_loss
from jquant.qat.prepare import prepare
from jquant.qat.rules import one_rule as qat_rule
from jquant.qat.trainer import train
from jquant.quantization_run import quantize_checkpoint
from jquant.sweep.config import SweepConfig
from jquant.sweep.run import run_sweep

SCHEMES = ("int4:g64", "int8:g64", "int3:g64", "int4:g32", "nf4:g64", "int8:channel", "mxfp4", "nvfp4")
_ENOUGH = 2.0  # seconds of runs after which no further one is made
_RUNS = 4  # at most


def config(layers: int, width: int) -> ModelConfig:
    """A Llama over bytes: heads of 64, an MLP three times as wide."""
    return ModelConfig(
        architecture="llama",
        vocab_size=257,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        norm_eps=1e-5,
        max_length=WINDOW,
    )


def write_model(layers: int, width: int, path: Path) -> None:
    """Random weights and a tokenizer of bytes, as a checkpoint."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "<end>"])}
    backend = tokenizers.Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = Tokenizer(backend=backend, bos_id=None, eos_ids=(256,), add_bos=False)
    save(Decoder(config(layers, width), rngs=nnx.Rngs(0)), path, tokenizer=tokenizer, note="random weights")


def main() -> None:
    asked = json.loads(sys.argv[1])
    if asked["stage"] == "device":
        print(json.dumps(_device()))
        return
    if asked["stage"] == "model":
        write_model(asked["layers"], asked["width"], Path(asked["model"]))
        print("{}")
        return
    jnp.zeros(1).block_until_ready()
    meter = _Meter()
    with tempfile.TemporaryDirectory(dir=Path(asked["model"]).parent) as folder:
        _STAGES[asked["stage"]](meter, asked["model"], asked["tokens"], asked["cells"], Path(folder))
    # A step of training is told of while the next one runs: where one ends is known of all together only.
    print(json.dumps(meter.found(statistics.mean if asked["stage"] == "QAT" else min)))


class _Meter:
    """Seconds of laps, and the largest resident set from the second on."""

    def __init__(self) -> None:
        self._base = _resident("VmRSS")
        self._wall: list[float] = []
        self._processor: list[float] = []
        self.start()

    def start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def lap(self) -> None:
        self._wall.append(time.perf_counter() - self._started[0])
        self._processor.append(time.process_time() - self._started[1])
        if len(self._wall) == 1:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compiling has left
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        self.start()

    def time(self, run: Callable[[int], object]) -> None:
        """Runs it, with the number of the run, until it has been timed well."""
        while len(self._wall) < 3 or (len(self._wall) <= _RUNS and sum(self._wall[1:]) < _ENOUGH):
            self.start()
            run(len(self._wall))
            self.lap()

    def found(self, least: Callable[[list[float]], float] = min) -> dict[str, float]:
        memory = _resident("VmHWM") - self._base
        return {"seconds": least(self._processor[1:]), "wall": least(self._wall[1:]), "bytes": memory}


def _device() -> dict[str, float]:
    """Operations and bytes a second of processor time: a product of matrices, and an array that is summed."""
    side, count = 1024, 1 << 26
    square, line = jnp.ones((side, side)), jnp.ones(count)
    product, total = jax.jit(lambda x: x @ x), jax.jit(jnp.sum)

    def least(run: Callable[[], jax.Array]) -> float:
        seconds = []
        for _ in range(12):
            started = time.process_time()
            jax.block_until_ready(run())
            seconds.append(time.process_time() - started)
        return min(seconds)

    return {
        "rate": 2 * side**3 / least(lambda: product(square)),
        "bandwidth": 4 * count / least(lambda: total(line)),
    }


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _texts(model: str, tokens: int, name: str = "pydoc") -> Windows:
    tokenizer = open_checkpoint(model).tokenizer()
    return text_windows(load_text(name), tokenizer, window=WINDOW, limit=tokens // WINDOW)


def _quantize(meter: _Meter, model: str, tokens: int, cells: int, folder: Path) -> None:
    """GPTQ to int4:g64, block by block from the checkpoint to a new one."""
    checkpoint, texts = open_checkpoint(model), _texts(model, tokens, "pydoc:calibration")
    recipe = one_rule("gptq", SCHEMES[0])
    meter.time(lambda run: quantize_checkpoint(checkpoint, recipe, folder / str(run), calibration=texts))


def _evaluation(meter: _Meter, model: str, tokens: int, cells: int, folder: Path) -> None:
    """Perplexity of the float model."""
    loaded, texts = open_checkpoint(model).model(), _texts(model, tokens)
    meter.time(lambda run: perplexity(loaded, texts))


def _sweep(meter: _Meter, model: str, tokens: int, cells: int, folder: Path) -> None:
    """Rounding to so many schemes, each evaluated against the float model."""
    schemes, windows = SCHEMES[:cells], tokens // WINDOW
    meter.time(
        lambda run: run_sweep(
            SweepConfig(
                model=model, schemes=schemes, out=folder / str(run), window=WINDOW, windows=windows, report=False
            )
        )
    )


def _qat(meter: _Meter, model: str, tokens: int, cells: int, folder: Path) -> None:
    """A step of AdamW on int4:g64, all weights trained."""
    loaded, batch = open_checkpoint(model).model(), tokens // WINDOW
    prepare(loaded, qat_rule(SCHEMES[0]))
    rows = RowBatches(_texts(model, 4 * tokens).tokens, batch=batch, seed=0)
    train(loaded, next_token_loss(), rows, QATConfig(steps=2 + _RUNS, batch=batch), listen=lambda _: meter.lap())


_STAGES: dict[str, Any] = {"quantize": _quantize, "evaluation": _evaluation, "sweep": _sweep, "QAT": _qat}

if __name__ == "__main__":
    main()
