"""SmolLM2-135M at 3 and 2 bits: what rounding costs, and what training with quantization gives back.

Command:   python experiments/qat_smollm2.py --out DIR                      (CPU: the short form; GPU: the long one)
           python experiments/qat_smollm2.py --out DIR --model smollm2.gguf --data train.txt --text test.txt
           Options change a form: --form, --bits, --steps, --batch, --window, --learning-rate, --scale-learning-rate, …
Cost:      short form, 40 steps of 4 × 128 tokens: 4 to 8 minutes a width on 2 cores. Long form on an H100 (XLA_FLAGS=
           "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"): 90 s of compiling, then 113,000 tokens/s,
           30 s for 400 steps of 16 × 512, 60 s for 800. A run that was stopped goes on when it is started again
Result:    perplexity on the first 16 windows of 512 tokens of WikiText-2's test text, trained on the first 1 MB of its
           training text; float 36.00:
               int3   rounded 248.27, LSQ's start 210.5; H100: 45.20 after 100 steps, 43.65 after 200, 43.66 after 400;
                      short form: 78.63 after 20 steps, 70.20 after 40
               int2   rounded 8,245,092, LSQ's start 11,748,407; H100: 531.3 after 200 steps, 364.9 after 400, 320.8
                      after 600, 318.4 after 800; short form: 329,001 after 20 steps, 19,359 after 40, 3,835 after 100
Method:    layers of the blocks at int3 and int2, symmetric, a scale for each 64 weights. Weights and scales are trained
           (LSQ, started from the range of least squared error), distilled from the float model: KL on its predictions.
           Embeddings and head stay in floats and are trained too. The figure is that of the packed model
Note:      the demo's weights are 4-bit (Q4_1, groups of 32) decoded to floats. Texts named `wikitext2:…` come from the
           Hugging Face hub (the package datasets); without it give files by --data and --text. Several texts to train
           on are separated by commas
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.data.blocks import Windows, text_windows
from jquant.data.overlap import check_disjoint
from jquant.data.text import load_text
from jquant.evaluation.perplexity import perplexity
from jquant.io.atomic import replacing
from jquant.io.json_file import as_text
from jquant.models.checkpoint import Checkpoint, open_checkpoint
from jquant.models.save import packed_bits
from jquant.ptq.rtn import quantize_layers
from jquant.qat.batches import RowBatches
from jquant.qat.config import QATConfig
from jquant.qat.convert import convert
from jquant.qat.losses import distillation_loss
from jquant.qat.metrics import StepRecord
from jquant.qat.prepare import prepare
from jquant.qat.rules import one_rule
from jquant.qat.trainer import train

FORMS = {
    "short": {"steps": 40, "batch": 4, "window": 128, "dtype": "float32", "learning_rate": 1e-4, "eval_every": 20},
    "long": {"steps": 1500, "batch": 16, "window": 512, "dtype": "bfloat16", "learning_rate": 2e-4, "eval_every": 250},
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(options.model)
    test = text_windows(load_text(options.text), checkpoint.tokenizer(), window=512, limit=options.eval_windows)
    rows, texts = _training_rows(options, checkpoint, test)
    result: dict[str, Any] = {
        "model_sha256": checkpoint.sha256(),
        "data": texts,
        "text": test.text_name,
        "text_sha256": test.text_sha256,
        "training_windows": len(rows),
        "options": {name: value for name, value in vars(options).items() if name in _SHOWN},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "float": _perplexity(checkpoint.model(), test),
        "widths": {},
    }
    print(f"float: perplexity {result['float']:.2f}; {len(rows)} windows of {options.window} to train on", flush=True)
    for bits in options.bits:
        result["widths"][f"int{bits}:g64"] = _one_width(bits, options, checkpoint, rows, test, texts)
        with replacing(options.out / "result.json") as file:
            file.write(as_text(result).encode())
    for name, found in result["widths"].items():
        print(f"{name}: rounded {found['rtn']:.2f}, trained {found['qat']:.2f} ({found['seconds']:.0f} s)")


def _one_width(
    bits: int, options: argparse.Namespace, checkpoint: Checkpoint, rows: np.ndarray, test: Windows, texts: list[Any]
) -> dict[str, Any]:
    spec = f"int{bits}:g64"
    rounded = checkpoint.model()
    quantize_layers(rounded, scheme(spec))
    found: dict[str, Any] = {"rtn": _perplexity(rounded, test), "evaluations": {}}
    print(f"{spec}: rounded, perplexity {found['rtn']:.2f}", flush=True)
    del rounded

    recipe = one_rule(
        spec, gradient=options.gradient, **({"start": options.start} if options.gradient == "lsq" else {})
    )
    model, teacher = checkpoint.model(), checkpoint.model()
    prepare(model, recipe)
    found["start"] = _perplexity(model, test)
    print(f"{spec}: prepared, perplexity {found['start']:.2f}", flush=True)
    config = QATConfig(
        steps=options.steps,
        batch=options.batch,
        gradient_accumulation=options.accumulation,
        learning_rate=options.learning_rate,
        scale_learning_rate=options.scale_learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        gradual_bits=options.gradual_bits,
        dtype=options.dtype,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        seed=options.seed,
        mesh=options.mesh,
    )
    started = time.perf_counter()

    def listen(record: StepRecord) -> None:
        if record.evaluation:
            found["evaluations"][record.step] = record.evaluation["perplexity"]
        if record.evaluation or record.step % options.every == 0 or record.step <= 3:
            figures = "".join(f"  {name} {value:.2f}" for name, value in record.evaluation.items())
            print(
                f"{spec}: step {record.step}/{record.steps}  loss {record.loss:.4f}  ce {record.parts['ce']:.4f}  "
                f"|g| {record.grad_norm:.3f}  {record.per_second:,.0f} {record.unit}/s  "
                f"{time.perf_counter() - started:.0f} s{figures}",
                flush=True,
            )

    loss = distillation_loss(
        weight=options.weight,
        temperature=options.temperature,
        hidden_weight=options.hidden_weight,
        remat=options.remat,
        logit_rows=options.logit_rows,
    )
    train(
        model,
        loss,
        RowBatches(rows, batch=config.rows_per_step, seed=config.seed),
        config,
        teacher=teacher,
        folder=options.out / spec.replace(":", "-") if options.checkpoint_every else None,
        definition={
            "model_sha256": checkpoint.sha256(),
            "recipe": recipe.as_json(),
            "data": texts,
            "loss": {name: getattr(options, name) for name in ("window", "weight", "temperature", "hidden_weight")},
        },
        eval_fn=lambda model: {"perplexity": _perplexity(model, test)},
        listen=listen,
    )
    convert(model)
    found |= {
        "qat": _perplexity(model, test),
        "bits_per_weight": packed_bits(model),
        "seconds": time.perf_counter() - started,
        "training": dataclasses.asdict(config),
    }
    print(f"{spec}: packed, perplexity {found['qat']:.2f}, {found['bits_per_weight']:.2f} bits a weight", flush=True)
    return found


def _training_rows(
    options: argparse.Namespace, checkpoint: Checkpoint, test: Windows
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Windows of all training texts, none of which the evaluation holds a part of."""
    rows, texts = [], []
    for source in options.data:
        cut = text_windows(load_text(source), checkpoint.tokenizer(), window=options.window)
        check_disjoint(cut, test)
        rows.append(cut.tokens)
        texts.append({"text": cut.text_name, "sha256": cut.text_sha256})
    return np.concatenate(rows), texts


