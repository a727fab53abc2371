"""Which implementation runs: the one place that knows, for every kernel, of platform and shape.

    auto        kernels where the platform has them and they are faster, else jnp (the default)
    jnp         never a kernel
    interpret   kernels, their operations run one by one: for tests, on any platform

Set JQUANT_KERNELS before the start, or `override` for a while. What a kernel cannot do runs in jnp, without an error.
Kernels are for one device: arrays that are spread over several stay with XLA, which knows how to divide the work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal, get_args

import jax

from jquant.core.errors import InputError

Mode = Literal["auto", "jnp", "interpret"]
Way = Literal["jnp", "kernel", "interpret"]

_chosen: list[Mode] = []  # of `override`, the innermost last


def way() -> Way:
    """How kernels run here and now. Ask outside of jit, or make the answer a static argument."""
    mode = _chosen[-1] if _chosen else os.environ.get("JQUANT_KERNELS", "auto")
    if mode not in get_args(Mode):
        raise InputError(f"JQUANT_KERNELS={mode}: it must be one of {', '.join(get_args(Mode))}")
    if mode == "interpret":
        return "interpret"
    return "kernel" if mode == "auto" and on_cuda() and jax.device_count() == 1 else "jnp"


@contextlib.contextmanager
def override(mode: Mode) -> Iterator[None]:
    """Another mode than JQUANT_KERNELS says. Forgets all compiled programs, as those of models hold what was chosen."""
    _chosen.append(mode)
    jax.clear_caches()
    try:
        yield
    finally:
        _chosen.pop()
        jax.clear_caches()


def on_cpu() -> bool:
    """Whether programs run on CPU by default, where sizes of stretches and batches are others."""
    return jax.default_backend() == "cpu"


def on_cuda() -> bool:
    """Whether programs run on an NVIDIA GPU by default."""
    return jax.default_backend() == "gpu" and "cuda" in getattr(jax.devices()[0].client, "platform_version", "").lower()
