"""Times jquant on one GPU against what the device allows: each figure with its floor, what it is beside, and its bar.

    python scripts/bench_gpu.py                       # everything: the first time some twelve minutes on an H100
    python scripts/bench_gpu.py --only gptq,packed    # some of the works: see WORKS below
    python scripts/bench_gpu.py --small               # tiny sizes, to see on a CPU that it runs

Programs are kept (jquant/programs.py), so a second run compiles little.

Floors: bytes that must be moved over the bandwidth of a copy, operations over the rate of a matrix product, both
measured first. Works are warm unless they say otherwise; one that takes micro- or milliseconds is started many times in
a row, so that the host is not what is measured. Of a training step the floor is the plain one.

One H100 (80 GB HBM3, jax 0.11.2, 2026-11-27; copy 2,665 GB/s, bf16 743, int8 1,442, fp8 1,371 T/s), milliseconds, in
one run in which everything was compiled; the last two, the model of 8B's shape and the crossover, in runs that followed
on the same machine, as the first one was at its limit of 576 s:

    work                                        took    floor     bar   what limits it
    Gram matrix 131072 × 4096                   4.33     5.92     8     (symmetry: 5/8 of the products)
    GPTQ 4096 × 4096, range of the weights      6.1               13    Cholesky 1.6, a column's latency
      … default, range by the output            6.1               13
    GPTQ 4096 in, 14336 out                     9.1               16    rounding 3, Cholesky 1.6 and its order 1.3,
      … default                                 9.2               16    the search of the range 1.1, products .9
    GPTQ 14336 in, 4096 out, and default        51.5 50.6         190   Cholesky 32
    six schemes, 4096 in, 14336 out             33.9              22.0  3.9 × one of 8.8, of another call (bar 2.5):
                                                                        rounding 12, searches of ranges 10, then 0.2 ms
                                                                        slower than now (3.7 of nf4's), products 5,
                                                                        factor 2.9
    fake-quant int4 g128, 8192²                 0.099    0.101    0.108 memory
    W8A8 int8, 8192³                            0.829    0.762    0.897 the product, codes .06
    W8A8 fp8, 8192³                             0.866    0.802    0.944 likewise
    int4 product 8192², batch 1                 .0162    .0133    .0160 2.76 × bf16, 2.70 to 2.84 over runs (bar 2.8):
                                                                        bytes, 2 of 36 MB of them scales in float32, and
                                                                        some 4 µs of beginning and end
      … scales bf16; asymmetric, fp16           .0160 .0168       .0160 2.80 × (to 2.85), 2.66 ×
      … batch 16 / 128                          .020 .036   .023  .060  2.64, 1.68 ×
      … batch 2048                              .472     .370     .495  0.94 × (bar 0.9)
    nf4, mxfp4 product, batch 1                 .018 .018         .020  2.52, 2.56 ×: levels by a table in shared memory
    nvfp4 product, batch 1                      .019     .014     .020  2.36 ×: likewise, and a scale every 16 weights
    fp8, int8 product, batch 1                  .028 .026   .025        bytes
    a token of 8B's shape, bf16                 5.9      5.3             its bytes, of 14.5 GB
      … int4 (4.2 GB), int8 (7.5 GB)            5.4 4.8  1.5 2.7         the host, which starts 700 kernels, where it is
                                                                        slow: int4 took 3.1 to 3.2 on another machine,
                                                                        near the 3.2 that the GPU works
      … 16 rows, bf16, int4, int8               6.6, 5.8, 9.3
    GPTQ of a model of 8B's shape               51.5 s   7.8 s    60 s  first block 20.9 (compiling, by the host; 16.6
                                                                        on another machine), then 0.83
    training step: see scripts/bench_qat.py

Rows of x at which int4's product is as fast as bf16's: as dispatched 2.70 2.97 2.59 2.38 2.26 1.61 1.10 .84 .91 .94
.89 .95 × of its speed at 1 4 16 32 64 128 256 512 1024 2048 4096 8192 rows; the weight decoded first 1.28 .76 .77 .31
.32 .32 .34 .46 .62 .82 .90 .95 × (experiments/packed_crossover.png). What limits GPTQ is of profiles of earlier runs;
tokens and the six schemes are of later ones, tokens of a state in which rows' places still moved in memory.

A token of 8 blocks of that shape in int4, by how blocks were put into programs: two runs that share a program 1.9 to
2.3 ms, as the program's CUDA graph is recorded anew for the operands of each (0.5 ms) and sent to the GPU again; each
run with a program of its own 1.4 to 1.7; all in one 0.9 to 1.1, of which the GPU works for 0.94. 32 blocks in one
compile for longer than 20 s, 8 for 2.8. Of SmolLM2's shape, 30 blocks: 5 runs that share a program 2.1 to 3.5, with
programs of their own 1.4 to 2.1.

The product of one row, by what was tried: a kernel, and one of XLA's that sums its parts and puts the next x in order,
17.7 to 19.3 µs; one kernel (packed_mma.py) 16.0 to 16.2; of a scale a row in place of 64 15.0; steps of 1024 inputs, or
more stages, up to 1 more; four groups of warps, each with a row of copies of its own, the same, and 2 more for tables.

One solution of 4096 to 14336 took 13.7 ms and six took 70.5 while a kernel took 128 columns and each scheme was solved
alone: both are faster now, the one by more, so that six are no nearer to 2.5 of one; of the 16 ms that the bar gives
one they are 2.1. Without its search of ranges six would take some 24 ms still.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_qat
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import jquant
from jquant import programs
from jquant.calib import gram
from jquant.core.qtensor import QTensor
from jquant.kernels import dispatch
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.models.generate import generate
from jquant.models.generate_batch import generate_batch
from jquant.nn.linear import matmul_transposed
from jquant.nn.w8a8 import W8A8Linear
from jquant.ptq import gptq

BF16, F32 = jnp.bfloat16, jnp.float32
PLOT: list[str] = []  # --plot


@dataclass(frozen=True, kw_only=True)
class Device:
    """What was measured of it first."""

    bandwidth: float  # bytes a second, read and written
    rates: dict[str, float]  # operations a second of a matrix product
    small: bool

    def side(self, size: int) -> int:
        """The size, or a tiny one."""
        return max(256, size // 32) if self.small else size


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {','.join(WORKS)}")
    parser.add_argument("--plot", help="where `crossover` writes its picture (needs matplotlib)")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    PLOT.extend([arguments.plot] if arguments.plot else [])
    chosen = list(WORKS) if arguments.only is None else arguments.only.split(",")
    programs.keep()
    device = measured(small=arguments.small)
    rates = ", ".join(f"{name} {rate / 1e12:.0f}e12" for name, rate in device.rates.items())
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: copy {device.bandwidth / 1e9:.0f} GB/s, {rates} /s")
    for name in chosen:
        try:
            WORKS[name](device)
        except Exception:
            traceback.print_exc(limit=-4)
        jax.clear_caches()


def measured(*, small: bool) -> Device:
    side = 256 if small else 8192
    x = jax.random.normal(jax.random.key(0), (side, side), BF16)
    bandwidth = 4 * side**2 / seconds(lambda x: x * BF16(1.5), x)
    rates = {}
    for name, dtype, out in (("bf16", BF16, F32), ("int8", jnp.int8, jnp.int32), ("fp8", jnp.float8_e4m3fn, F32)):
        a = (10 * x).astype(dtype)
        rates[name] = 2 * side**3 / seconds(lambda a, out=out: product(a, a, out), a, times=5)
    return Device(bandwidth=bandwidth, rates=rates, small=small)


def product(x: jax.Array, w: jax.Array, out: Any) -> jax.Array:
    """x · wᵀ."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out)


