"""How Pallas compiles a kernel for Triton."""

from __future__ import annotations

from typing import Any


def triton_options(warps: int, interpret: bool) -> dict[str, Any]:
    """Arguments of `pallas_call` for a program of so many warps; none where its operations run one by one."""
    if interpret:
        return {}
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=1)}
