"""Methods by bits: what each way to choose codes costs in perplexity, from 8 bits down to 2, on one model.

Command:   python experiments/methods_by_bits.py --out DIR        (options as `jquant sweep`, as --text FILE)
Cost:      40 cells, the reference and one pass over 32 calibration windows: some 20 minutes of 2 busy CPU cores with
           the demo model. Statistics 45 s, then a cell of rtn 5, gptq 12, rtn-mse 16, hqq 30 to 45, awq 60 to 70 s,
           evaluation among it; 3 GB of memory. In parts: --groups 64 first; a second call with the same --out goes on
Expected:  at 8 bits all methods alike; below, gptq first, then awq, and both far before methods that do not look at
           data; at 2 bits only gptq leaves a language model. A smaller weight error alone (rtn-mse, hqq) does not help
           at 4 and 3 bits
Note:      the demo's weights are 4-bit (Q4_1, groups of 32) decoded to floats. Statistics are of the float model, for
           all cells the same; `jquant quantize` works on the model as quantized so far

Measured:  SmolLM2-135M-Instruct, text pydoc (Python 3.11), 4 windows of 512 tokens, calibration 32 windows of
           pydoc:calibration, asymmetric integers with float16 scales. Perplexity (KL, nats a token); float: 14.13,
           standard error 0.94, so that KL tells apart what perplexity does not. 2026-11-27, CPU, all in one folder

    bits  group         rtn              rtn-mse             hqq              awq              gptq
    8      64      14.13 (.00113)    14.14 (.00111)    14.13 (.00111)   14.15 (.00049)   14.13 (.00032)
    8     128      14.17 (.00140)    14.17 (.00138)    14.18 (.00135)   14.11 (.00065)   14.15 (.00041)
    4      64      18.74 (0.298)     20.31 (0.324)     20.52 (0.371)    15.60 (0.119)    14.72 (0.065)
    4     128      19.05 (0.359)     19.88 (0.387)     20.80 (0.427)    16.77 (0.154)    14.55 (0.079)
    3      64      44.40 (1.22)      52.13 (1.27)      50.35 (1.25)     26.71 (0.578)    16.69 (0.229)
    3     128      88.06 (1.80)      80.35 (1.65)      88.42 (1.79)     31.22 (0.761)    17.85 (0.294)
    2      64     426,704 (10.2)    12,404 (6.55)     19,092 (7.01)     3,750 (5.39)     40.34 (1.10)
    2     128   4,200,095 (12.4)    69,134 (8.40)     47,563 (7.89)   125,399 (9.01)     52.77 (1.34)

           awq+gptq at 3 bits, groups of 64 (--schemes int3:asym:fp16 --groups 64 --methods awq+gptq): 16.74 (0.219),
           far below awq, and beside gptq within the noise: its KL is lower, its perplexity is not. Its scales are
           searched by GPTQ's own error; with scales that suit rounding to nearest, as behind awq alone, it was 18.33
           (0.242), clipped before gptq as well 20.42 (0.328), when that was tried (2026-11-25). On WikiText-2 (test, 16
           windows; calibration: validation, 32 windows) it is below both, awq+gptq, gptq, awq, rtn: at 3 bits 54.43
           (0.457), 57.21 (0.491), 72.62 (0.716), 117.5 (1.31), at 4 bits 40.01 (0.122), 40.67 (0.129), 42.27 (0.154),
           47.96 (0.351); float 36.00
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
