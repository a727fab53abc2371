"""Time other libraries on this machine's CPU: what scripts/bench_cpu.py's ratios are taken against.

    PEER_PYTHON scripts/bench_cpu_peers.py int4 int4-packed nf4
    PEER_PYTHON scripts/bench_cpu_peers.py smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf --threads 2
    PEER_PYTHON scripts/bench_cpu_peers.py gguf-encode ggml-encode gguf-decode
    QWIX_PYTHON scripts/bench_cpu_peers.py qwix
    COMPRESSOR_PYTHON scripts/bench_cpu_peers.py gptq-solve gptq-model --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    COMPRESSOR_PYTHON scripts/bench_cpu_peers.py gptq-model-bfloat16 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

PEER_PYTHON is an environment with torch, bitsandbytes, transformers, gguf, libggml-python and accelerate (and a C++
compiler on the path, for torch.compile); QWIX_PYTHON one with jax 0.10.2 and qwix 0.1.8, COMPRESSOR_PYTHON one with
llmcompressor 0.14, transformers, gguf and datasets. Each work prints one JSON line (gguf-decode one a type): work,
peer, version, milliseconds (median), milliseconds_min or tokens_per_second (median and best), threads, reps. Works of
one thread run pinned to one core (--core). Nothing of jquant is imported. All works together took a minute and a half
on 2 cores, and llm-compressor's several more.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 4096
GROUP = 128
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="+", choices=WORKS, metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--reps", type=int, default=60, help="timed calls of the 4096 x 4096 works")
    parser.add_argument("--windows", type=int, default=8, help="timed windows of smollm2")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the works that take several")
    parser.add_argument("--core", type=int, default=0, help="the core of the works that take one thread")
    parser.add_argument("--gguf", type=Path, help="the SmolLM2 file that smollm2 loads")
    arguments = parser.parse_args()
    of_a_model = {"smollm2", "gptq-model", "gptq-model-bfloat16"} & set(arguments.works)
    if of_a_model and (arguments.gguf is None or not arguments.gguf.is_file()):
        parser.error(f"{', '.join(sorted(of_a_model))}: needs --gguf FILE, the SmolLM2 GGUF; got {arguments.gguf}")
    for work in arguments.works:
        everything = os.sched_getaffinity(0)
        for row in WORKS[work](arguments):
            print(json.dumps({"work": work} | row), flush=True)
        os.sched_setaffinity(0, everything)


def int4(arguments: argparse.Namespace) -> Iterator[Row]:
    """Symmetric full-range int4, groups of 128, one int8 code an element, through torch.compile."""
    yield _torch_int4(arguments, packed=False)


def int4_packed(arguments: argparse.Namespace) -> Iterator[Row]:
    """The same with two codes a byte."""
    yield _torch_int4(arguments, packed=True)


def _torch_int4(arguments: argparse.Namespace, *, packed: bool) -> Row:
    os.sched_setaffinity(0, {arguments.core})
    import torch

    torch.set_num_threads(1)

    def codes_and_scales(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = weight.view(SIZE, -1, GROUP)
        scale = groups.abs().amax(-1, keepdim=True) / 7.5
        codes = torch.clamp(torch.round(groups / scale), -8, 7).to(torch.int8)
        if packed:
            codes = (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)
        return codes.view(SIZE, -1), scale.squeeze(-1)

    compiled = torch.compile(codes_and_scales)
    weight = torch.from_numpy(_weight())
    _check_codes(compiled(weight)[0].numpy(), packed=packed)
    return {"peer": "torch.compile", "version": torch.__version__, "threads": 1} | _time(
        lambda: compiled(weight), arguments.reps
    )


def nf4(arguments: argparse.Namespace) -> Iterator[Row]:
    """NF4 in blocks of 64 through bitsandbytes, with all threads and with one."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = torch.from_numpy(_weight())
    for threads in (arguments.threads, 1):
        torch.set_num_threads(threads)
        if threads == 1:
            os.sched_setaffinity(0, {arguments.core})
        yield {"peer": "bitsandbytes", "version": _version("bitsandbytes"), "threads": threads} | _time(
            lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4"), max(5, arguments.reps // 4)
        )


