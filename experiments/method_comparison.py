"""The guide's appendix A as a measured table: what each method costs in perplexity and KL on a given model.

Command:   python experiments/method_comparison.py demo --out DIR     (options as below; a second call goes on)
Cost:      on two busy CPU cores and the demo model ten minutes, most of it AWQ's search and the statistics; 3 GB
Note:      "bits" counts scales. "bound" is 16 / bits: what reading fewer bytes can speed decoding up by over 16-bit
           weights, and no more; the appendix' "2x" and "4x" are that bound for 8 and 4 bits without scales.
           Q4_K_M is llama.cpp's mix, embedding and output projection included, with its fallback types where rows are
           no multiple of 256; the others quantize the blocks

Measured:  SmolLM2-135M-Instruct (its weights are 4-bit decoded to floats), text pydoc, 4 windows of 512 tokens,
           calibration 16 windows of pydoc:calibration. Float: perplexity 14.13. 2026-11-25, CPU

    method            ours                                   bits  bound  perplexity    KL     the guide says
    INT8 SmoothQuant  int8:channel smoothquant@int8:token    8.05  2.0x   14.28  +1.1 %  0.008  Very Good
    FP8 (E4M3)        fp8_e4m3:channel rtn@fp8_e4m3:token    8.05  2.0x   14.60  +3.3 %  0.031  Excellent
    GGUF Q4_K_M       q4_k_m                                 6.16  2.6x   15.34  +8.6 %  0.051  Good
    GPTQ              int4:g128:fp16 gptq                    4.14  3.9x   14.95  +5.8 %  0.092  Good
    AWQ               int4:g128:asym:fp16 awq                4.17  3.8x   16.72 +18.4 %  0.153  Good
    NF4 (QLoRA)       nf4:g64:dq                             4.13  3.9x   18.66 +32.0 %  0.272  Moderate
    (rounding)        int4:g128:fp16                         4.14  3.9x   23.47 +66.1 %  0.526  not in it

           Which of the appendix' adjectives hold here: the order of the 4-bit methods does (GPTQ and AWQ before NF4).
           FP8 before INT8 does not: three bits of mantissa lose more than int8's codes once SmoothQuant has moved the
           outliers. GPTQ and AWQ are not alike: AWQ loses three times as much. Q4_K_M is no 4-bit format on this model,
           whose rows of 576 take 5- and 8-bit fallbacks. "Good" is not "within the guide's 5 % of perplexity": of the
           4-bit rows none is, on a model this small. GPTQ is the nearest
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jquant.sweep.config import SweepConfig


class Row(NamedTuple):
    """A line of the appendix: its name, our spec of it, and what it says of quality."""

    name: str
    scheme: str
    method: str
    calibration: str
    claim: str


ROWS = (
    Row("FP8 (E4M3)", "fp8_e4m3:channel", "rtn@fp8_e4m3:token", "none", "Excellent"),
    Row("INT8 SmoothQuant", "int8:channel", "smoothquant@int8:token", "yes", "Very Good"),
    Row("GPTQ", "int4:g128:fp16", "gptq", "yes", "Good"),
    Row("AWQ", "int4:g128:asym:fp16", "awq", "yes", "Good"),
    Row("NF4 (QLoRA)", "nf4:g64:dq", "rtn", "none", "Moderate"),
    Row("(rounding, int4)", "int4:g128:fp16", "rtn", "none", "not in it"),
)
K_QUANT = Row("GGUF Q4_K_M", "q4_k_m", "rtn", "none", "Good")


def sweeps(options: argparse.Namespace) -> tuple[Any, dict[Row, Any]]:
    """Every row but the GGUF mix, by one sweep a row in one folder: what is there is not run again."""
    from jquant.sweep.run import run_sweep

    found, reference = {}, None
    for row in ROWS:
        config = SweepConfig(
            model=options.model,
            schemes=(row.scheme,),
            methods=(row.method,),
            out=options.out,
            text=options.text,
            window=options.window,
            windows=options.windows,
            calibration=options.calibration,
            calibration_windows=options.calibration_windows,
            report=False,
        )
        sweep = run_sweep(config)
        (found[row],), reference = sweep.cells, sweep.reference
        print(f"{row.name}: perplexity {found[row].perplexity:.3f}", file=sys.stderr)
    return reference, found


def k_quant(options: argparse.Namespace) -> tuple[float, float, float]:
    """Perplexity, KL and bits a weight of the mix, measured as the sweep measures."""
    import jax

    from jquant import (
        evaluate,
        load_model,
        load_text,
        load_tokenizer,
        prepare_reference,
        preset,
        quantize_model,
        text_windows,
    )
    from jquant.nn.matrices import layer_shapes

    model, batch = load_model(options.model), 1 if jax.default_backend() == "cpu" else 8
    text = load_text(options.text)
    windows = text_windows(text, load_tokenizer(options.model), window=options.window, limit=options.windows)
    reference, _ = prepare_reference(load_model(options.model), windows, batch=batch)
    model, coverage = quantize_model(model, preset("q4_k_m", layer_shapes(model)))
    found = evaluate(model, windows, reference=reference, batch=batch)
    weights = {layer.path: layer.shape[0] * layer.shape[1] for layer in coverage.layers}
    bits = sum(layer.bits_per_weight * weights[layer.path] for layer in coverage.layers) / sum(weights.values())
    assert found.divergence is not None
    return found.perplexity.value, found.divergence.kl.value, bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--calibration", default="pydoc:calibration")
    parser.add_argument("--calibration-windows", type=int, default=16)
    options = parser.parse_args()
    reference, cells = sweeps(options)
    lines = [(row, cell.bits_per_weight, cell.perplexity, cell.kl, cell.top1) for row, cell in cells.items()]
    perplexity, kl, bits = k_quant(options)
    lines.append((K_QUANT, bits, perplexity, kl, float("nan")))
    print("| Method | Ours | Bits | Bound | Data | Perplexity | Increase | KL | The guide says |")
    print("|-|-|-|-|-|-|-|-|-|")
    print(f"| float | | 32 | | | {reference.perplexity:.2f} | | 0 | |")
    for row, bits, perplexity, kl, _ in sorted(lines, key=lambda line: line[3]):
        print(
            f"| {row.name} | {row.scheme} {row.method} | {bits:.3f} | {16 / bits:.1f}x | {row.calibration} | "
            f"{perplexity:.2f} | {perplexity / reference.perplexity - 1:+.1%} | {kl:.4f} | {row.claim} |"
        )


if __name__ == "__main__":
    main()
