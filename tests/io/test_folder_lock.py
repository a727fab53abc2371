"""One process at a time in a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jquant.core.errors import InputError
from jquant.io.folder_lock import locked_folder


def test_a_folder_is_made_and_held_until_its_holder_ends(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked_folder(folder):
        assert folder.is_dir()
        with pytest.raises(InputError, match="b: another process is at work there"), locked_folder(folder):
            pass
    with pytest.raises(ZeroDivisionError), locked_folder(folder):
        raise ZeroDivisionError  # the block's own errors pass as they are
    with locked_folder(folder):
        pass


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    program = """
import sys, time, pathlib
from jquant.io.folder_lock import locked_folder
with locked_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process"), locked_folder(tmp_path):
            pass
        other.kill()
        other.wait()
        with locked_folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be made"), locked_folder(tmp_path / "file"):
        pass
