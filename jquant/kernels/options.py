"""How Pallas compiles a kernel that is written for Triton, and for TPUs where they can run it too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

_TPU_LANES = 128  # the least width of a block there that is not a whole array's

_lowering_for_tpu: list[bool] = []  # an entry for each `lowering_for_tpu` that has begun


def triton_options(warps: int, interpret: bool) -> dict[str, Any]:
    """Arguments of `pallas_call` for a program of so many warps; none where it is interpreted, or on TPUs."""
    if interpret or for_tpu():
        return {}
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=1)}


def assembles(interpret: bool) -> bool:
    """Whether a kernel may hold NVIDIA's assembly."""
    return not interpret and not for_tpu()


def lanes(width: int) -> int:
    """Columns of a program: so many, and as many as a TPU wants there."""
    return max(width, _TPU_LANES) if for_tpu() else width


def for_tpu() -> bool:
    """Whether kernels are made for a TPU."""
    return bool(_lowering_for_tpu) or jax.default_backend() == "tpu"


@contextlib.contextmanager
def lowering_for_tpu() -> Iterator[None]:
    """Kernels are made for a TPU wherever this is, to see that they can be."""
    _lowering_for_tpu.append(True)
    try:
        yield
    finally:
        _lowering_for_tpu.pop()
