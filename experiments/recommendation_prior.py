"""What `jquant recommend` expects schemes to lose where the user has no sweep: its candidates on the demo model.

Command:   python experiments/recommendation_prior.py --out DIR        (options as `jquant sweep`, as --text FILE)
Cost:      24 cells, the reference and four passes over 32 calibration windows: 20 minutes on 2 busy CPU cores; a
           second call with the same --out goes on
Expected:  8 bits within 4 %, GPTQ within 6 % at 4 bits of integers, nothing usable at 2 bits. Measured figures,
           2026-11-25 on CPU: jquant/hardware/expected_loss.py, float 14.602
Note:      one model of 135 million parameters on 4,096 tokens of text: larger models lose less at equal bits (GPTQ,
           2210.17323, tables 3 and 4), and this one's weights were 4-bit already (Q4_1)
"""

from __future__ import annotations

import sys

from jquant.cli import main

PARTS: tuple[tuple[str, str], ...] = (
    (
        "int8:channel:fp16,fp8_e4m3:channel:fp16,mxfp8_e4m3,nvfp4,mxfp4,nf4:g64:dq,q8_0,q5_0,q4_0,iq4_nl",
        "rtn",
    ),
    ("int8:channel", "rtn@int8:token,smoothquant@int8:token"),
    ("fp8_e4m3:channel", "rtn@fp8_e4m3:token"),
    ("fp8_e4m3fnuz:channel", "rtn@fp8_e4m3fnuz:token"),
    ("int4:g128:asym:fp16", "rtn,gptq,awq"),
    ("int4:g64:asym:fp16", "hqq,gptq"),
    ("int4:g128:fp16,nvfp4,mxfp4,int3:g64:asym:fp16,int2:g64:asym:fp16", "gptq"),
)

if __name__ == "__main__":
    protocol = ["--text", "pydoc", "--window", "512", "--windows", "8", "--calibration", "pydoc:calibration"]
    for schemes, methods in PARTS:
        words = ["sweep", "demo", "--schemes", schemes, "--methods", methods, *protocol, "--no-report", *sys.argv[1:]]
        if code := main(words):
            sys.exit(code)
