"""A sweep in the terminal: progress while it runs, the table and the files when it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from jquant.sweep.config import SweepConfig
from jquant.sweep.results import Sweep
from jquant.sweep.table import sweep_table
from jquant.sweep.work import Event

_BEFORE_CELLS = ("load", "reference", "statistics")


class Progress:
    """Cells done, time left, and the last result; on standard error, so that the table can be piped."""

    def __init__(self) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _Remaining(),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self  # the bar starts with the first event: a mistake found before leaves no empty line

    def __exit__(self, *error: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def listen(self, event: Event) -> None:
        """Shows an event of `run_sweep`."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=event.total)
        done = event.done + (event.share if event.cell is None and event.stage not in _BEFORE_CELLS else 0)
        self._bar.update(self._task, completed=done, description=event.stage)
        if event.note is not None:
            self._bar.console.print(event.note, highlight=False, markup=False)
        if event.seconds is not None:
            self._bar.console.print(f"statistics of the float model: {event.seconds:.1f} s", highlight=False)
        if event.cell is not None:
            cell = event.cell
            self._bar.console.print(
                f"{cell.scheme:<28} {cell.method:<9} {cell.bits_per_weight:6.3f} bits   "
                f"perplexity {cell.perplexity:9.3f}   "
                f"KL {cell.kl:8.5f}   top-1 {100 * cell.top1:6.2f} %   "
                f"{cell.seconds_quantize + cell.seconds_evaluate:5.1f} s",
                highlight=False,
            )


class _Remaining(ProgressColumn):
    """Estimated time left, from the share of the work that is done."""

    def render(self, task: Task) -> Text:
        if not task.total or not task.completed or task.elapsed is None:
            return Text("ETA –:––")
        left = int(task.elapsed / task.completed * (task.total - task.completed))
        return Text(f"ETA {left // 60}:{left % 60:02d}")


def show_results(sweep: Sweep, config: SweepConfig) -> None:
    """Prints the table, what the weights are, and where the files lie."""
    console = Console()
    console.print(sweep_table(sweep))
    note = sweep.manifest["model"].get("note")
    if note:
        console.print(f"Note: {note}.", highlight=False)
    names = ["results.csv", "results.json", *(["pareto.png", "pareto.svg", "report.html"] if config.report else [])]
    console.print(f"Written to {config.out}: {', '.join(names)}", highlight=False)
