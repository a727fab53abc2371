"""What commands show: tables, bars of progress, JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    with told_progress(title, total) as advance:
        yield lambda done: advance(done, ())


@contextlib.contextmanager
def told_progress(title: str, total: int) -> Iterator[Callable[[int, Sequence[str]], None]]:
    """A bar, and under it the lines that are given with what is done."""
    from rich.progress import Progress
    from rich.text import Text

    class Told(Progress):
        lines: Sequence[str] = ()

        def get_renderables(self) -> Iterator[Any]:
            yield self.make_tasks_table(self.tasks)
            yield from (Text(line, style="dim") for line in self.lines)

    with Told(console=new_console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)

        def advance(done: int, lines: Sequence[str]) -> None:
            progress.lines = lines
            progress.update(task, completed=done)

        yield advance


@contextlib.contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each of several stages that tell their name, how much is done, and of how much."""
    from rich.progress import Progress

    with Progress(console=new_console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def listen(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield listen


def new_console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def write_json(path: Path, record: Any) -> None:
    from jquant.io.atomic import replacing
    from jquant.io.processes import is_writer

    if is_writer():
        with replacing(path) as file:
            file.write(json_text(record).encode())


def json_text(record: Any) -> str:
    from jquant.io.json_file import as_text

    return as_text(record)
