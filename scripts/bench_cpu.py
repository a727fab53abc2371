"""Times jquant on CPU beside its peers, in one run, and prints each figure with its ratio and bar.

    .venv/bin/python scripts/bench_cpu.py --peers PEER_PYTHON [--qwix QWIX_PYTHON] [--compressor COMPRESSOR_PYTHON]

PEER_PYTHON, QWIX_PYTHON and COMPRESSOR_PYTHON are the environments that scripts/bench_cpu_peers.py describes; without
them our own figures are printed alone. Works of one thread are pinned to one core. Medians; the machine's noise is in
the minima beside them. Takes about three minutes on 2 cores, and twelve more with COMPRESSOR_PYTHON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

SIZE = 4096
Row = dict[str, Any]
Products = Literal["float32", "bfloat16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", type=Path, help="a Python with torch, bitsandbytes, transformers, gguf, libggml-python"
    )
    parser.add_argument("--qwix", type=Path, help="a Python with qwix")
    parser.add_argument("--compressor", type=Path, help="a Python with llmcompressor, transformers, gguf, datasets")
    parser.add_argument("--only", choices=("quantize", "gptq"), help="a part of the table")
    parser.add_argument("--core", type=int, default=0, help="the core of works that take one thread")
    parser.add_argument("--own", choices=WORKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own:
        print(json.dumps(WORKS[arguments.own]()))
        return
    peers = Path(__file__).with_name("bench_cpu_peers.py")
    gguf = _demo()
    theirs: dict[str, Row] = {}

    def ours(work: str, *, pinned: bool) -> Row:
        return _lines([sys.executable, __file__, "--own", work], arguments.core if pinned else None)[-1]

    def peer(python: Path | None, *words: str) -> None:
        if python is not None:
            rows = _lines([str(python), str(peers), *words, "--core", str(arguments.core)], None)
            theirs.update({row["work"]: row for row in rows})

    table: list[str] = []
    if arguments.only != "quantize":
        peer(arguments.compressor, "gptq-solve", "gptq-model", "--gguf", str(gguf))
        peer(arguments.compressor, "gptq-model-bfloat16", "--gguf", str(gguf))
        solves = ours("gptq-solve", pinned=False)
        models = {name: ours(work, pinned=False) for name, work in _FIRST_RUNS.items()}
        with tempfile.TemporaryDirectory() as folder:
            os.environ["JQUANT_PROGRAMS"] = folder
            for name, works in _LATER_RUNS.items():
                models[name] = [ours(work, pinned=False) for work in works][-1]
            del os.environ["JQUANT_PROGRAMS"]
        table += _gptq_rows(solves, models, theirs)
        row = ours("gptq-six", pinned=False)
        table.append(f"six GPTQ schemes: {row['ratio']:.2f} × one ({row['one']:.1f} s); bar ≤ 2.5")
    if arguments.only == "gptq":
        print("\n".join(table))
        return
    peer(arguments.peers, "int4", "int4-packed")
    peer(arguments.qwix, "qwix")
    row = ours("int4", pinned=True)
    table.append(_against("int4 g128 quantize + pack, one core", row, theirs.get("int4"), "≤", 1.5, "of torch.compile"))
    table.append(_against("  the same", row, theirs.get("int4-packed"), "≤", None, "of torch.compile with packing"))
    table.append(_against("  the same", row, theirs.get("qwix"), "≥", 8.0, "× faster than qwix"))
    peer(arguments.peers, "nf4")
    row = ours("nf4", pinned=False)
    table.append(_against("nf4 g64 quantize + pack", row, theirs.get("nf4"), "≥", 10.0, "× faster than bitsandbytes"))
    peer(arguments.peers, "gguf-encode", "ggml-encode", "gguf-decode")
    row = ours("q4_0", pinned=True)
    table.append(_against("q4_0 encode, one core", row, theirs.get("gguf-encode"), "≥", 3.0, "× faster than gguf-py"))
    row = ours("q4_k", pinned=True)
    table.append(_against("q4_k encode, one core", row, theirs.get("ggml-encode"), "≥", 1.0, "× faster than C ggml"))
    for name, each in ours("decode", pinned=True).items():
        title, peer_row = f"{name} decode from a file, one core", theirs.get(f"gguf-decode-{name}")
        table.append(_against(title, each, peer_row, "≥", 3.0, "× faster than gguf-py"))
    peer(arguments.peers, "smollm2", "--gguf", str(gguf))
    row = ours("smollm2", pinned=False)
    table.append(_against("SmolLM2 perplexity", row, theirs.get("smollm2"), "≥", 2.0, "× transformers' tokens/s"))
    row = ours("load", pinned=False)
    table.append(_against("load the GGUF", row, theirs.get("smollm2-load"), "≤", None, "of transformers"))
    table[-1] += f"   bar ≤ 1.5 s: {row['milliseconds'] / 1e3:.2f} s"
    row = ours("sweep", pinned=False)
    table.append(
        f"sweep of {row['cells']} cells: {row['seconds']:.1f} s less {row['compiling']:.1f} s of compiling = "
        f"{row['ratio']:.3f} × {row['cells']} × one evaluation ({row['evaluation']:.2f} s); bar ≤ 1.15"
    )
    print("\n".join(table))


def _against(title: str, ours: Row, theirs: Row | None, sign: str, bar: float | None, what: str) -> str:
    """One line: our figure, theirs, the ratio in the direction of the bar."""
    speed = "tokens_per_second" in ours
    unit = "tokens/s" if speed else "ms"
    key = "tokens_per_second" if speed else "milliseconds"
    text = f"{title:40} {ours[key]:9.1f} {unit}"
    if theirs is None:
        return f"{text}   (no peer given: {what})"
    ratio = ours[key] / theirs[key] if sign == "≤" or speed else theirs[key] / ours[key]
    text += f"   {theirs['peer']} {theirs['version']}: {theirs[key]:.1f}   {ratio:.2f} {what}"
    if bar is None:
        return text
    met = ratio <= bar if sign == "≤" else ratio >= bar
    return f"{text}   bar {sign} {bar:.3g}: {'met' if met else 'MISSED'}"


def _gptq_rows(solves: dict[str, Row], models: dict[str, Row], theirs: dict[str, Row]) -> list[str]:
    rows = []
    for name, row in solves.items():
        title = f"GPTQ 2048² int4 g128, {name}"
        rows.append(_against(title, row, theirs.get("gptq-solve"), "≤", 0.5, "of llm-compressor"))
    for name, row in models.items():
        title = f"GPTQ of SmolLM2, {name}"
        rows.append(_against(title, row, theirs.get("gptq-model"), "≤", 1 / 3, "of llm-compressor"))
        if "bf16" in name:
            beside = "  the same, and their model in bfloat16"
            rows.append(_against(beside, row, theirs.get("gptq-model-bfloat16"), "≤", None, "of llm-compressor"))
    return rows


_GPTQ = {"plain": {"act_order": "none", "range": "minmax"}, "default": {}}


def _gptq_solve() -> dict[str, Row]:
    """One matrix: factor, scales, columns and packing, from a Gram matrix."""
    import jax
    import numpy as np

    import jquant
    from jquant.calib import gram
    from jquant.ptq import gptq

    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, 2048), dtype=np.float32) * np.exp(rng.standard_normal(2048, dtype=np.float32))
    found = gram.finalize(gram.update(gram.init(2048), jax.device_put(x)))
    weight = jax.device_put(rng.standard_normal((2048, 2048), dtype=np.float32))
    scheme = jquant.scheme("int4:g128")
    rows = {}
    for name, options in _GPTQ.items():
        config: Any = gptq.GPTQConfig(**options)
        rows[name] = _time(
            lambda config=config: jax.block_until_ready(gptq.solve(weight, found, scheme, config=config)), 15
        )
    return rows


# Rows of the whole model, to int4 g64 with 32 windows of 512 tokens: each in a process of its own, as users run it, and
# not in what another row has left behind. llm-compressor's is plain GPTQ: no order, ranges from least to largest.
_FIRST_RUNS = {"plain": "gptq-plain", "default": "gptq-default", "bf16 products": "gptq-bfloat16"}
_LATER_RUNS = {
    "default, a later run": ("gptq-default-block", "gptq-default-kept"),
    "bf16 products, a later run": ("gptq-bfloat16-block", "gptq-bfloat16-kept"),
    "plain, bf16, by two windows, later": ("gptq-plain-bfloat16-block", "gptq-plain-bfloat16-kept"),
}


def _gptq_kept(name: str, products: Products, *, blocks: int | None = None, batch: int = 1) -> Row:
    """A run in a process that finds the programs of an earlier one, as the command line does; those of one block are
    all of a model's."""
    from jquant import programs

    programs.keep()
    return _whole_model(name, products, blocks=blocks, batch=batch)