def seconds(f: Callable[..., Any], *operands: Any, times: int = 30, runs: int = 5) -> float:
    """Of one call among many that follow each other; the median of several such rows."""
    compiled = jax.jit(f)
    jax.block_until_ready(compiled(*operands))
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(times - 1):
            compiled(*operands)
        jax.block_until_ready(compiled(*operands))
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def once(f: Callable[[], Any], runs: int = 3) -> float:
    """Seconds of a call by itself, the median."""
    jax.block_until_ready(f())
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(f())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def row(what: str, took: float, floor: float | None = None, bar: float | None = None, note: str = "") -> None:
    """In milliseconds; `bar` is what it may take."""
    text = f"{what:58} {took * 1e3:9.3f} ms"
    text += "" if floor is None else f"   floor {floor * 1e3:9.3f}, {took / floor:5.2f} ×"
    text += "" if bar is None else f"   bar {bar * 1e3:9.3f} {'met' if took <= bar else 'MISSED'}"
    print(text + (f"   {note}" if note else ""), flush=True)


def gram_matrix(device: Device) -> None:
    """131072 × 4096, bfloat16 in, float32 sums. Floor: all products, of which symmetry saves three eighths."""
    rows, width = device.side(131072), device.side(4096)
    x = jax.random.normal(jax.random.key(0), (rows, width), BF16)
    took = seconds(lambda x: gram.update(gram.init(width), x).strips, x, times=10)
    row(f"Gram matrix {rows} × {width}", took, 2 * rows * width**2 / device.rates["bf16"], 8e-3)


