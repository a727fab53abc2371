"""Methods by bits: what each way to choose codes costs in perplexity, from 8 bits down to 2, on one model.

Command:   python experiments/methods_by_bits.py --out DIR        (options as `jquant sweep`, as --text FILE)
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
