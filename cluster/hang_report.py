"""<run>/hang_<attempt>.txt: which rank hangs and where, what every rank did last, and the stacks of all."""

import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from onetrain.cluster.atomic import write_atomically
from onetrain.cluster.node_agent import NO_ANSWER, STATE
from onetrain.cluster.watch import RankView, Verdict, begun_most

OLD_S = 5.0  # a beat from before that may show less than there is
MOST_ROWS = 64  # of the table; beyond, ranks that look alike share a row
_FRAME = re.compile(r"^\s+(?P<name>\S+) \((?P<file>.+):(?P<line>\d+)\)$")
_COLLECTIVE_FILES = ("torch/distributed/", "deepspeed/comm/")
_WRAPPERS = {"wrapper", "log_wrapper", "func_wrapper"}
_WAITING_FILES = ("ray/", "threading.py", "concurrent/futures/", "selectors.py", "asyncio/", "queue.py", "socket.py")
_OWN_WAITING_FILE = "cluster/worker.py"  # heartbeats and printed lines
_OUTER_FILES = ("ray/", "threading.py", "concurrent/futures/")


def report_path(folder: Path, attempt: int) -> Path:
    """Where the report of an attempt lies in the run's folder."""
    return folder / f"hang_{attempt}.txt"


def write_report(
    folder: Path, attempt: int, verdict: Verdict, views: Sequence[RankView], stacks: dict[int, str]
) -> Path:
    """Write hang_<attempt>.txt, atomically; OSError where that fails."""
    path = report_path(folder, attempt)
    write_atomically(path, report_text(attempt, verdict, views, stacks))
    return path


def report_text(attempt: int, verdict: Verdict, views: Sequence[RankView], stacks: dict[int, str]) -> str:
    """The report as text."""
    parts = [
        f"Hang of attempt {attempt}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}",
        verdict.message,
        "\n".join(_table(views, set(verdict.ranks))),
        "\n".join(["Last collective:", *(f"  {line}" for line in _collectives(views, stacks))]),
        "Stacks, innermost call first:",
        *_stacks(views, stacks),
    ]
    return "\n\n".join(parts) + "\n"


def short_message(verdict: Verdict, views: Sequence[RankView], stacks: dict[int, str], report: Path) -> str:
    """For the error and the event log: who hangs, in which collective or frame, and where to read on."""
    rank = verdict.ranks[0]
    stack = stacks.get(rank, f"{NO_ANSWER}nobody asked")
    collective = last_collective(stack)
    if stack.startswith(NO_ANSWER):
        at = stack
    elif collective is not None:
        at = f"in {collective}"
    else:
        at = f"at {_innermost(stack)}"
    at = ", ".join([at, *(line for line in stack.splitlines() if line.startswith(STATE))])
    behind = _behind(views)
    return f"{verdict.message}; rank {rank}: {at}{f'; {behind[0]}' if behind else ''}. Stacks of all ranks: {report}"


def last_collective(stack: str) -> str | None:
    """The innermost torch.distributed call of a stack, the main thread's before others'; None where there is none."""
    for frames in _threads(stack):
        for line in frames[1:]:
            frame = _FRAME.match(line)
            if frame is None or frame["name"].rpartition(".")[2] in _WRAPPERS:
                continue
            if any(part in frame["file"] for part in _COLLECTIVE_FILES):
                return frame["name"]
    return None


def _table(views: Sequence[RankView], culprits: set[int]) -> list[str]:
    """A row for every rank, for every kind of rank where there are many; culprits are marked."""
    header = ["", "rank", "node", "pid", "phase", "for", "step", "position", "collectives begun", "last beat"]
    if len(views) <= MOST_ROWS:
        rows = [[*_row(view, culprits)] for view in views]
    else:
        alike: dict[tuple[str, ...], list[RankView]] = {}
        for view in views:
            mark, _, node, pid, phase, _, step, position, collectives, _ = _row(view, culprits)
            key = (mark, node, pid) if mark else ("", "", "")
            alike.setdefault((*key, phase, step, position, collectives), []).append(view)
        rows = []
        for (mark, node, pid, *_), group in alike.items():
            _, _, _, _, phase, for_s, step, position, collectives, age = _row(group[0], culprits)
            ranks = spans(view.rank for view in group)
            rows.append([mark, ranks, node, pid, phase, for_s, step, position, collectives, age])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def _row(view: RankView, culprits: set[int]) -> list[str]:
    collectives = ", ".join(f"{group}: {count}" for group, count in sorted(view.collectives.items()))
    return [
        "->" if view.rank in culprits else "",
        str(view.rank),
        view.node or "-",
        "-" if view.pid is None else str(view.pid),
        view.phase,
        f"{view.in_phase_s:.0f} s",
        "-" if view.step is None else str(view.step),
        "-" if view.position is None else str(view.position),
        collectives or "-",
        "never" if view.age_s is None else f"{view.age_s:.1f} s ago",
    ]


