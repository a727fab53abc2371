"""What a process may still take, by a tree of files as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jquant.hardware.free_memory import free_memory, size_text

GB = 1 << 30


def _tree(root: Path, files: dict[str, object]) -> Path:
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {64 * GB // 1024} kB\n", **files}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


SECOND = "sys/fs/cgroup"
FIRST = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 64 * GB),
        ({"proc/self/cgroup": "0::/"}, 64 * GB),  # no limits
        (
            {
                "proc/self/cgroup": "0::/job/step",
                f"{SECOND}/job/step/memory.max": "max",
                f"{SECOND}/job/step/memory.current": GB,
                f"{SECOND}/job/memory.max": 8 * GB,  # of the group above
                f"{SECOND}/job/memory.current": 3 * GB,
            },
            5 * GB,
        ),
        (
            {
                "proc/self/cgroup": "0::/job",
                f"{SECOND}/job/memory.max": 8 * GB,
                f"{SECOND}/job/memory.current": 7 * GB,
                f"{SECOND}/job/memory.stat": f"anon {GB}\nfile {6 * GB}\ninactive_file {4 * GB}\nactive_file {GB}",
            },
            6 * GB,  # cached files go when memory is asked for
        ),
        (
            {
                "proc/self/cgroup": "0::/../../elsewhere",  # a container that sees its own group as the root
                f"{SECOND}/memory.max": 2 * GB,
                f"{SECOND}/memory.current": GB,
            },
            GB,
        ),
        (
            {
                "proc/self/cgroup": "7:cpu,cpuacct:/job\n4:memory:/job\n0::/",
                f"{FIRST}/job/memory.limit_in_bytes": 4 * GB,
                f"{FIRST}/job/memory.usage_in_bytes": 3 * GB,
                f"{FIRST}/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB // 2}",
                f"{FIRST}/memory.limit_in_bytes": 9223372036854771712,
                f"{FIRST}/memory.usage_in_bytes": 50 * GB,
            },
            GB + GB // 2,
        ),
        (
            {
                "proc/self/cgroup": "0::/job",
                f"{SECOND}/job/memory.max": 2 * GB,
                f"{SECOND}/job/memory.current": 3 * GB,  # beyond its limit for a moment
            },
            0,
        ),
        ({"proc/self/cgroup": "nonsense\n0::/job", f"{SECOND}/job/memory.max": "damaged"}, 64 * GB),
    ],
)
def test_the_least_of_system_and_groups(files: dict[str, object], left: int, tmp_path: Path) -> None:
    assert free_memory(_tree(tmp_path, files)) == left


def test_sizes_keep_three_digits_whatever_their_unit() -> None:
    sizes = (2e6, 7.34e6, 999.4e6, 999.6e6, 4.021e9, 1.5e12)
    assert [size_text(size) for size in sizes] == ["2 MB", "7.34 MB", "999 MB", "1 GB", "4.02 GB", "1.5 TB"]
