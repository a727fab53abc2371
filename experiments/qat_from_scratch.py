"""A small language model from nothing: what 4, 3 and 2 bits cost it by rounding, by GPTQ, and after training.

Command:   python experiments/qat_from_scratch.py --out DIR          (goes on where an earlier call was stopped)
Cost:      12 minutes of CPU time, 700 MB of memory
Expected:  2 bits by rounding lose 0.48 nats a byte, GPTQ gives back four fifths of that and QAT all of it. At 3 and 4
           bits QAT ends below the float model it was distilled from, by 0.008 ± 0.001 and 0.006 ± 0.002, which fits its
           text closely (0.97 there, 1.31 on the held-out one); as many further steps in floats on that text gain
           nothing
Model:     a Llama of 3 blocks over bytes, 1.4 million parameters, trained for 1,000 steps of 1,024 bytes on the
           calibration part of Python's language reference (data/embedded.py); figures are of 32 KB of its evaluation
           part
Protocol:  all linear layers of the blocks, groups of 64 inputs with zero points. RTN and GPTQ start from the float
           model; so does QAT, 300 steps that train weights, scales and zero points (LSQ) on the float model's training
           text, by its predictions alone. "recovered" is the share of what rounding loses, in nats
Measured:  2026-11-25, CPU (jax 0.10.2)

    float 1.3128 nats a byte, standard error 0.0217
    float, trained on for as many steps as QAT: 1.3132
    scheme                    rtn     gptq      qat   recovered: gptq    qat
    int4:g64:asym          1.3224   1.3145   1.3048               82 %  184 %
    int3:g64:asym          1.3512   1.3203   1.3066               80 %  116 %
    int2:g64:asym          1.7899   1.3954   1.3115               83 %  100 %

The standard error is of the text, common to all rows; differences from the float model have 0.001 to 0.002.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jquant.core.scheme import scheme
from jquant.data.blocks import Windows, text_windows
from jquant.data.text import load_text
from jquant.evaluation.perplexity import perplexity
from jquant.io.atomic import replacing
from jquant.io.json_file import as_text
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.ptq.pipeline import quantize_model
from jquant.ptq.recipe import one_rule
from jquant.ptq.rtn import quantize_layers
from jquant.qat import rules
from jquant.qat.batches import RowBatches
from jquant.qat.config import QATConfig
from jquant.qat.convert import convert
from jquant.qat.losses import distillation_loss, next_token_loss
from jquant.qat.prepare import prepare
from jquant.qat.trainer import train


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The experiment's sizes."""

    bits: tuple[int, ...] = (4, 3, 2)
    scheme: str = "int{bits}:g64:asym"
    hidden: int = 192
    feed_forward: int = 512
    layers: int = 3
    window: int = 128
    batch: int = 8
    float_steps: int = 1000
    float_rate: float = 2e-3
    qat_steps: int = 300
    qat_rate: float = 1e-3
    scale_rate: float = 1e-3
    calibration_windows: int = 128
    windows: int = 256  # that figures are of

    def of_float(self) -> dict[str, Any]:
        """What the float model depends on."""
        names = ("hidden", "feed_forward", "layers", "window")
        return {name: getattr(self, name) for name in names}


class Bytes:
    """A token a byte."""

    add_bos = False

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of states and figures")
    for field in dataclasses.fields(Settings):
        if field.name != "bits":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    print(run(options.pop("out"), Settings(**options)))
    return 0


def run(out: Path, settings: Settings) -> str:
    """The table; figures that `out` holds are taken from there."""
    learned, held_out = (
        text_windows(load_text(text), Bytes(), window=settings.window, limit=limit)
        for text, limit in (("pydoc:calibration", None), ("pydoc", settings.windows))
    )
    model = float_model(out, settings, learned)
    cell = _Cells(out, settings, held_out)
    rows = {
        "float": cell("float", lambda: model),
        "float, on": cell("float, on", lambda: trained_on(out, model, learned, settings)),
    }
    for bits in settings.bits:
        spec = settings.scheme.format(bits=bits)
        rows |= {
            f"{spec} rtn": cell(f"{spec} rtn", lambda spec=spec: by_rtn(model, spec)),
            f"{spec} gptq": cell(f"{spec} gptq", lambda spec=spec: by_gptq(model, spec, learned, settings)),
            f"{spec} qat": cell(f"{spec} qat", lambda spec=spec: by_qat(out, model, spec, learned, settings)),
        }
    return table(rows, settings)


