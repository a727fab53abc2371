"""Gives memory that is free back to the system.

A compiler asks for much memory in small pieces and frees most of it. glibc's malloc keeps that for later, and arrays,
which are large, find no place in it: 150 MB after the programs of GPTQ, of which a model's blocks would take twice.
"""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """What malloc holds and nobody uses goes back, where there is a glibc; elsewhere nothing happens."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another libc; no libc of its own to open
        return
    trim(0)
