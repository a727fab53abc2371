"""A file appears whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from jquant.core.errors import InputError
from jquant.io.atomic import replacing


def test_it_appears_at_the_end_and_replaces(tmp_path):
    path = tmp_path / "new" / "x"
    for text in (b"one", b"two"):
        before = path.read_bytes() if path.exists() else None
        with replacing(path) as file:
            file.write(text)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == text
        assert os.listdir(path.parent) == ["x"]


def test_it_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with replacing(tmp_path / "x") as file:
        file.write(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="file/x: cannot be written"), replacing(tmp_path / "file" / "x"):
        pass
    with pytest.raises(InputError, match="folder: cannot be written"), replacing(tmp_path / "folder"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
