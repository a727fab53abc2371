"""Failed writes in the system's words: libraries hide its reason in their own, or lose it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Turns orbax's ValueError of a full disk, or of any other refusal of the system's, into the OSError that it was.

    The tracebacks that orbax logs beside it are left out.
    """
    _expect_late_ends()
    with quiet("absl"):
        try:
            yield
        except ValueError as error:
            found = re.search(r"os_error_code='(\d+)'", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None


def _expect_late_ends() -> None:
    """Writes of the other arrays end when orbax's event loop is closed already, which Python would print of each."""
    hook = sys.unraisablehook
    if getattr(hook, "expects_late_ends", False):
        return

    def without_them(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    without_them.expects_late_ends = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = without_them


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Keeps a library from logging, beside the error that it raises, what becomes one line here."""
    chosen = logging.getLogger(logger)
    before = chosen.level
    chosen.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        chosen.setLevel(before)


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """`np.lib.format.write_array` of an array without objects, in the order of C.

    Raises:
        OSError: with the system's number; numpy's own says how much was written, and not why.
    """
    array = np.asarray(array, order="C")
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).view(np.uint8).data)
