"""The device this process runs on: what JAX and the system say of it, and its row in the table where it has one."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jquant.hardware.devices import Device, Figure, Kind, Source, device_of_kind
from jquant.hardware.measure import Measured

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# Flags of /proc/cpuinfo that say that dot products in a format are instructions.
_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True, kw_only=True)
class LocalDevice:
    """What was detected."""

    platform: str  # JAX's: "cpu", "gpu", "tpu", …
    description: str  # JAX's device_kind, or the CPU's model
    count: int
    memory_bytes: float | None  # of one, as its runtime or the system says
    native: tuple[str, ...]  # of a CPU, by its flags; of others see `known`
    known: Device | None  # its row in the table

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "platform": self.platform,
            "description": self.description,
            "count": self.count,
            "memory_bytes": self.memory_bytes,
            "native": list(self.native),
            "known": None if self.known is None else self.known.name,
        }


def local_device() -> LocalDevice:
    """JAX's default device."""
    devices = jax.devices()
    first = devices[0]
    if first.platform == "cpu":
        model, flags = _cpu_model(), _cpu_flags()
        # The table's CPUs are whole sockets, of which a process may have a part: Apple's chips alone are matched.
        known = device_of_kind(model) if model.lower().startswith("apple") else None
        return LocalDevice(
            platform="cpu",
            description=model,
            count=1,
            memory_bytes=_system_memory(),
            native=("fp32", *_named(flags, "bf16", _BF16_FLAGS), *_named(flags, "int8", _INT8_FLAGS)),
            known=known,
        )
    known = device_of_kind(first.device_kind)
    return LocalDevice(
        platform=first.platform,
        description=first.device_kind,
        count=len(devices),
        memory_bytes=_device_memory(first),
        native=() if known is None else tuple(known.rates),
        known=known,
    )


def measurable_formats(local: LocalDevice) -> tuple[str, ...]:
    """What to multiply in when measuring it: floats and int8, and the kind of fp8 that is native."""
    fp8 = () if local.known is None else tuple(name for name in ("fp8", "fp8fnuz") if local.known.native(name))
    return ("fp32", "bf16", "int8", *fp8)


def measured_device(local: LocalDevice, measured: Measured) -> Device:
    """A row of what was measured, for the roofline. Native is what multiplies faster than floats do."""
    said = Source(title=f"measured here: copy of {measured.copied_bytes / 1e6:.0f} MB", date="now")
    product = Source(title=f"measured here: product of matrices of side {measured.side}", date="now")
    floats = max(measured.tera_rates.get("fp32", 0.0), measured.tera_rates.get("bf16", 0.0))
    kinds: dict[str, Kind] = {"cpu": "cpu", "tpu": "tpu"}
    kind = local.known.kind if local.known is not None else kinds.get(local.platform, "gpu")
    native = {
        name: rate
        for name, rate in measured.tera_rates.items()
        if name == "fp32" or rate > (measured.tera_rates.get("fp32", 0.0) if name == "bf16" else floats)
    }
    memory = local.memory_bytes
    if memory is None and local.known is not None and local.known.memory_gb is not None:
        memory = local.known.memory_gb.value * 1e9
    return Device(
        name="local" if local.known is None else f"local {local.known.name}",
        family=local.description,
        kind=kind,
        memory_gb=None if memory is None else Figure(value=memory / 1e9, source=Source(title="detected", date="now")),
        bandwidth_gb_s=Figure(value=measured.bandwidth_gb_s, source=said),
        rates={name: Figure(value=rate, source=product) for name, rate in native.items()},
        link_gb_s=None if local.known is None else local.known.link_gb_s,
        note="Rates are XLA's own; formats that it multiplies no faster than floats count as not native.",
    )


def _named(flags: frozenset[str], name: str, any_of: tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if flags & set(any_of) else ()


def _cpu_model() -> str:
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        return said or platform.machine()
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return f"{value.strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _cpu_flags() -> frozenset[str]:
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _cpuinfo() -> list[str]:
    try:
        return _CPUINFO.read_text().splitlines()
    except OSError:
        return []


def _system_memory() -> float | None:
    """What is built in, or less where a container may use less."""
    try:
        found = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return None
    for path in _CGROUP_LIMITS:
        try:
            found = min(found, float(path.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found


def _device_memory(device: Any) -> float | None:
    """What JAX's allocator may take, where it says so."""
    try:
        stats = device.memory_stats()
    except jax.errors.JaxRuntimeError:
        return None
    limit = (stats or {}).get("bytes_limit")
    return None if not limit else float(limit)
