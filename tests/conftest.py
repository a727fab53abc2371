"""Set up before anything imports jquant or asks for a device: annotations are held to, and there are 8 devices.

Compiling is most of what tests do: programs are kept in a folder, for both workers, for the processes that tests start,
and for the next run. XLA finds them by the whole program, its options and its own version.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest

import tests.runtime_types  # noqa: F401  the hook finds it by name

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
MAPS = 30_000  # at which compiled programs are dropped
jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("JQUANT_PRODUCTS", "float32")  # on every CPU, or tests of what layers read would need to know
for name, value in {
    "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
# Rooms whose functions are about arrays: the hook slows every call of what it hooks, loops over labels included.
ROOMS = ["core", "kernels", "calib", "nn", "models", "ptq", "qat", "evaluation"]
jaxtyping.install_import_hook([f"jquant.{room}" for room in ROOMS], "tests.runtime_types.shapes_checked")


@pytest.fixture(scope="module", autouse=True)
def programs_dropped() -> Iterator[None]:
    """A compiled program maps memory some three times, and Linux allows a process 65,530 maps: beyond, XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def annotations_unchecked() -> Iterator[None]:
    """For tests of our own messages on wrong arrays: users have no type checker in front of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
