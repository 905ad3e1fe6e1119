"""What the user sees: progress, tables and errors, on a terminal and in a plain log.

Results go to standard output, progress and messages to standard error. Consoles are made at each use, so that they
follow a redirected stream.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

ProgressCallback = Callable[[str, int, int | None], None]
LOG_WIDTH = 160  # columns of a table that is not on a terminal
SECONDS_BETWEEN_LINES = 10.0


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = ()) -> None:
    """Print a table: numbers to the right, floats with four decimals, None as a dash, `notes` below."""
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        values = [row[index] for row in rows if row[index] is not None]
        numeric = bool(values) and all(isinstance(value, int | float) for value in values)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_value(value)) for value in row))
    console = _console()
    console.print(table)
    for note in notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


def format_value(value: Any) -> str:
    """A table cell: 0.0624, 12,345, or the text itself."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def print_result(text: str) -> None:
    """Lines that belong to the result, on standard output."""
    _console().print(Text(text), soft_wrap=True)


def print_message(message: str) -> None:
    """One line for the user, on standard error."""
    _console(stderr=True).print(Text(message), soft_wrap=True)


def print_warning(message: str) -> None:
    """Something the user should know, which does not stop the work."""
    _console(stderr=True).print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)


def print_error(message: str) -> None:
    """Why the work stopped."""
    _console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


@contextmanager
def progress() -> Iterator[ProgressCallback]:
    """Yields `report(stage, done, total)`: bars with the time remaining on a terminal, now and then a line elsewhere.

    A total of None means that the end is not known. A new stage ends the one before.
    """
    console = _console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress(console)
        return
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int | None) -> None:
        if stage not in tasks:
            for task in bars.tasks:
                bars.update(task.id, total=task.completed)
            tasks[stage] = bars.add_task(Text(stage).markup)
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield report


class _PlainProgress:
    """A line at the start and the end of a stage, and at most every ten seconds between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage: str | None = None
        self.started = self.printed = 0.0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.printed = stage, now, float("-inf")
        if done != total and now - self.printed < SECONDS_BETWEEN_LINES:
            return
        line = f"{stage}: {done:,}" + ("" if total is None else f" of {total:,}")
        if total and 0 < done < total:
            line += f", {(now - self.started) / done * (total - done):.0f} s left"
        self.console.print(Text(line), soft_wrap=True)
        self.printed = now


def _console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else LOG_WIDTH, highlight=False)