_SOLVES = {(4096, 4096): (13e-3, 0.00707), (4096, 14336): (16e-3, 0.00681), (14336, 4096): (190e-3, 0.00227)}
_CONFIGS = {"static, range of the weights": gptq.GPTQConfig(range="minmax"), "default": gptq.GPTQConfig()}


def problem(device: Device, inputs: int, outputs: int) -> tuple[jax.Array, gram.Gram]:
    """A weight, and the Gram matrix of 4096 samples whose channels differ log-normally."""
    inputs, outputs = device.side(inputs), device.side(outputs)
    scales = jnp.exp(jax.random.normal(jax.random.key(1), (inputs,)))
    x = jax.random.normal(jax.random.key(0), (4096, inputs)) * scales
    return jax.random.normal(jax.random.key(2), (outputs, inputs)), gram.finalize(gram.update(gram.init(inputs), x))


def gptq_solves(device: Device) -> None:
    scheme = jquant.scheme("int4:g128")
    for (inputs, outputs), (bar, error_bar) in _SOLVES.items():
        weight, known = problem(device, inputs, outputs)
        for name, config in _CONFIGS.items():
            solve = partial(gptq.solve, weight, known, scheme, config=config)
            took = once(lambda solve=solve: solve().qtensor)
            wrong = jquant.dequantize(solve().qtensor) - weight
            error = float(jnp.sum((wrong @ known.matrix) * wrong) / jnp.sum((weight @ known.matrix) * weight))
            what = f"GPTQ int4 g128, {inputs} in, {outputs} out, {name}"
            row(what, took, None, bar, f"error {error:.5f} (llm-compressor's {error_bar})")


def gptq_six(device: Device) -> None:
    """Schemes share statistics and factor."""
    weight, known = problem(device, 4096, 14336)
    specs = ("int4:g128", "int4:g64", "int3:g128", "int4:g128:asym", "int3:g64:asym", "nf4:g64")
    config = _CONFIGS["default"]

    def solve(chosen: tuple[str, ...]) -> list[QTensor]:
        factor = gptq.factorize(known, config=config)
        schemes = [jquant.scheme(spec) for spec in chosen]
        return [each.qtensor for each in gptq.solve_schemes(weight, factor, schemes, config=config)]

    one, six = once(lambda: solve(specs[:1])), once(lambda: solve(specs))
    row("six GPTQ schemes on a layer of 4096 in, 14336 out", six, None, 2.5 * one, f"{six / one:.2f} × one")


def llama(device: Device, layers: int) -> Decoder:
    """Llama 3 8B's shape with a small vocabulary, weights drawn on the device."""
    config = ModelConfig(
        architecture="llama",
        vocab_size=32000,
        hidden_size=device.side(4096),
        intermediate_size=device.side(14336),
        num_layers=2 if device.small else layers,
        num_heads=4 if device.small else 32,
        num_kv_heads=2 if device.small else 8,
        head_dim=64 if device.small else 128,
        norm_eps=1e-5,
        max_length=8192,
    )
    return Decoder(config, dtype=BF16, rngs=nnx.Rngs(0))


def pipeline(device: Device) -> None:
    """GPTQ of a whole model, compiling included: kept programs are not looked for. Nothing touches a disk."""
    windows, length = (4, 64) if device.small else (128, 2048)
    model = llama(device, 32)
    tokens = np.random.default_rng(0).integers(0, 32000, (windows, length)).astype(np.int32)
    step = jquant.Step("gptq", (("range", "minmax"),))
    recipe = jquant.Recipe(rules=(jquant.Rule(layers=(r"^blocks\.",), scheme="int4:g128", method=step),))
    parts: list[float] = []
    look_for_programs(False)
    start = time.perf_counter()
    batches = list(tokens.reshape(-1, 4, length))
    jquant.quantize_model(model, recipe, batches, progress=lambda event: parts.append(event.seconds))
    took = time.perf_counter() - start
    look_for_programs(True)
    # A block: the walk through 218 million weights, and half of Gram matrices of 3 · 4096² and 14336², by symmetry.
    floor = 2 * windows * length * 32 * (218e6 + (3 * 4096**2 + 14336**2) / 2) / device.rates["bf16"]
    note = f"first block {parts[0]:.1f} s, then {statistics.median(parts[1:-1] or parts):.2f} s each"
    row(f"GPTQ of a model of Llama 3 8B's shape, {windows} × {length} tokens", took, floor, 60.0, note)


