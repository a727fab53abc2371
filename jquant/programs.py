"""Compiled programs, kept on disk from one run of the command line to the next.

XLA compiles for ten seconds before a small model's first block is quantized, on a GPU for half a minute: a run that
finds the programs of an earlier one begins at once. They are found by the whole program, its options and the versions
of jax; and here also by the processor they were made for, since a home may be shared by machines of several kinds.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

VARIABLE = "JQUANT_PROGRAMS"  # a folder, or `off`
_MOST = 2 * 2**30  # bytes; those that were not used for longest go


def keep() -> Path | None:
    """Has jax keep what it compiles from now on, and look there first.

    Returns:
        The folder; None where nothing is to be kept (JQUANT_PROGRAMS=off), where jax was told of a folder already
        (JAX_COMPILATION_CACHE_DIR), and where there is none to write to.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "off":
        return None
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    try:
        folder = (Path(chosen) if chosen else _user_cache() / "jquant" / "programs") / _machine()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # as where a user has no home
        return None
    if not os.access(folder, os.W_OK):
        return None
    _remove_halves(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder


def _remove_halves(folder: Path) -> None:
    """Removes what a process that was killed left half written: jax would warn of it in every run, and keep nothing
    more. It writes a program first, under a lock, and then when it was used last."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lockfile", timeout=1):  # jax's own
            names = {path.name for path in folder.iterdir()}
            for name in names:
                if name.endswith("-cache") and f"{name.removesuffix('-cache')}-atime" not in names:
                    (folder / name).unlink(missing_ok=True)
    except (Timeout, OSError):  # another process is at work there, or nothing can be removed
        return


def _user_cache() -> Path:
    """Where a user's programs keep what they can make again."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ["LOCALAPPDATA"]) if "LOCALAPPDATA" in os.environ else Path.home() / "AppData" / "Local"
    return Path.home() / "Library" / "Caches" if sys.platform == "darwin" else Path.home() / ".cache"


def _machine() -> str:
    """Of the processor, as far as compiled code depends on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        lines = [platform.processor()]
    kind = [line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")]
    return hashlib.sha256("\n".join([platform.machine(), *(kind or lines)]).encode()).hexdigest()[:12]
