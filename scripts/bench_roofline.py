"""Predicted against measured: prefill and decoding of a model of ours, beside the roofline of the device it runs on.

    python scripts/bench_roofline.py [MODEL]                 # the demo on whatever JAX runs on
    python scripts/bench_roofline.py MODEL --dtype bfloat16 --prompt 2048 --output 64

Measures the device (a copy, products of matrices), predicts from that and from the model's sizes alone, then times
`generate`: until the first token, and then for each token, each the least of several runs. Needs jax and jquant alone.
`generate` reads prompts in pieces of 64 tokens (512 on a GPU) and keeps a cache of a multiple of 256 positions, all of
which it reads: the prediction is of that, with the pieces; the cache's padding is part of what the ratio shows.

CPU (2 cores of an AMD EPYC, shared with others, jax 0.10.2, 2026-11-26, four runs): the demo in float32, 512 prompt
tokens; copy 46 to 70 GB/s, 0.13 to 0.21e12 operations/s. Prefill 0.57 to 0.90 s predicted, 1.20 to 1.79 s measured,
ratio 2.0 to 2.2; a token 8 to 12 ms predicted, 37 to 48 ms measured, ratio 3.0 to 5.9: a token's own time hardly moves
with the bandwidth that the copy finds. Of some 40 ms 15 go to launching the blocks' programs (as many blocks of width
32 take that long) and 18 to reading the weights at 30 GB/s, which is what XLA reaches for a matrix that meets one row.

H100 (jax 0.11.2, bfloat16, 2026-11-25): copy 2,790 GB/s, 0.8e15 operations/s. A model of 8 blocks of Llama 3 8B's
shape, 2,048 prompt tokens in pieces of 64: prefill 41 ms predicted, 103 measured, ratio 2.5 (7.7 before runs of blocks
shared a program); a token 1.40 ms predicted, 4.6 measured, ratio 3.3 (9.6 before). The demo: 0.10 ms a token predicted,
8 to 11 measured: next to nothing but starting kernels.
"""

from __future__ import annotations

import argparse
import itertools
import time

import jax
import numpy as np

from jquant.hardware.local import local_device, measured_device
from jquant.hardware.measure import measure
from jquant.hardware.roofline import Load, Numerics, decode, memory, prefill
from jquant.models.checkpoint import open_checkpoint
from jquant.models.decoder import Decoder
from jquant.models.generate import generate, prompt_chunk
from jquant.models.shape import model_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="as for jquant generate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and sums")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens that are timed after the first")
    parser.add_argument("--runs", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--side", type=int, help="of the matrices that are multiplied; 1024 on CPU, 8192 elsewhere")
    arguments = parser.parse_args()

    local = local_device()
    small = local.platform == "cpu"
    name = "fp32" if arguments.dtype == "float32" else "bf16"
    side = arguments.side or (1024 if small else 8192)
    measured = measure(("fp32", name), side=side, copied_bytes=1 << 28 if small else 1 << 31)
    device = measured_device(local, measured)
    rate = measured.tera_rates[name]
    print(f"{local.count} × {local.description}, jax {jax.__version__}")
    print(f"copy {measured.bandwidth_gb_s:.1f} GB/s, {name} {rate:.3f}e12 operations/s (matrices of side {side})")

    checkpoint = open_checkpoint(arguments.model)
    shape = model_shape(checkpoint.config, name=arguments.model, source="its config")
    numerics = Numerics(float_bits=32 if name == "fp32" else 16)
    load = Load(prompt=arguments.prompt, output=arguments.output, chunk=prompt_chunk())
    predicted = {
        "prefill": prefill(shape, numerics, load, device),
        "decode": decode(shape, numerics, load, device),
    }
    model = checkpoint.model(dtype=arguments.dtype)
    took = [min(each) for each in zip(*(timed(model, load) for _ in range(arguments.runs)), strict=True)]
    held = memory(shape, numerics, load).weights / 1e6
    print(f"{arguments.model}: {shape.parameters / 1e6:.1f} million parameters, {held:.0f} MB in {arguments.dtype}")
    for (part, time_), seconds in zip(predicted.items(), took, strict=True):
        unit = f"{arguments.prompt} tokens" if part == "prefill" else "a token"
        print(
            f"{part:8} {unit:12} predicted {1e3 * time_.total:9.3f} ms (bound by {time_.bound})   "
            f"measured {1e3 * seconds:9.3f} ms   ratio {seconds / time_.total:.2f}"
        )


def timed(model: Decoder, load: Load) -> tuple[float, float]:
    """Seconds until the first token, and a token after it; compiled before."""
    prompt = np.arange(load.prompt) % min(1000, model.config.vocab_size)
    # The first two tokens compile both programs; the cache must be as long as in the run that is timed.
    list(itertools.islice(generate(model, prompt, max_tokens=load.output + 1), 2))
    started = time.perf_counter()
    stream = generate(model, prompt, max_tokens=load.output + 1)
    next(stream)
    first = time.perf_counter()
    count = sum(1 for _ in stream)
    return first - started, (time.perf_counter() - first) / count


if __name__ == "__main__":
    main()
