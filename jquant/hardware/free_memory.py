"""Memory that a process may still take: what the system has, or less where a container or a job may use less.

    min(MemAvailable, limit − usage of the process's control group and of each above it)

What files keep in memory counts as usage of a group and goes when memory is asked for, so it is free here, as it is in
MemAvailable.

Reference: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class _Files(NamedTuple):
    """Of a version of control groups: where its tree stands, what its files are called, and cache in memory.stat."""

    mount: str
    limit: str
    usage: str
    cache: tuple[str, ...]


_SECOND = _Files("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))
_FIRST = _Files(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def size_text(count: float) -> str:
    """So many bytes for people, three digits of them."""
    for size, name in ((1e12, "TB"), (1e9, "GB")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {name}"
    return f"{count / 1e6:.3g} MB"


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes; None where the system does not say. `root` is where proc and sys stand."""
    return min([*_of_system(root), *_of_groups(root)], default=None)


def _of_system(root: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
                return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> Iterator[int]:
    """What each group with a limit leaves. A container may see its own group as the root of the tree."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _FIRST if controllers else _SECOND
        path = PurePosixPath("/" + group)
        for each in (path, *path.parents) if ".." not in path.parts else (PurePosixPath("/"),):
            folder = root / files.mount / str(each).lstrip("/")
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limit, usage = (int((folder / name).read_text()) for name in (files.limit, files.usage))
                yield max(0, limit - usage + _cache(folder, files))


def _cache(folder: Path, files: _Files) -> int:
    try:
        rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        return sum(int(row[1]) for row in rows if row[0] in files.cache)
    except (OSError, ValueError, IndexError):
        return 0