def _whole_model(name: str, products: Products, *, blocks: int | None = None, batch: int = 1) -> Row:
    import numpy as np
    from flax import nnx

    import jquant

    tokens = np.random.default_rng(0).integers(0, 49_152, (32 // batch, batch, 512)).astype(np.int32)
    step = jquant.Step("gptq", tuple(_GPTQ[name].items()))
    recipe = jquant.Recipe(rules=(jquant.Rule(layers=(r"^blocks\.",), scheme="int4:g64", method=step),))
    model = jquant.load_model("demo")
    model.blocks = nnx.List(list(model.blocks)[:blocks])
    start = time.perf_counter()
    jquant.quantize_model(model, recipe, list(tokens), products=products)
    return {"milliseconds": (time.perf_counter() - start) * 1e3}


def _gptq_six() -> Row:
    """What a sweep spends on quantizing with one GPTQ scheme, statistics included, and with six."""
    import jquant
    from jquant.sweep.work import Event

    schemes = ("int4:g64", "int4:g32", "int3:g64", "int4:g64:asym", "int3:g64:asym", "int2:g32:asym")
    seconds: list[float] = []
    gathering = 0.0

    def listen(event: Event) -> None:
        nonlocal gathering
        gathering = event.seconds or gathering

    for chosen in (schemes[:1], schemes):
        with tempfile.TemporaryDirectory() as folder:
            config = jquant.SweepConfig(
                model="demo", schemes=chosen, methods=("gptq",), out=Path(folder), windows=1, report=False
            )
            sweep = jquant.run_sweep(config, listen)
        seconds.append(gathering + sum(cell.seconds_quantize for cell in sweep.cells))
    return {"one": seconds[0], "six": seconds[1], "ratio": seconds[1] / seconds[0]}


def _int4() -> Row:
    return _quantize("int4:g128")


def _nf4() -> Row:
    return _quantize("nf4:g64")


def _q4_0() -> Row:
    return _quantize("q4_0")


def _q4_k() -> Row:
    return _quantize("q4_k", reps=8)


def _decode() -> Row:
    """Random bytes of each block type of a GGUF to a fresh 4096² float32 array, as a checkpoint is read."""
    import numpy as np

    from jquant.core.formats import GGML_BLOCKS
    from jquant.io.ggml_blocks import BY_NAME, decode

    rows = {}
    for block in GGML_BLOCKS.values():
        row = BY_NAME[block.name.removeprefix("ggml_").upper()]
        raw = np.random.default_rng(0).integers(0, 256, SIZE * SIZE // row.elements * row.nbytes, dtype=np.uint8)
        rows[row.name] = _time(lambda row=row, raw=raw: decode(row, raw), 10)
    return rows


def _quantize(spec: str, reps: int = 60) -> Row:
    """Quantize and pack one 4096² float32 matrix, jitted."""
    import jax
    import numpy as np

    import jquant

    weight = jax.device_put(np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32))
    quantize = jax.jit(jquant.quantize, static_argnames="scheme")
    scheme = jquant.scheme(spec)
    return _time(lambda: jax.block_until_ready(quantize(weight, scheme=scheme)), reps)


def _smollm2() -> Row:
    """Negative log-likelihood of windows of 512 tokens, batch 1, float32."""
    import numpy as np

    import jquant
    from jquant.data.blocks import windows

    model = jquant.load_model("demo")
    tokens = np.random.default_rng(0).integers(0, 49_152, 8 * 512)
    one, all_eight = windows(tokens[:512], window=512), windows(tokens, window=512)
    jquant.evaluate(model, one)
    seconds = []
    for index in range(8):
        window = windows(all_eight.tokens[index], window=512)
        start = time.perf_counter()
        jquant.evaluate(model, window)
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": 512 / statistics.median(seconds), "best": 512 / min(seconds)}


def _load() -> Row:
    """From the file to a model ready to run, in a fresh process, imports done."""
    import jax
    from flax import nnx

    import jquant

    load = jquant.load_model  # imports
    start = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(nnx.state(load("demo"))))
    return {"milliseconds": (time.perf_counter() - start) * 1e3}


def _sweep() -> Row:
    """A sweep of eight cells against eight warm evaluations with KL and top-1."""
    import jax

    import jquant
    from jquant.sweep.work import Event

    compiling = 0.0

    def on_duration(event: str, duration_secs: float, **kwargs: Any) -> None:
        nonlocal compiling
        if event.startswith("/jax/core/compile/"):
            compiling += duration_secs

    marks: dict[str, float] = {}

    def listen(event: Event) -> None:
        if event.stage not in ("load", "reference", "outputs"):
            marks.setdefault("first", time.perf_counter())
            marks["last"] = time.perf_counter()
            if "compiled" not in marks:
                marks["compiled"] = compiling

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    schemes = ("int8:channel", "int4:g128", "int4:g64", "int4:g32:asym", "nf4:g64", "mxfp4", "nvfp4", "fp8_e4m3")
    with tempfile.TemporaryDirectory() as folder:
        config = jquant.SweepConfig(model="demo", schemes=schemes, out=Path(folder), windows=4, report=False)
        jquant.run_sweep(config, listen)
    checkpoint = jquant.open_checkpoint("demo")
    windows = jquant.text_windows(jquant.load_text("pydoc"), checkpoint.tokenizer(), window=512, limit=4)
    model = checkpoint.model()
    reference, _ = jquant.prepare_reference(model, windows)
    evaluation = _time(lambda: jquant.evaluate(model, windows, reference=reference), 5)["milliseconds"] / 1e3
    seconds = marks["last"] - marks["first"]
    spent = seconds - (compiling - marks["compiled"])
    return {
        "cells": len(schemes),
        "seconds": seconds,
        "compiling": compiling - marks["compiled"],
        "evaluation": evaluation,
        "ratio": spent / (len(schemes) * evaluation),
    }


WORKS: dict[str, Callable[[], Any]] = {
    "int4": _int4,
    "nf4": _nf4,
    "q4_0": _q4_0,
    "q4_k": _q4_k,
    "decode": _decode,
    "gptq-solve": _gptq_solve,
    "gptq-plain": lambda: _whole_model("plain", "float32"),
    "gptq-default": lambda: _whole_model("default", "float32"),
    "gptq-bfloat16": lambda: _whole_model("default", "bfloat16"),
    "gptq-default-block": lambda: _gptq_kept("default", "float32", blocks=1),
    "gptq-default-kept": lambda: _gptq_kept("default", "float32"),
    "gptq-bfloat16-block": lambda: _gptq_kept("default", "bfloat16", blocks=1),
    "gptq-bfloat16-kept": lambda: _gptq_kept("default", "bfloat16"),
    "gptq-plain-bfloat16-block": lambda: _gptq_kept("plain", "bfloat16", blocks=1, batch=2),
    "gptq-plain-bfloat16-kept": lambda: _gptq_kept("plain", "bfloat16", batch=2),
    "gptq-six": _gptq_six,
    "smollm2": _smollm2,
    "load": _load,
    "sweep": _sweep,
}


def _time(call: Callable[[], Any], reps: int) -> Row:
    call()
    call()
    seconds = []
    for _ in range(reps):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"milliseconds": statistics.median(seconds) * 1e3, "milliseconds_min": min(seconds) * 1e3, "reps": reps}


def _lines(command: list[str], core: int | None) -> list[Row]:
    pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=pin)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def _demo() -> Path:
    from jquant.io.locate import locate_model

    return locate_model("demo")


if __name__ == "__main__":
    main()
