"""Compiled programs are kept from one run of the command line to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jquant import programs
from jquant.cli import main

NAMES = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")
COUNTS_HITS = """
import jax, jax.numpy as jnp
from jquant import programs
folder, hits = programs.keep(), []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
jax.jit(lambda x: jnp.sin(x) * 3 + 1)(jnp.ones(7))
print(folder, sum(hits) > 0)
"""


def without_a_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def as_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """jax was told of no folder; afterwards it has what it had."""
    before = {name: jax.config.values[name] for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(programs.VARIABLE, raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def in_a_process(home: Path) -> tuple[Path, bool]:
    """The folder, and whether the program was found there; a warning fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "JQUANT_"))}
    command = [sys.executable, "-W", "error", "-c", COUNTS_HITS]
    environment["XDG_CACHE_HOME"] = str(home)
    folder, hit = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return Path(folder), hit == "True"


def test_a_later_process_finds_them(tmp_path: Path) -> None:
    first, second = in_a_process(tmp_path), in_a_process(tmp_path)
    assert [hit for _, hit in (first, second)] == [False, True]
    assert first[0] == second[0]
    assert first[0].is_relative_to(tmp_path / "jquant" / "programs")


def test_what_a_killed_process_left_is_written_anew(tmp_path: Path) -> None:
    """jax writes a program, and then a file beside it: of what was cut short there is no such file."""
    folder, _ = in_a_process(tmp_path)
    programs_there = list(folder.glob("*-cache"))
    assert programs_there
    for program in programs_there:
        program.write_bytes(program.read_bytes()[:50])
        program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    assert [in_a_process(tmp_path)[1] for _ in range(2)] == [False, True]


@pytest.mark.usefixtures("as_of_a_user")
def test_the_command_line_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    assert jax.config.values["jax_compilation_cache_dir"].startswith(str(tmp_path / "jquant" / "programs"))
    capsys.readouterr()


@pytest.mark.usefixtures("as_of_a_user")
def test_where_they_go_and_where_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(programs.VARIABLE, "off")
    assert programs.keep() is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(programs.VARIABLE, str(tmp_path / "file"))
    assert programs.keep() is None  # no folder can be made there: a run goes on without
    assert jax.config.values["jax_compilation_cache_dir"] is None
    monkeypatch.delenv(programs.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", without_a_home)
    assert programs.keep() is None
    monkeypatch.setenv(programs.VARIABLE, str(tmp_path / "named"))
    folder = programs.keep()
    assert folder is not None
    assert folder.parent == tmp_path / "named"
    assert folder.is_dir()
    assert programs.keep() is None, "jax was told of a folder already"
