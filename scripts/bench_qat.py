"""Times a training step with fake quantization against the plain one: a stack of transformer blocks, one device.

    python scripts/bench_qat.py                       # CPU: d 512, ff 2048, 2 blocks, 4 × 256 tokens, float32
    python scripts/bench_qat.py --gpu                 # H100: d 2048, ff 8192, 4 blocks, 8 × 1024 tokens, bfloat16
    python scripts/bench_qat.py --layers jquant …     # the decoder's own layers, W[out, in], in place of nnx.Linear
    python scripts/bench_qat.py --qwix QWIX_PYTHON    # and qwix's ratios on the same stack, each in its own process

A step is the loss mean(y²), its gradient, and w − 1e-4·g, with float32 masters; state is donated. Steps of all variants
are interleaved, so that the machine's noise falls on all of them; the ratio is that of medians. QWIX_PYTHON is a Python
with jax 0.10.2 and qwix 0.1.8.

Two cores of a CPU (EPYC, plain step 0.51 s; of minima, as others used the machine; qwix in parentheses): int4:g128 0.81
(0.97), its LSQ 0.93, nf4:g64 0.79 (1.00), W8A8 per channel and token 0.84 (0.95), W8A8 tiled 0.86 (1.23), nvfp4 0.79.
Below 1 because our layer's gradient of a weight is not JAX's (nn/product.py): with it the plain step takes 0.77, and of
that W8A8 tiled is 1.11.

H100, of several runs, plain 30.0 to 31.6 ms: int4:g128 1.013, its LSQ 1.28, nf4:g64 1.043, W8A8 per channel and token
1.044, tiled 1.033, nvfp4 1.066. With the decoder's own layers: 1.004 to 1.010, 1.045, 1.05, 0.945 (its forward pass
multiplies int8 by int8; of three runs, 0.943 to 0.954), 1.028, 1.065 (the last two of an earlier state).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# name -> scheme of weights, scheme of inputs; bars: the QAT issue's, of the step's time over the plain step's
VARIANTS: dict[str, tuple[str, str | None]] = {
    "int4:g128": ("int4:g128", None),
    "int4:g128 lsq": ("int4:g128", None),
    "nf4:g64": ("nf4:g64", None),
    "W8A8 channel, token": ("int8:channel", "int8:token"),
    "W8A8 tiled g128": ("int8:g128", "int8:g128"),
    "nvfp4": ("nvfp4", None),
}


class Block(nnx.Module):
    """Pre-norm attention and a gated MLP, of nnx.Linear or of the decoder's own layer."""

    def __init__(self, width: int, hidden: int, heads: int, dtype: Any, layers: str, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> Any:
            if layers == "flax":
                return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)
            from jquant.nn.linear import Linear

            return Linear(inputs, outputs, rngs=rngs)

        self.heads = heads
        self.attn_norm, self.mlp_norm = (nnx.RMSNorm(width, dtype=dtype, rngs=rngs) for _ in range(2))
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.attn_norm(x)
        q, k, v = (layer(h).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)).astype(x.dtype)
        x = x + self.o(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape))
        h = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Stack(nnx.Module):
    """Blocks in a row."""

    def __init__(self, blocks: int, *sizes: Any, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(*sizes, rngs=rngs) for _ in range(blocks)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the sizes for an H100")
    parser.add_argument("--layers", choices=("flax", "jquant"), default="flax", help="which linear layers")
    parser.add_argument("--qwix", type=Path, help="a Python with qwix")
    parser.add_argument("--steps", type=int, default=20, help="of each variant that are timed")
    parser.add_argument("--only", help="variants whose name contains this")
    parser.add_argument("--peer", choices=("qwix",), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.qwix is not None and arguments.layers != "flax":
        parser.error("--qwix is for nnx.Linear: leave --layers out")
    chosen = [name for name in VARIANTS if arguments.only is None or arguments.only in name]
    prepared = with_qwix if arguments.peer else with_jquant
    rows = measure(chosen, prepared, arguments.layers, gpu=arguments.gpu, steps=arguments.steps)
    if arguments.peer:
        print(json.dumps(rows))
        return
    theirs: dict[str, float] = {}
    if arguments.qwix is not None:
        command = [str(arguments.qwix), __file__, "--peer", "qwix", "--steps", str(arguments.steps)]
        command += ["--gpu"] if arguments.gpu else []
        command += [] if arguments.only is None else ["--only", arguments.only]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: plain step {rows['plain'] * 1e3:.1f} ms")
    for name in (each for each in chosen if each in rows):
        line = f"{name:22} {rows[name] / rows['plain']:.3f} ×"
        print(line + (f"   qwix {theirs[name] / theirs['plain']:.3f} ×" if name in theirs else ""), flush=True)


def measure(
    names: list[str], prepared: Callable[[Stack, str, jax.Array], Any], layers: str, *, gpu: bool, steps: int
) -> dict[str, float]:
    """Median seconds of a step of each variant and of the plain one."""
    blocks, *sizes, dtype = (4, 2048, 8192, 16, jnp.bfloat16) if gpu else (2, 512, 2048, 8, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (8, 1024, 2048) if gpu else (4, 256, 512), dtype)
    runs: dict[str, Callable[[], None]] = {}
    for name in ["plain", *names]:
        model = Stack(blocks, *sizes, dtype, layers, rngs=nnx.Rngs(0))
        if name != "plain":
            model = prepared(model, name, x)
            if model is None:
                continue
        try:
            runs[name] = stepper(model, x)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def stepper(model: nnx.Module, x: jax.Array) -> Callable[[], None]:
    """One training step a call, compiled and run once already."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params: Any, rest: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(nnx.merge(graphdef, params, rest)(x).astype(jnp.float32) ** 2)

        return jax.tree.map(lambda p, g: p - 1e-4 * g, params, jax.grad(loss)(params))

    compiled = jax.jit(step, donate_argnums=0).lower(params, rest).compile()
    state = [jax.tree.map(jnp.copy, params)]

    def run() -> None:
        state[0] = jax.block_until_ready(compiled(state[0], rest))

    run()
    return run


def with_jquant(model: Stack, name: str, x: jax.Array) -> Stack:
    from jquant import qat

    weight, inputs = VARIANTS[name]
    gradient = "lsq" if name.endswith("lsq") else "clipped_ste"
    recipe = qat.one_rule(weight, layers=("^blocks",), gradient=gradient, start="range", activation=inputs)
    qat.prepare(model, recipe, announce=lambda line: None)
    return model


def with_qwix(model: Stack, name: str, x: jax.Array) -> Any:
    import qwix  # pyright: ignore[reportMissingImports]

    rules = {
        "int4:g128": {"weight_qtype": jnp.int4, "tile_size": 128},
        "nf4:g64": {"weight_qtype": "nf4", "tile_size": 64},
        "W8A8 channel, token": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8},
        "W8A8 tiled g128": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8, "tile_size": 128},
    }
    if name not in rules:
        return None
    rule = qwix.QtRule(module_path=".*(q|k|v|o|gate|up|down)", **rules[name])  # pyright: ignore[reportArgumentType]
    return qwix.quantize_model(model, qwix.QtProvider([rule]), x)


if __name__ == "__main__":
    main()