def _collectives(views: Sequence[RankView], stacks: dict[int, str]) -> list[str]:
    """What each rank was in, and who is behind."""
    by_name: dict[str, list[int]] = {}
    for view in views:
        stack = stacks.get(view.rank, NO_ANSWER)
        name = "not known, no stack" if stack.startswith(NO_ANSWER) else last_collective(stack)
        by_name.setdefault(name or f"in no collective, but at {_innermost(stack)}", []).append(view.rank)
    lines = [f"{_ranks(ranks)}: {name}" for name, ranks in by_name.items()]
    return lines + (_behind(views) or ["no rank is behind in collectives, as far as they are counted"])


def _behind(views: Sequence[RankView]) -> list[str]:
    """One line for each process group whose members have begun different numbers of collectives."""
    lines = []
    for group, most in sorted(begun_most(views).items()):
        counts: dict[int, list[int]] = {}
        old = {view.rank for view in views if (view.age_s or 0.0) > OLD_S}
        for view in views:
            if group in view.collectives:
                counts.setdefault(view.collectives[group], []).append(view.rank)
        if len(counts) < 2:
            continue
        told = [
            f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} begun {count}"
            + (" (when last heard)" if old.intersection(ranks) else "")
            for count, ranks in sorted(counts.items())
            if count != most
        ]
        lines.append(f"{', '.join(told)} collectives of group {group}, the others {most}")
    return lines


def _stacks(views: Sequence[RankView], stacks: dict[int, str]) -> list[str]:
    """The stacks, equal ones once; those of the fewest ranks first, for they are the odd ones."""
    alike: dict[str, list[int]] = {}
    for view in views:
        alike.setdefault(_readable(stacks.get(view.rank, f"{NO_ANSWER}nobody asked")), []).append(view.rank)
    ordered = sorted(alike.items(), key=lambda entry: (len(entry[1]), entry[1]))
    return [f"--- {_ranks(ranks)}\n{text}" for text, ranks in ordered]


def _readable(stack: str) -> str:
    """A stack without process and thread numbers, and without threads of Ray and pools that only wait."""
    if stack.startswith(NO_ANSWER):
        return stack
    threads = _threads(stack)
    state = [line for line in stack.splitlines() if line.startswith(STATE)]
    busy = [lines for lines in threads if not _only_waits(lines)] or threads[:1]
    kept = [_without_numbers(lines) for lines in busy]
    if hidden := len(threads) - len(busy):
        kept.append(
            f"({hidden} thread{'s' if hidden > 1 else ''} that only wait{'' if hidden > 1 else 's'}: not shown)"
        )
    return "\n".join([*state, *kept]) or stack


def _without_numbers(lines: list[str]) -> str:
    """A thread's lines without its number, and without the frames that every thread begins with."""
    while len(lines) > 2 and (frame := _FRAME.match(lines[-1])) and frame["file"].startswith(_OUTER_FILES):
        lines = lines[:-1]
    return "\n".join([re.sub(r"^Thread (0x)?[0-9a-fA-F]+ ", "Thread ", lines[0]), *lines[1:]])


def _threads(stack: str) -> list[list[str]]:
    """The lines of each thread, its header first: the main thread first, and last those that only wait."""
    threads: list[list[str]] = []
    for line in stack.splitlines():
        if line.startswith("Thread "):
            threads.append([line])
        elif threads and line.strip():
            threads[-1].append(line)
    return sorted(threads, key=lambda lines: (_only_waits(lines), "MainThread" not in lines[0]))


def _only_waits(lines: list[str]) -> bool:
    frames = [frame for frame in map(_FRAME.match, lines[1:]) if frame]
    return "(idle)" in lines[0] and all(
        frame["file"].startswith(_WAITING_FILES) or frame["file"].endswith(_OWN_WAITING_FILE) for frame in frames
    )


def _innermost(stack: str) -> str:
    for lines in _threads(stack):
        if len(lines) > 1:
            return lines[1].strip()
    return "no Python frame"


def _ranks(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {spans(ranks)}"


def spans(numbers: Iterable[int]) -> str:
    """0, 2-5, 9 for {0, 2, 3, 4, 5, 9}."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