def float_model(out: Path, settings: Settings, learned: Windows) -> Decoder:
    """Trained from random weights; the trainer's folder holds it."""
    config = ModelConfig(
        architecture="llama",
        vocab_size=256,
        hidden_size=settings.hidden,
        intermediate_size=settings.feed_forward,
        num_layers=settings.layers,
        num_heads=settings.hidden // 32,
        num_kv_heads=settings.hidden // 32,
        head_dim=32,
        norm_eps=1e-5,
        max_length=settings.window,
        tie_embeddings=True,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    how = QATConfig(
        learning_rate=settings.float_rate,
        final_rate=0.1,
        weight_decay=0.1,
        adam_b2=0.95,
        steps=settings.float_steps,
        batch=settings.batch,
        checkpoint_every=100,
        keep=1,
    )
    batches = RowBatches(np.asarray(learned.tokens), batch=settings.batch, seed=0)
    train(model, next_token_loss(), batches, how, folder=out / "float", definition=settings.of_float())
    return model


def trained_on(out: Path, model: Decoder, learned: Windows, settings: Settings) -> Decoder:
    """The float model after as many further steps as QAT takes: what is not quantization's."""
    copy = nnx.clone(model)
    how, batches = _training(settings), RowBatches(np.asarray(learned.tokens), batch=settings.batch, seed=1)
    train(copy, next_token_loss(), batches, how, folder=out / "float-on", definition=settings.of_float())
    return copy


def by_rtn(model: Decoder, spec: str) -> Decoder:
    """Rounded to nearest."""
    copy = nnx.clone(model)
    quantize_layers(copy, scheme(spec))
    return copy


def by_gptq(model: Decoder, spec: str, learned: Windows, settings: Settings) -> Decoder:
    """By GPTQ, on windows of the training text."""
    batches = [window[None] for window in learned.tokens[: settings.calibration_windows]]
    return quantize_model(nnx.clone(model), one_rule("gptq", spec), batches)[0]


def by_qat(out: Path, model: Decoder, spec: str, learned: Windows, settings: Settings) -> Decoder:
    """Weights and scales trained, distilled from the float model; then packed."""
    student = nnx.clone(model)
    prepare(student, rules.one_rule(spec, gradient="lsq"), announce=lambda _: None)
    how, batches = _training(settings), RowBatches(np.asarray(learned.tokens), batch=settings.batch, seed=1)
    folder, definition = out / spec.replace(":", "-"), {**settings.of_float(), "spec": spec}
    train(student, distillation_loss(), batches, how, teacher=model, folder=folder, definition=definition)
    return convert(student)


def _training(settings: Settings) -> QATConfig:
    return QATConfig(
        learning_rate=settings.qat_rate,
        scale_learning_rate=settings.scale_rate,
        final_rate=0.0,
        adam_b2=0.95,
        steps=settings.qat_steps,
        batch=settings.batch,
        checkpoint_every=100,
        keep=1,
    )


class _Cells:
    """Held-out losses by name, in nats a byte: read where they are there, otherwise worked out and written."""

    def __init__(self, out: Path, settings: Settings, held_out: Windows) -> None:
        self.out, self.settings, self.held_out = out, settings, held_out

    def __call__(self, name: str, make: Callable[[], Decoder]) -> dict[str, float]:
        path = self.out / f"{re.sub('[:, ]+', '-', name)}.json"
        wanted = _json(self.settings)
        if path.exists():
            record = json.loads(path.read_text())
            if record["settings"] == wanted:
                return record["figures"]
        started = time.perf_counter()
        found = perplexity(make(), self.held_out)
        figures = {"loss": found.nll, "stderr": found.stderr, "seconds": time.perf_counter() - started}
        with replacing(path) as file:
            file.write(as_text({"name": name, "settings": wanted, "figures": figures}).encode())
        print(f"{name}: {found.nll:.4f} nats a byte, {figures['seconds']:.0f} s", file=sys.stderr)
        return figures


def table(rows: dict[str, dict[str, float]], settings: Settings) -> str:
    """Losses, what each method lost, and how much of rounding's loss it recovered."""
    float_loss = rows["float"]["loss"]
    lines = [f"float {float_loss:.4f} nats a byte, standard error {rows['float']['stderr']:.4f}"]
    lines.append(f"float, trained on for as many steps as QAT: {rows['float, on']['loss']:.4f}")
    lines.append(f"{'scheme':20} {'rtn':>8} {'gptq':>8} {'qat':>8}   recovered: gptq    qat")
    for bits in settings.bits:
        spec = settings.scheme.format(bits=bits)
        rtn, gptq, qat = (rows[f"{spec} {method}"]["loss"] for method in ("rtn", "gptq", "qat"))
        share = [100 * (rtn - loss) / (rtn - float_loss) for loss in (gptq, qat)]
        lines.append(f"{spec:20} {rtn:8.4f} {gptq:8.4f} {qat:8.4f}   {share[0]:14.0f} % {share[1]:4.0f} %")
    return "\n".join(lines)


def _json(settings: Settings) -> dict[str, Any]:
    record = dataclasses.asdict(settings)
    return {**record, "bits": list(record["bits"])}


if __name__ == "__main__":
    sys.exit(main())