def look_for_programs(enabled: bool) -> None:
    """Among kept ones; jax asks for that once, unless it is told to ask again."""
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def fake_quant(device: Device) -> None:
    side = device.side(8192)
    x, floor = jax.random.normal(jax.random.key(0), (side, side), BF16), 4 * side**2 / device.bandwidth
    for spec in ("int4:g128", "int8:channel"):
        scheme = jquant.scheme(spec)
        took = seconds(lambda x, scheme=scheme: dispatch.fake_quantize(x, scheme), x)
        plain = seconds(lambda x, scheme=scheme: jquant.fake_quantize(x, scheme), x)
        bar = 108e-6 if spec == "int4:g128" else None
        row(f"fake-quant {spec}, {side}²", took, floor, bar, f"XLA {plain * 1e3:.3f}")


def packed(device: Device) -> None:
    """Three weights in turn, so that none is in the L2 cache, in one compiled loop."""
    side = device.side(8192)
    weights = weights_of(side)

    def ours(x: jax.Array, q: QTensor) -> jax.Array:
        found = dispatch.multiply_packed(x, q, dtype=x.dtype)
        return matmul_transposed(x, jquant.dequantize(q, BF16)) if found is None else found

    bars = {1: 2.8, 16: 2.0, 128: 1.0, 2048: 0.9}
    plain = {batch: chained(batch, matmul_transposed, weights) for batch in bars}
    int4 = 0.0
    one_row = ("nf4:g128", "mxfp4", "nvfp4", "fp8_e4m3:channel", "int8:channel")
    for spec in ("int4:g128", "int4:g128:bf16", "int4:g128:asym:fp16", *one_row):
        packed = [jquant.quantize(weight, jquant.scheme(spec)) for weight in weights]
        for batch in bars if spec == "int4:g128" else (1,):
            took = chained(batch, ours, packed)
            reading, multiplying = packed[0].nbytes / device.bandwidth, 2 * batch * side**2 / device.rates["bf16"]
            int4 = took if (spec, batch) == ("int4:g128", 1) else int4
            bar = plain[batch] / bars[batch] if spec.startswith("int4:g128") else None
            if bar is None and packed[0].bits_per_weight < 5:
                bar = 1.2 * int4
            note = f"{plain[batch] / took:.2f} × as fast as bf16"
            row(f"{spec} product, {side}², batch {batch}", took, max(reading, multiplying), bar, note)


def weights_of(side: int) -> list[jax.Array]:
    """Three, whose products are as large as what they multiply."""
    return [(side**-0.5 * jax.random.normal(jax.random.key(i), (side, side))).astype(BF16) for i in range(3)]


def chained(batch: int, apply: Callable[[jax.Array, Any], jax.Array], operands: list[Any]) -> float:
    """Seconds of a product among many that follow each other, the weights in turn, with nothing between them.

    Where products are short, eight turns stand in the loop's body: its counter is kernels of its own, which would count
    as theirs.
    """
    apply = jax.jit(apply)  # traced once for all turns
    x = jax.random.normal(jax.random.key(9), (batch, operands[0].shape[1]), BF16)

    def turn(x: jax.Array, operands: list[Any]) -> jax.Array:
        for operand in operands:
            x = apply(x, operand)
        return x

    turns = 400 if batch <= 128 else 40  # some 30 ms

    @jax.jit
    def loop(x: jax.Array, operands: list[Any]) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: turn(x, operands), x, unroll=8 if batch <= 16 else 1)

    return once(lambda: loop(x, operands)) / turns / len(operands)


def w8a8(device: Device) -> None:
    """The inputs quantized a token, multiplied as codes, scaled: against the product of codes alone."""
    side = device.side(8192)
    weight = jax.random.normal(jax.random.key(0), (side, side), BF16)
    x = jax.random.normal(jax.random.key(1), (side, side), BF16)
    for kind, element in (("int8", "int8"), ("fp8", "fp8_e4m3")):
        weights = jquant.quantize(weight, jquant.scheme(f"{element}:channel"))
        layer = W8A8Linear(weights, activation=jquant.scheme(f"{element}:token"))
        graphdef, state = nnx.split(layer)
        took = seconds(lambda s, x, g=graphdef: nnx.merge(g, s)(x), state, x, times=10)
        alone = 2 * side**3 / device.rates[kind]
        row(f"W8A8 {kind}, {side}³", took, alone, alone / 0.85, f"{alone / took:.0%} of the product alone")


