"""Formats by group sizes: what each number format costs in perplexity at each size, on one model.

Command:   scripts/demo            (python experiments/formats_by_groups.py --out DIR, options as `jquant sweep`)
Cost:      24 cells and the reference, 3 to 5 minutes on 2 CPU cores with the demo model, 3 GB of memory
Expected:  int8 within 1 % of the float model's perplexity, fp8_e4m3 a little above; at 4 bits smaller groups are
           better, asymmetric codes better than symmetric, nvfp4 and nf4 better than int4 of the same size; 3 bits
           unusable without a method that looks at data
Note:      the demo's weights are 4-bit (Q4_1, groups of 32) decoded to floats. That makes int4:g32:asym no easier: Q4_1
           has a float minimum where ours is a whole-number zero point, so the grids do not coincide
"""

from __future__ import annotations

import sys

from jquant.cli import main

SCHEMES = (
    "int8:channel:fp16",
    "int8:g128:fp16",
    "fp8_e4m3:channel:fp16",
    "fp8_e5m2:channel:fp16",
    "mxfp8_e4m3",
    "mxint8",
    "int6:g64:fp16",
    "mxfp6_e2m3",
    "int5:g64:fp16",
    "int4:channel:fp16",
    "int4:g128:fp16",
    "int4:g64:fp16",
    "int4:g32:fp16",
    "int4:g128:asym:fp16",
    "int4:g64:asym:fp16",
    "int4:g32:asym:fp16",
    "nf4:g128",
    "nf4:g64",
    "nf4:g64:dq",
    "mxfp4",
    "mxfp4:even",
    "nvfp4",
    "int3:g64:asym:fp16",
    "int3:g32:asym:fp16",
)

if __name__ == "__main__":
    defaults = ["demo", "--schemes", ",".join(SCHEMES), "--text", "pydoc", "--window", "512", "--windows", "8"]
    sys.exit(main(["sweep", *defaults, *sys.argv[1:]]))
