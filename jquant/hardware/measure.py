"""Measures the local device: bandwidth by copying, rates by multiplying square matrices, in as many bits as asked.

    bandwidth   2 · bytes / seconds of y = s·x in place: each byte is read once and written once
    rate        2 · n³ / seconds of A·B in a format, [n, n] each, with sums in float32 or int32

The best of several runs is taken: what the device can do, not what it does beside other work. A rate is that of XLA's
own multiplication: where XLA decodes a format first, or loops over it without the instructions that the device has, the
measured rate says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jquant.core.errors import InputError

_DTYPES: dict[str, Any] = {
    "fp32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "int8": np.int8,
    "fp8": ml_dtypes.float8_e4m3fn,
    "fp8fnuz": ml_dtypes.float8_e4m3fnuz,
}
MEASURABLE = tuple(_DTYPES)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one device reached."""

    bandwidth_gb_s: float
    copied_bytes: int
    tera_rates: Mapping[str, float]  # 1e12 operations a second, by format
    side: int  # of the matrices


def measure(
    formats: Sequence[str] = ("fp32", "bf16", "int8"),
    *,
    copied_bytes: int = 1 << 28,
    side: int = 2048,
    seconds: float = 0.5,
    device: Any = None,
) -> Measured:
    """Bandwidth and rates of one device.

    Args:
        formats: to multiply in, of MEASURABLE.
        copied_bytes: of the array that is copied; much more than the device's caches hold.
        side: rows and columns of the matrices.
        seconds: to spend on each figure at least, compilation not counted.
        device: a jax.Device; by default JAX's first.

    Raises:
        InputError: a format is not one that JAX multiplies, or a size is not positive.
    """
    unknown = [name for name in formats if name not in _DTYPES]
    if unknown:
        raise InputError(f"format {unknown[0]!r}: cannot be measured; there are {', '.join(MEASURABLE)}")
    if copied_bytes < 4 or side < 1 or not seconds > 0:
        raise InputError(
            f"copied_bytes {copied_bytes}, side {side}, seconds {seconds:g}: they must be at least 4, 1 and above 0"
        )
    device = jax.devices()[0] if device is None else device
    return Measured(
        bandwidth_gb_s=measure_bandwidth(copied_bytes, seconds=seconds, device=device) / 1e9,
        copied_bytes=copied_bytes,
        tera_rates={name: measure_rate(name, side, seconds=seconds, device=device) / 1e12 for name in formats},
        side=side,
    )


def measure_bandwidth(copied_bytes: int, *, seconds: float, device: Any) -> float:
    """Bytes a second that are read and written together."""
    x = jax.device_put(np.ones(copied_bytes // 4, np.float32), device)
    # One, but not to the compiler. The array is donated: a fresh one would cost its pages, too.
    scale = jax.device_put(np.float32(1), device)

    def run() -> None:
        nonlocal x
        x = _scaled(x, scale)
        x.block_until_ready()

    return 2 * x.nbytes / _best(run, seconds)


def measure_rate(name: str, side: int, *, seconds: float, device: Any) -> float:
    """Operations a second of a product of two square matrices in this format."""
    dtype = np.dtype(_DTYPES[name])
    values = np.random.default_rng(0).integers(-3, 4, (2, side, side))
    left, right = (jax.device_put(matrix.astype(dtype), device) for matrix in values)
    sums = jnp.int32 if name.startswith("int") else jnp.float32
    return 2.0 * side**3 / _best(lambda: _product(left, right, sums).block_until_ready(), seconds)


@partial(jax.jit, donate_argnums=0)
def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x


@partial(jax.jit, static_argnums=2)
def _product(left: jax.Array, right: jax.Array, sums: Any) -> jax.Array:
    # HIGHEST: float32 is multiplied as float32, not as tf32 or in three passes of bf16.
    contracted = (((1,), (0,)), ((), ()))
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(left, right, contracted, precision=precision, preferred_element_type=sums)


def _best(run: Callable[[], Any], seconds: float) -> float:
    """Least time of a run, of at least three and as many as `seconds` hold; the first, which compiles, not counted."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
