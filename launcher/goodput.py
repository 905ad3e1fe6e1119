"""Where the time of a run went: a label for every second, from events.jsonl and ledger.jsonl alone.

Labels, by these rules:

start_up    from the run's first record until the first attempt works; waiting for nodes included
compute     optimizer steps that no earlier attempt has recorded
recompute   steps that an earlier attempt had recorded, and that were made again
data_wait   ranks stood still for data
checkpoint  training stood still for a checkpoint
validation  ranking metrics
lost        from the last ledger record of an attempt that did not end on purpose until its end: steps that nobody has
            recorded and that are made again (as compute, then), the time it hung, and the time until that was noticed
restart     between the end of an attempt and the work of the next: teardown, back-off, waiting for nodes, restore
shut_down   after the last attempt's work, until the supervisor's last record
idle        nothing ran: from the last record of a supervisor (or of a run without one) until the user started it again;
            a supervisor that Ray made anew leaves no such time

"Works" is the first data wait or step in the ledger, or the event of the first step done, whichever is earlier. The end
of an attempt is its `attempt_ended` event, else the `end` record of its ledger, else the last record before somebody
started the run again (also where the next supervisor wrote the event for one that was lost). An attempt
ends on purpose when it finished, drained or rolled back. Each step is compute once, the first time that it is recorded,
so compute is the time whose result was kept, up to the checkpoint that the next attempt starts from.

The seconds of a ledger record are laid out in the order of `IN_A_RECORD`, stretched to the time between it and the one
before. Where clocks of two machines disagree, what was written down first keeps its place.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onetrain.cluster.event_log import EVENTS, LEDGER, read_log

Record = Mapping[str, Any]
LABELS = (
    "compute",
    "recompute",
    "data_wait",
    "checkpoint",
    "validation",
    "start_up",
    "restart",
    "lost",
    "shut_down",
    "idle",
)
IN_A_RECORD = ("start_up", "data_wait", "recompute", "compute", "checkpoint", "validation")
ON_PURPOSE = ("finished", "drained", "rolled_back")
NO_FAILURE = (*ON_PURPOSE, "stopped", "refused")
LATE_S = 5.0  # at most, between what a supervisor writes down of a lost one and its own first record
OF_ATTEMPTS = ("attempt_started", "ranks_running", "training", "attempt_ended")
OF_PHASE = {"data_wait": "data_wait", "checkpoint": "checkpoint", "validation": "validation"}


@dataclass(frozen=True)
class Span:
    """Unix times `begin` to `end` were spent on `label`; attempt and step are None where there was none yet."""

    begin: float
    end: float
    label: str
    attempt: int | None = None
    step: int | None = None

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin


@dataclass(frozen=True)
class Restart:
    """The end of an attempt that was not the end of the run, and what followed."""

    attempt: int  # the one that ended
    kind: str
    reason: str
    rank: int | None
    node: str | None
    step: int | None  # of the last sign of life
    time: float  # when it had ended
    next_attempt: int | None = None
    resumed_from: int | None = None  # step of the checkpoint that the next attempt went on from
    seconds: float | None = None  # until the next attempt's first step was done, idle time left out; None: not yet


@dataclass(frozen=True)
class Goodput:
    """The timeline of a run and its sums."""

    spans: tuple[Span, ...]
    seconds: dict[str, float]  # of every label
    wall_s: float  # of all labels but idle
    ettr: float | None  # effective training time ratio: compute / wall; None before anything happened
    restarts: tuple[Restart, ...]
    failures: int  # attempts that ended, and neither on purpose nor by the user
    mtbf_s: float | None  # wall / failures; None without failures


@dataclass
class _Attempt:
    """What both logs say about one attempt."""

    number: int
    supervised: bool = False
    signs: list[float] = field(default_factory=list)  # times of its records
    begun: float | None = None
    pieces: list[Span] = field(default_factory=list)
    first_step: float | None = None
    start: Record | None = None  # of the ledger
    end: Record | None = None  # of the ledger
    ended: Record | None = None  # of the supervisor
    ended_late: bool = False  # it was written by the next supervisor, which does not know when

    @property
    def first_sign(self) -> float:
        return min(self.signs) if self.begun is None else min(self.begun, *self.signs)

    @property
    def works_from(self) -> float | None:
        """None if it never came to work."""
        begins = [piece.begin for piece in self.pieces if piece.label != "start_up"][:1]
        return min([*begins, *([] if self.first_step is None else [self.first_step])], default=None)

    @property
    def end_time(self) -> float | None:
        record = self.end if self.ended_late else self.ended or self.end
        return None if record is None else _time(record)

    @property
    def over(self) -> bool:
        return self.ended is not None or self.end is not None

    @property
    def on_purpose(self) -> bool:
        return self.kind in ON_PURPOSE or (self.end is not None and self.end.get("outcome") in ON_PURPOSE)

    @property
    def kind(self) -> str | None:
        if self.ended is not None:
            return str(self.ended.get("kind"))
        return None if self.end is None else str(self.end.get("outcome"))

    @property
    def last_step(self) -> int | None:
        if self.ended is not None and self.ended.get("step") is not None:
            return int(self.ended["step"])
        return self.pieces[-1].step if self.pieces else None


@dataclass
class _Session:
    """The life of a supervisor, or of a run without one."""

    begin: float
    end: float
    attempts: list[_Attempt] = field(default_factory=list)


def goodput(
    events: Sequence[Record], ledger: Sequence[Record], now: float | None = None, phase: str = "step"
) -> Goodput:
    """The timeline from the first record to the last, or to `now` where the run is still going.

    Args:
        events: records of events.jsonl; none for a run under torchrun or `onetrain debug`.
        ledger: records of ledger.jsonl.
        now: Unix time, only for a run that is alive.
        phase: what the ranks of a run that is alive are doing (one of `beacon.PHASES`); it names the label of the time
            since the last record.
    """
    events = sorted(events, key=_time)
    attempts = sorted(_attempts(events, ledger), key=lambda attempt: (attempt.first_sign, attempt.number))
    sessions = _sessions(events, attempts, now)
    line = _Line(now, phase)
    for session in sessions:
        line.add(session)
    seconds = dict.fromkeys(LABELS, 0.0)
    for span in line.spans:
        seconds[span.label] += span.seconds
    wall = sum(value for label, value in seconds.items() if label != "idle")
    over = attempts[:-1] if attempts and now is not None and not attempts[-1].over else attempts
    failures = sum(attempt.kind not in NO_FAILURE for attempt in over)
    return Goodput(
        spans=tuple(line.spans),
        seconds=seconds,
        wall_s=wall,
        ettr=seconds["compute"] / wall if wall > 0 else None,
        restarts=tuple(_restarts(attempts, over, line.spans)),
        failures=failures,
        mtbf_s=wall / failures if failures else None,
    )


def goodput_metrics(folder: Path) -> dict[str, float]:
    """What a tracker can log: "goodput/ettr", "goodput/compute_s" and so on, up to the last record of either log.

    It reads both logs whole, which takes seconds for a run of a month: call it at checkpoints, not at every step.
    """
    found = goodput(read_log(folder / EVENTS), read_log(folder / LEDGER))
    if found.ettr is None:
        return {}
    metrics = {f"goodput/{label}_s": seconds for label, seconds in found.seconds.items()}
    metrics |= {"goodput/ettr": found.ettr, "goodput/wall_s": found.wall_s}
    metrics |= {"goodput/restarts": float(len(found.restarts)), "goodput/failures": float(found.failures)}
    if found.mtbf_s is not None:
        metrics["goodput/mtbf_s"] = found.mtbf_s
    return metrics


class _Line:
    """Spans, each of which begins where the one before ended."""

    def __init__(self, now: float | None, phase: str) -> None:
        self.now, self.phase = now, phase
        self.spans: list[Span] = []
        self._at: float | None = None
        self._attempts = 0

    def add(self, session: _Session) -> None:
        """Everything from the end of the session before to the end of this one."""
        if self._at is None:
            self._at = session.begin
        first = session.attempts[0].number if session.attempts else None
        self._until(session.begin, "idle", first)
        last: _Attempt | None = None
        for index, attempt in enumerate(session.attempts):
            following = session.attempts[index + 1 :][:1]
            limit = following[0].first_sign if following else session.end
            self._add_attempt(attempt, limit, final=not following)
            last = attempt
        waiting = "restart" if self._attempts else "start_up"
        if last is not None and last.kind in NO_FAILURE:
            waiting = "shut_down"
        self._until(session.end, waiting, None if last is None else last.number)

    def _add_attempt(self, attempt: _Attempt, limit: float, final: bool) -> None:
        number, before_work = attempt.number, "restart" if self._attempts else "start_up"
        self._attempts += 1
        end = attempt.end_time
        stop = limit if end is None else min(end, limit)
        works_from = attempt.works_from
        if works_from is None:
            self._until(stop, before_work, number)
            return
        self._until(min(works_from, stop), before_work, number)
        for piece in attempt.pieces:
            label = before_work if piece.label == "start_up" else piece.label
            self._until(min(piece.end, stop), label, number, piece.step)
        if not attempt.over and final and self.now is not None and stop >= self.now:
            self._until(stop, self._label_now(attempt), number, attempt.last_step)
        elif not attempt.on_purpose:
            own_end = stop if attempt.end is None else _time(attempt.end)
            self._until(min(stop, own_end), "lost", number, attempt.last_step)

    def _label_now(self, attempt: _Attempt) -> str:
        furthest = 0 if attempt.start is None else attempt.start.get("furthest") or 0
        computing = "recompute" if (attempt.last_step or 0) < furthest else "compute"
        return OF_PHASE.get(self.phase, computing)

    def _until(self, end: float, label: str, attempt: int | None, step: int | None = None) -> None:
        assert self._at is not None
        if end <= self._at:
            return
        last = self.spans[-1] if self.spans else None
        if last is not None and (last.label, last.attempt, last.step) == (label, attempt, step):
            self.spans[-1] = Span(last.begin, end, label, attempt, step)
        else:
            self.spans.append(Span(self._at, end, label, attempt, step))
        self._at = end


def _attempts(events: Sequence[Record], ledger: Iterable[Record]) -> list[_Attempt]:
    found: dict[int, _Attempt] = {}
    for index, record in enumerate(events):
        if not isinstance(record.get("attempt"), int) or record.get("event") not in OF_ATTEMPTS:
            continue
        attempt = found.setdefault(record["attempt"], _Attempt(record["attempt"]))
        attempt.supervised = True
        if record.get("event") == "training":
            attempt.first_step = _time(record)
        elif record.get("event") == "attempt_ended":
            attempt.ended, attempt.ended_late = record, _is_late(events, index)
        if not attempt.ended_late:
            attempt.signs.append(_time(record))
    reached: dict[int, float] = {}
    for record in ledger:
        if not isinstance(record.get("attempt"), int):
            continue
        attempt = found.setdefault(record["attempt"], _Attempt(record["attempt"]))
        attempt.signs.append(_time(record))
        kind = record.get("kind")
        if kind == "start":
            attempt.start, attempt.begun = record, float(record.get("begun", record["time"]))
            reached[attempt.number] = attempt.begun
        elif kind == "time":
            begin = reached.get(attempt.number, _time(record) - sum(record["seconds"].values()))
            attempt.pieces += _laid_out(record, begin)
            reached[attempt.number] = max(begin, _time(record))
        elif kind == "end":
            attempt.end = record
    return list(found.values())


def _is_late(events: Sequence[Record], index: int) -> bool:
    """Whether this end of an attempt was written by the next supervisor, about one that was lost."""
    following = events[index + 1] if index + 1 < len(events) else {}
    soon = following.get("event") == "supervisor_started" and _time(following) - _time(events[index]) < LATE_S
    return soon and events[index].get("kind") == "died"


def _laid_out(record: Record, begin: float) -> list[Span]:
    """The seconds of one ledger record as spans from `begin` to its time; "lost" where it names none."""
    length, end = _time(record) - begin, _time(record)
    if length <= 0:
        return []
    named = {label: max(float(record["seconds"].get(label, 0.0)), 0.0) for label in IN_A_RECORD}
    labels = [label for label in IN_A_RECORD if named[label] > 0]
    total, spans = sum(named.values()), []
    for label in labels:
        share = end if label == labels[-1] else begin + length * named[label] / total
        spans.append(Span(begin, share, label, record["attempt"], record.get("step")))
        begin = share
    return spans or [Span(begin, end, "lost", record["attempt"], record.get("step"))]


def _sessions(events: Sequence[Record], attempts: Sequence[_Attempt], now: float | None) -> list[_Session]:
    """In order of time, each ending with its last record; the last one ends `now` where the run is alive."""
    events = [record for index, record in enumerate(events) if not _is_late(events, index)]
    begun = [record for record in events if record.get("event") == "supervisor_started"]
    starts = [_time(record) for record in begun if not record.get("restarted")]  # by Ray, which is no pause
    if events and (not starts or starts[0] > _time(events[0])):
        starts.insert(0, _time(events[0]))
    starts += [attempt.first_sign for attempt in attempts if not attempt.supervised]
    sessions = [_Session(begin, begin) for begin in sorted(starts)]
    if not sessions:
        return []

    begins = [session.begin for session in sessions]

    def of(time: float) -> _Session:
        return sessions[max(bisect_right(begins, time) - 1, 0)]

    for attempt in attempts:
        of(attempt.first_sign).attempts.append(attempt)
    sessions[0].begin = min([sessions[0].begin, *(attempt.first_sign for attempt in attempts)])
    for time in [*map(_time, events), *(time for attempt in attempts for time in attempt.signs)]:
        session = of(time)
        session.end = max(session.end, time)
    if now is not None:
        sessions[-1].end = max(sessions[-1].end, now)
    return sessions


def _restarts(attempts: Sequence[_Attempt], over: Sequence[_Attempt], spans: Sequence[Span]) -> Iterable[Restart]:
    idle = [span for span in spans if span.label == "idle"]
    for index, attempt in enumerate(over):
        following = attempts[index + 1] if index + 1 < len(attempts) else None
        if attempt.kind == "finished" or (following is None and attempt.kind in NO_FAILURE):
            continue  # the end of the run, or of a run that the user gave more steps later
        ended = attempt.end_time if attempt.end_time is not None else max(attempt.signs)
        works = None if following is None else following.first_step or following.works_from
        asleep = sum(max(min(span.end, works or 0.0) - max(span.begin, ended), 0.0) for span in idle)
        known = attempt.ended or {}
        yield Restart(
            attempt=attempt.number,
            kind=attempt.kind or "unknown",
            reason=str(known.get("reason") or _guess(attempt)),
            rank=known.get("rank"),
            node=known.get("node"),
            step=attempt.last_step,
            time=ended,
            next_attempt=None if following is None else following.number,
            resumed_from=None if following is None or following.start is None else following.start.get("step"),
            seconds=None if works is None else max(works - ended - asleep, 0.0),
        )


def _guess(attempt: _Attempt) -> str:
    if attempt.kind is not None:
        return "the training function ended by itself"
    if attempt.supervised:
        return "no record of its end: the supervisor went down with it"
    return "no record of its end: killed, or its machine went down"


def _time(record: Record) -> float:
    return float(record["time"])