def _perplexity(model: nnx.Module, test: Windows) -> float:
    return perplexity(model, test, batch=1 if jax.default_backend() == "cpu" else 8).value  # pyright: ignore


_SHOWN = (
    *("form", "bits", "steps", "batch", "accumulation", "window", "learning_rate", "scale_learning_rate", "weight"),
    *("temperature", "hidden_weight", "dtype", "gradient", "start", "gradual_bits", "seed", "eval_windows"),
)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--form", choices=FORMS, default="short" if jax.default_backend() == "cpu" else "long")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=_list_of(str), default=["wikitext2:train"], metavar="TEXT,…")
    parser.add_argument("--text", default="wikitext2:test")
    parser.add_argument("--bits", type=_list_of(int), default=[3, 2], metavar="N,…")
    for name, kind in (("steps", int), ("batch", int), ("window", int), ("eval-every", int), ("learning-rate", float)):
        parser.add_argument(f"--{name}", type=kind, help="by default the form's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default the form's")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--scale-learning-rate", type=float, default=5e-4)
    parser.add_argument("--warmup-steps", type=int)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--gradient", choices=("lsq", "clipped_ste", "ste"), default="lsq")
    parser.add_argument("--start", choices=("mse", "range", "lsq"), default="mse", help="of LSQ's scales")
    parser.add_argument("--gradual-bits", type=_stages, default=(), metavar="STEP:BITS,…", help="before STEP so many")
    parser.add_argument("--weight", type=float, default=1.0, help="of the teacher; the rest is the next token's")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--hidden-weight", type=float, default=0.0)
    parser.add_argument("--logit-rows", type=int, default=2048)
    parser.add_argument("--remat", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--checkpoint-every", type=int, help="keep states in DIR, and go on from them")
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--every", type=int, default=50, help="steps between printed lines")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, value in FORMS[options.form].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _list_of(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def _stages(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [part.split(":") for part in text.split(",")]
    return tuple((int(step), int(bits)) for step, bits in pairs)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
