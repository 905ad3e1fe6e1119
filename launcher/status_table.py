"""The status of a run on a terminal."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from onetrain.launcher.run_records import bytes_text, seconds_text
from onetrain.launcher.status import RankStatus, RunStatus, StatusReader

EVERY_S = 2.0
MOST_RANKS = 32  # rows; those with a mark come first
LOG_WIDTH = 160
COLOURS = {"running": "green", "done": "green", "alone": "green", "ended": "green"}
COLOURS |= {"failed": "red", "silent": "red", "hanging": "red", "stopped": "yellow", "slow": "yellow"}
MARKS = {"": "", "slow": "slow", "silent": "NO SIGN OF LIFE", "hanging": "HANGING"}


def show(reader: StatusReader, live: bool) -> None:
    """Print the status once, or again and again until Ctrl-C or the end of the run."""
    console = Console(width=None if Console().is_terminal else LOG_WIDTH, highlight=False)
    if not live or not console.is_terminal:
        console.print(render(reader.read()))
        return
    with Live(render(reader.read()), console=console, refresh_per_second=4, transient=False) as view:
        while True:
            status = reader.read()
            view.update(render(status))
            if status.state in ("done", "failed", "stopped", "ended"):
                return
            time.sleep(EVERY_S)


def render(status: RunStatus) -> RenderableType:
    """All of it, one part below the other."""
    title = Text.assemble((status.run, "bold"), "  ", (status.headline, f"bold {COLOURS.get(status.state, 'cyan')}"))
    parts: list[RenderableType] = [title, Text(status.folder, style="dim"), _figures(status)]
    if status.ranks:
        parts += [Text(), *_ranks(status.ranks)]
    if status.events:
        parts += [Text(), _events(status.events)]
    return Group(*parts)


def _figures(status: RunStatus) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    world = _of(status.world_size, status.wanted, "of {} wanted")
    step = _of(status.step, status.steps, "of {}")
    if status.step is not None and status.steps:
        step += f" ({status.step / status.steps:.0%})"
    if status.seconds_left is not None:
        step += f", {seconds_text(status.seconds_left)} left"
    rows = [("attempt", _number(status.attempt)), ("ranks", world), ("step", step)]
    rows += [("loss", "-" if status.loss is None else f"{status.loss:.4f}")]
    pace = "-" if status.samples_per_s is None else f"{status.samples_per_s:,.0f} samples/s"
    waits = "" if status.data_wait is None else f", data wait {status.data_wait:.1%}"
    rows += [("speed", pace + waits)]
    if status.checkpoint is not None:
        saved = status.checkpoint
        size = "" if saved["bytes"] is None else f", {bytes_text(saved['bytes'])}"
        rows += [("last checkpoint", f"step {_number(saved['step'])}, {seconds_text(saved['age_s'])} ago{size}")]
    else:
        rows += [("last checkpoint", "none yet")]
    if status.ettr is not None:
        failing = "" if status.mtbf_s is None else f", one failure in {seconds_text(status.mtbf_s)}"
        times = "1 restart" if status.restarts == 1 else f"{status.restarts} restarts"
        share = f"{status.ettr:.1%} of {seconds_text(status.wall_s)}"
        rows += [("effective training time", f"{share}; {times}{failing}")]
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _ranks(ranks: Sequence[RankStatus]) -> list[RenderableType]:
    table = Table(title_justify="left", header_style="bold")
    for name, justify in (("rank", "right"), ("node", "left"), ("phase", "left"), ("for", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, justify in (("step", "right"), ("collectives", "left"), ("heartbeat", "right"), ("", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    shown = sorted(ranks, key=lambda rank: (not rank.mark, rank.rank))[:MOST_RANKS]
    for rank in sorted(shown, key=lambda rank: rank.rank):
        collectives = ", ".join(f"{group} {count:,}" for group, count in rank.collectives.items())
        age = "none yet" if rank.age_s is None else f"{seconds_text(rank.age_s)} ago"
        cells = (str(rank.rank), rank.node, rank.phase, seconds_text(rank.in_phase_s), _number(rank.step))
        texts = [Text(cell) for cell in (*cells, collectives, age, MARKS.get(rank.mark, rank.mark))]
        table.add_row(*texts, style=COLOURS.get(rank.mark, ""))
    left_out = len(ranks) - len(shown)
    if not left_out:
        return [table]
    unmarked = sum(not rank.mark for rank in ranks) - sum(not rank.mark for rank in shown)
    others = "all well" if unmarked == left_out else f"{left_out - unmarked} of them marked"
    return [table, Text(f"and {left_out} more ranks, {others}", style="dim")]


def _events(events: Sequence[tuple[float, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for when, text in events:
        table.add_row(time.strftime("%m-%d %H:%M:%S", time.localtime(when)), Text(text))
    return table


def _of(value: int | None, whole: int | None, template: str) -> str:
    return _number(value) + ("" if whole is None else " " + template.format(_number(whole)))


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,}"
