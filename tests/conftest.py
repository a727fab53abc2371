"""Set up before anything imports jquant or asks for a device: annotations are held to, and there are 8 devices."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

import tests.runtime_types  # noqa: F401  the hook finds it by name

MAPS = 30_000  # at which compiled programs are dropped
jax.config.update("jax_num_cpu_devices", 8)
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


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For modules whose tests compile the same steps again and again: they are kept."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.2), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
