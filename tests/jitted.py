"""`quantize` and `dequantize` as one program each: step by step every operation compiles a program of its own.

That the steps give the same bits is a law that core/test_laws.py holds on every scheme.
"""

from __future__ import annotations

import jax

from jquant.core import qtensor

quantize = jax.jit(qtensor.quantize, static_argnames="scheme")
dequantize = jax.jit(qtensor.dequantize, static_argnames="dtype")
