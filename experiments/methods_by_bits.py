"""Methods by bits: what each way to choose codes costs in perplexity, from 8 bits down to 2, on one model.

Command:   python experiments/methods_by_bits.py --out DIR        (options as `jquant sweep`, as --text FILE)
Cost:      40 cells, the reference and one pass over 32 calibration windows; of quantization, on 2 busy CPU cores with
           the demo model: statistics 110 to 190 s, then a cell of rtn 2 s, rtn-mse 15 to 40, gptq 30 to 50, hqq 30 to
           130, awq 60 to 160; 3 GB of memory. In parts: --groups 64 first; a second call with the same --out goes on
Expected:  at 8 bits all methods alike; below, gptq first, then awq, and both far before methods that do not look at
           data; at 2 bits only gptq leaves a language model. A smaller weight error alone (rtn-mse, hqq) does not help
           at 4 and 3 bits
Note:      the demo's weights are 4-bit (Q4_1, groups of 32) decoded to floats. Statistics are of the float model, for
           all cells the same; `jquant quantize` works on the model as quantized so far

Measured:  SmolLM2-135M-Instruct, text pydoc (Python 3.11), 4 windows of 512 tokens, calibration 32 windows of
           pydoc:calibration, asymmetric integers with float16 scales. Perplexity (KL, nats a token); float: 14.13,
           standard error 0.94. 2026-11-25, CPU

    bits  group         rtn             rtn-mse            hqq              awq              gptq
    8      64      14.13 (0.0011)   14.14 (0.0011)   14.13 (0.0011)    not measured     not measured
    4      64      18.74 (0.298)    20.31 (0.324)    20.52 (0.371)    15.60 (0.119)    14.72 (0.065)
    4     128      19.04 (0.359)    19.88 (0.387)    20.80 (0.427)     not measured     not measured
    3      64      44.40 (1.22)     52.12 (1.27)     50.34 (1.25)     26.70 (0.578)    16.69 (0.229)
    2      64     426,704 (10.2)   12,524 (6.56)    19,092 (7.01)     3,750 (5.39)     40.27 (1.10)

           awq+gptq at 3 bits, groups of 64 (--schemes int3:asym:fp16 --groups 64 --methods awq+gptq): 17.18 (0.226;
           GPTQ's own loss, with its damping, as what is searched: the exact error since, not run again on this text),
           far below awq, and beside gptq within the noise (its KL is lower, its perplexity is not); with scales that
           suit rounding to nearest, as behind awq alone, 18.33 (0.242); clipped before gptq as well, 20.42 (0.328).
           On WikiText-2 (test, 16 windows; calibration: validation, 32 windows) it is below gptq: at 3 bits 54.42
           (0.457) against 57.20 (0.491), at 4 bits 39.77 (0.119) against 40.67 (0.129); float 36.00
"""

from __future__ import annotations

import sys

from jquant.cli import main

SCHEMES = ("int8:asym:fp16", "int4:asym:fp16", "int3:asym:fp16", "int2:asym:fp16")  # asymmetric, so that HQQ fits
GROUPS = (64, 128)
METHODS = ("rtn", "rtn-mse", "hqq", "awq", "gptq")

if __name__ == "__main__":
    grid = ["--schemes", ",".join(SCHEMES), "--groups", ",".join(map(str, GROUPS)), "--methods", ",".join(METHODS)]
    protocol = ["--text", "pydoc", "--window", "512", "--windows", "4", "--calibration", "pydoc:calibration"]
    sys.exit(main(["sweep", "demo", *grid, *protocol, "--calibration-windows", "32", *sys.argv[1:]]))