def smollm2(arguments: argparse.Namespace) -> Iterator[Row]:
    """Load the GGUF with transformers, then the mean NLL of windows of 512 tokens, batch 1, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    identity = {"peer": "transformers", "version": _version("transformers"), "threads": arguments.threads}
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.gguf.parent, gguf_file=arguments.gguf.name, dtype=torch.float32
    ).eval()
    yield identity | {"work": "smollm2-load", "milliseconds": _ms(time.perf_counter() - start), "reps": 1}
    window = 512
    tokens = torch.randint(0, 49_152, (1, window), generator=torch.Generator().manual_seed(0))

    def score() -> None:
        logits = model(tokens, use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])

    with torch.inference_mode():
        timing = _time(score, arguments.windows)
    yield identity | {
        "window": window,
        "tokens_per_second": round(window / timing["milliseconds"] * 1e3, 1),
        "tokens_per_second_best": round(window / timing["milliseconds_min"] * 1e3, 1),
        "reps": timing["reps"],
    }


def gguf_encode(arguments: argparse.Namespace) -> Iterator[Row]:
    """Q4_0 through gguf-py, which is numpy on one core."""
    os.sched_setaffinity(0, {arguments.core})
    import gguf

    weight, kind = _weight(), gguf.GGMLQuantizationType.Q4_0
    yield {"peer": "gguf-py", "version": _version("gguf"), "threads": 1} | _time(
        lambda: gguf.quants.quantize(weight, kind), max(5, arguments.reps // 4)
    )


def ggml_encode(arguments: argparse.Namespace) -> Iterator[Row]:
    """Q4_K through ggml's own C code, on one core."""
    os.sched_setaffinity(0, {arguments.core})
    import gguf

    files = importlib.metadata.files("libggml-python") or []
    encode = ctypes.CDLL(
        str(next(file.locate() for file in files if file.name == "libggml-base.so"))
    ).ggml_quantize_chunk
    encode.restype = ctypes.c_size_t
    encode.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind = gguf.GGMLQuantizationType.Q4_K
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    weight, raw = _weight(), np.zeros(SIZE * SIZE // elements * nbytes, np.uint8)
    yield {"peer": "C ggml", "version": _version("libggml-python"), "threads": 1} | _time(
        lambda: encode(kind.value, weight.ctypes.data, raw.ctypes.data, 0, SIZE, SIZE, None),
        max(3, arguments.reps // 12),
    )


def gguf_decode(arguments: argparse.Namespace) -> Iterator[Row]:
    """Random bytes of each block type to float32 through gguf-py, on one core."""
    os.sched_setaffinity(0, {arguments.core})
    import gguf

    for name in (
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "MXFP4",
        "NVFP4",
    ):
        kind = gguf.GGMLQuantizationType[name]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        raw = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE // elements * nbytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            timing = _time(lambda raw=raw, kind=kind: gguf.quants.dequantize(raw, kind), max(3, arguments.reps // 12))
        yield {"work": f"gguf-decode-{name}", "peer": "gguf-py", "version": _version("gguf"), "threads": 1} | timing


def qwix(arguments: argparse.Namespace) -> Iterator[Row]:
    """int4 in groups of 128 through qwix, jitted, pinned to one core."""
    os.sched_setaffinity(0, {arguments.core})
    import jax
    import jax.numpy as jnp
    import qwix as peer

    weight = jnp.asarray(_weight())
    quantize = jax.jit(lambda w: peer.quantize(w, jnp.int4, channelwise_axes=(0,), tiled_axes={1: GROUP}))
    yield {"peer": "qwix", "version": _version("qwix"), "jax": jax.__version__, "threads": 1} | _time(
        lambda: jax.block_until_ready(quantize(weight)), arguments.reps
    )


def gptq_solve(arguments: argparse.Namespace) -> Iterator[Row]:
    """GPTQ of one 2048² matrix, int4 in groups of 128, from its Hessian; scales are given."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq import gptq_quantize

    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, 2048), dtype=np.float32) * np.exp(rng.standard_normal(2048, dtype=np.float32))
    hessian = torch.from_numpy(x.T @ x) * (2 / 4096)
    weight = torch.from_numpy(rng.standard_normal((2048, 2048), dtype=np.float32))
    scheme = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scale = (weight.view(2048, -1, GROUP).abs().amax(-1) / 7.5)[None]
    seconds = []
    for _ in range(5):
        arrays = weight[None].clone(), hessian[None].clone()
        start = time.perf_counter()
        gptq_quantize.quantize_weight(*arrays, scale, torch.zeros_like(scale), None, scheme)
        seconds.append(time.perf_counter() - start)
    yield _compressor(seconds[1:]) | {"threads": arguments.threads}


def gptq_model(arguments: argparse.Namespace, dtype: str = "float32") -> Iterator[Row]:
    """GPTQ of all of SmolLM2's block layers to int4 g64, from 32 windows of 512 tokens; weights and activations in
    `dtype`."""
    import datasets
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    folder, name = str(arguments.gguf.parent), arguments.gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokens = np.random.default_rng(0).integers(0, 49_152, (32, 512))
    rows = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    # Of the modifier: None among the weights' arguments leaves its own default in force, which is static order.
    modifier = GPTQModifier(
        ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, actorder=None
    )
    # It looks for a tokenizer beside the model's config, which a GGUF has not.
    beside = tempfile.mkdtemp()
    tokenizer.save_pretrained(beside)
    del model.config.quantization_config  # the weights are floats by now
    model.hf_quantizer = None
    model.save_pretrained(beside)
    model = AutoModelForCausalLM.from_pretrained(beside, dtype=getattr(torch, dtype))
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=rows,
        recipe=modifier,
        max_seq_length=512,
        num_calibration_samples=32,
    )
    yield _compressor([time.perf_counter() - start]) | {"threads": arguments.threads}


def _compressor(seconds: list[float]) -> Row:
    return {
        "peer": "llm-compressor",
        "version": importlib.metadata.version("llmcompressor"),
        "milliseconds": statistics.median(seconds) * 1e3,
        "milliseconds_min": min(seconds) * 1e3,
        "reps": len(seconds),
    }


WORKS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "int4": int4,
    "int4-packed": int4_packed,
    "nf4": nf4,
    "smollm2": smollm2,
    "gguf-encode": gguf_encode,
    "ggml-encode": ggml_encode,
    "gguf-decode": gguf_decode,
    "qwix": qwix,
    "gptq-solve": gptq_solve,
    "gptq-model": gptq_model,
    "gptq-model-bfloat16": partial(gptq_model, dtype="bfloat16"),
}


def _weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)


def _check_codes(codes: np.ndarray, *, packed: bool) -> None:
    """A fast wrong answer is no yardstick: all but one code in a thousand (ties) must be numpy's."""
    if packed:
        codes = np.stack([codes << 4 >> 4, codes >> 4], axis=-1).reshape(SIZE, SIZE)
    groups = _weight().reshape(SIZE, -1, GROUP)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(7.5)
    expected = np.clip(np.rint(groups / scale), -8, 7).reshape(SIZE, SIZE)
    wrong = int((codes != expected).sum())
    if wrong > expected.size // 1000:
        raise RuntimeError(f"the compiled function gives {wrong} wrong codes of {expected.size}")


def _time(call: Callable[[], Any], reps: int) -> Row:
    for _ in range(2):
        call()
    seconds = []
    for _ in range(reps):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"milliseconds": _ms(statistics.median(seconds)), "milliseconds_min": _ms(min(seconds)), "reps": reps}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _version(package: str) -> str:
    return importlib.metadata.version(package)


if __name__ == "__main__":
    main()