def inference(device: Device) -> None:
    """Tokens of Llama 3 8B's shape at batch 1 and 16, bfloat16 and packed."""
    prompt = np.arange(64) % 250
    few, many = (2, 4) if device.small else (8, 136)
    for spec in (None, "int4:g128", "int8:channel", "fp8_e4m3:channel"):
        model = llama(device, 32)
        if spec is not None:
            jquant.quantize_layers(model, jquant.scheme(spec))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        read = held - sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.embed)))  # of which a row a token

        def row_of(count: int, model: Decoder = model) -> None:
            for _ in generate(model, prompt, max_tokens=count):
                pass

        def batch_of(count: int, model: Decoder = model) -> None:
            generate_batch(model, [prompt.tolist()] * 16, max_tokens=count, stop=lambda *_: False, rows=16)

        took = {}
        for batch, work in ((1, row_of), (16, batch_of)):
            # The prompt is read in either, and programs are loaded.
            long, short = (once(lambda work=work, count=count: work(count)) for count in (many, few))
            took[batch] = (long - short) / (many - few)
        for batch, seconds_ in took.items():
            what = f"a token of {batch} rows, 8B's shape, {spec or 'bf16'}"
            row(what, seconds_, read / device.bandwidth, None, f"{batch / seconds_:.0f} tokens/s, {held / 1e9:.2f} GB")


def training(device: Device) -> None:
    """Steps of scripts/bench_qat.py; the floor is the plain step. The decoder's own W8A8 multiplies int8 by int8."""
    bars = {"flax": {"int4:g128": 1.02, "W8A8 channel, token": 1.07}, "jquant": {"W8A8 channel, token": 0.95}}
    for layers, of_variants in bars.items():
        steps = 3 if device.small else 20
        took = bench_qat.measure(list(of_variants), bench_qat.with_jquant, layers, gpu=not device.small, steps=steps)
        for name, bar in of_variants.items():
            row(f"training step, {name}, {layers} layers", took[name], took["plain"], bar * took["plain"])


def crossover(device: Device) -> None:
    """Products from packed int4 by the kernels, and decoded first, beside bfloat16, against the rows of x."""
    side = device.side(8192)
    weights = weights_of(side)
    packed_ = [jquant.quantize(weight, jquant.scheme("int4:g128")) for weight in weights]

    def kernel(x: jax.Array, q: QTensor) -> jax.Array:
        found = dispatch.multiply_packed(x, q, dtype=x.dtype)
        return decoded(x, q) if found is None else found

    def decoded(x: jax.Array, q: QTensor) -> jax.Array:
        return matmul_transposed(x, jquant.dequantize(q, BF16))

    points: dict[str, list[tuple[int, float]]] = {"as dispatched": [], "decoded first": []}
    for batch in (1, 16) if device.small else (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        plain = chained(batch, matmul_transposed, weights)
        for name, apply in (("as dispatched", kernel), ("decoded first", decoded)):
            points[name].append((batch, plain / chained(batch, apply, packed_)))
        figures = ", ".join(f"{name} {found[-1][1]:.2f} ×" for name, found in points.items())
        print(f"int4:g128 product, {side}², {batch:5d} rows, as fast as bf16: {figures}", flush=True)
    if PLOT:
        draw(points, PLOT[0])


def draw(points: dict[str, list[tuple[int, float]]], path: str) -> None:
    """Speed over bfloat16's against rows of x, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
    for (name, found), color, above in zip(points.items(), ("#1f5fa8", "#c2571a"), (8, -18), strict=True):
        rows, ratios = zip(*found, strict=True)
        axes.plot(rows, ratios, marker="o", color=color)
        axes.annotate(
            name,
            (rows[len(rows) // 2], ratios[len(rows) // 2]),
            xytext=(6, above),
            textcoords="offset points",
            color=color,
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, [f"{value:,}" for value in rows])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of x")
    axes.set_ylabel("times as fast as bfloat16")
    axes.set_title("Product of bfloat16 with int4:g128, 8192 × 8192", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


WORKS: dict[str, Callable[[Device], None]] = {
    "gram": gram_matrix,
    "gptq": gptq_solves,
    "six": gptq_six,
    "fake-quant": fake_quant,
    "packed": packed,
    "w8a8": w8a8,
    "training": training,
    "inference": inference,
    "pipeline": pipeline,
    "crossover": crossover,
}


if __name__ == "__main__":
    main()
