"""How a run is doing, from the files in its folder: heartbeats, events, ledger and metrics."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onetrain.cluster.event_log import EVENTS, LEDGER
from onetrain.cluster.recovery_options import RecoveryOptions
from onetrain.launcher.goodput import Goodput, goodput
from onetrain.launcher.run_records import (
    LIVE_STATES,
    METRICS,
    Follower,
    event_text,
    is_alive,
    part,
    patience_s,
    read_config,
    read_heartbeats,
    recovery_options,
    seconds_text,
)

LAST_EVENTS = 6
PACE_RECORDS = 20  # log lines that the time left is estimated from
GOODPUT_EVERY_S = 10.0  # its calculation takes a second for the ledger of a month
OVER = {"run_finished": "done", "gave_up": "failed"}  # event -> state, where heartbeats.json is lost
SLOW = 0.5  # of its deadline


@dataclass(frozen=True)
class RankStatus:
    """One rank. `mark`: "" | "slow" | "silent" | "hanging"."""

    rank: int
    node: str
    phase: str
    in_phase_s: float
    step: int | None
    collectives: dict[str, int]
    age_s: float | None
    mark: str


@dataclass(frozen=True)
class RunStatus:
    """Everything that `onetrain status` shows; None where the run's files do not say it."""

    run: str
    folder: str
    state: str  # of the supervisor; "alone" without one, "silent" when nothing is heard of a run that should go on
    headline: str
    alive: bool  # it goes on, as far as its files tell
    phase: str  # of rank 0
    attempt: int | None
    world_size: int | None
    wanted: int | None
    step: int | None
    steps: int | None
    seconds_left: float | None
    loss: float | None
    samples_per_s: float | None
    data_wait: float | None
    checkpoint: dict[str, Any] | None  # step, age_s, bytes
    ettr: float | None
    wall_s: float
    restarts: int
    mtbf_s: float | None
    ranks: tuple[RankStatus, ...]
    events: tuple[tuple[float, str], ...]  # Unix time and text, the newest last

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        events = [{"time": when, "text": text} for when, text in self.events]
        return asdict(self) | {"events": events}


class StatusReader:
    """Reads a run's folder again and again, each time only what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._events, self._ledger = Follower(folder / EVENTS), Follower(folder / LEDGER)
        self._metrics = Follower(folder / METRICS, most=200)
        self._goodput: tuple[float, Goodput] | None = None

    def read(self, now: float | None = None) -> RunStatus:
        """The status at the Unix time `now`."""
        now = time.time() if now is None else now
        config = read_config(self.folder)
        events, ledger, metrics = self._events.read(), self._ledger.read(), self._metrics.read()
        recovery = recovery_options(config)
        last = ledger[-1] if ledger else {}
        heartbeats = read_heartbeats(self.folder, float(last.get("time", 0)))
        last_entry = None if not last or last.get("kind") == "end" else float(last["time"])
        alive = is_alive(heartbeats, last_entry, recovery, now)
        phase = next((str(rank.get("phase")) for rank in heartbeats.get("ranks", [])), "step")
        if self._goodput is None or now - self._goodput[0] >= GOODPUT_EVERY_S:
            self._goodput = now, goodput(events, ledger, now if alive else None, phase)
        found = self._goodput[1]
        state, headline = _state(heartbeats, events, last, alive, now)
        train = [record for record in metrics if record.get("kind") == "train"]
        newest = train[-1] if train else {}
        ranks = _ranks(heartbeats, recovery, now) if heartbeats.get("state") == "running" else ()
        steps = part(config, "train", "steps")
        step = _step(ranks, ledger, newest)
        return RunStatus(
            run=str(config.get("name", self.folder.name)),
            folder=str(self.folder),
            state=state,
            headline=headline,
            alive=alive,
            phase=phase,
            attempt=heartbeats.get("attempt") or last.get("attempt"),
            world_size=heartbeats.get("world_size") or _world_size(ledger),
            wanted=heartbeats.get("wanted"),
            step=step,
            steps=steps,
            seconds_left=_seconds_left(train, step, steps) if alive else None,
            loss=newest.get("loss"),
            samples_per_s=newest.get("samples_per_s"),
            data_wait=newest.get("data_wait"),
            checkpoint=_checkpoint(self.folder, ledger, now),
            ettr=found.ettr,
            wall_s=found.wall_s,
            restarts=len(found.restarts),
            mtbf_s=found.mtbf_s,
            ranks=ranks,
            events=tuple((float(event["time"]), event_text(event)) for event in events[-LAST_EVENTS:]),
        )


def _state(
    heartbeats: dict[str, Any], events: Sequence[Mapping[str, Any]], last: Mapping[str, Any], alive: bool, now: float
) -> tuple[str, str]:
    if heartbeats:
        state, age = str(heartbeats.get("state")), max(now - float(heartbeats.get("time", 0)), 0.0)
        if state not in LIVE_STATES:
            return state, f"{state}, {seconds_text(age)} ago"
        if alive:
            return state, state if state == "running" else f"{state} for {seconds_text(age)}"
        return "silent", f"no sign of life for {seconds_text(age)}; the run was {state}, its supervisor may be gone"
    over = OVER.get(str(events[-1].get("event"))) if events else None
    if over is not None and float(events[-1]["time"]) >= float(last.get("time", 0)):
        return over, f"{over}, {seconds_text(max(now - float(events[-1]['time']), 0.0))} ago"
    if not last:
        return "unknown", "neither heartbeats nor a ledger: the run was made by an older version"
    age = max(now - float(last["time"]), 0.0)
    if last.get("kind") == "end":
        return "ended", f"ended ({last.get('outcome')}) {seconds_text(age)} ago; it had no supervisor"
    if alive:
        return "alone", f"running without a supervisor; last record {seconds_text(age)} ago"
    return "silent", f"no sign of life for {seconds_text(age)}; the run had no supervisor (torchrun or debug)"


def _ranks(heartbeats: dict[str, Any], recovery: RecoveryOptions, now: float) -> tuple[RankStatus, ...]:
    late = max(now - float(heartbeats.get("time", now)), 0.0)  # since the supervisor looked
    ranks = []
    for beat in heartbeats.get("ranks", []):
        phase, age = str(beat.get("phase")), beat.get("age_s")
        age = None if age is None else float(age) + late
        in_phase, mark = float(beat.get("in_phase_s") or 0.0), ""
        if late <= patience_s("running", recovery):  # else the supervisor is silent, and nobody knows of the ranks
            in_phase += late
            mark = _mark(phase, in_phase, age, recovery)
        fields = (int(beat.get("rank", 0)), str(beat.get("node", "")), phase, in_phase, beat.get("step"))
        ranks.append(RankStatus(*fields, dict(beat.get("collectives") or {}), age, mark))
    return tuple(ranks)


def _mark(phase: str, in_phase: float, age: float | None, recovery: RecoveryOptions) -> str:
    try:
        deadline = recovery.deadline_s(phase)
    except KeyError:  # a phase of another version
        deadline = float("inf")
    if age is not None and age > recovery.silence_s:
        return "silent"
    if in_phase > deadline:
        return "hanging"
    return "slow" if in_phase > SLOW * deadline or (age or 0.0) > SLOW * recovery.silence_s else ""


def _step(ranks: Sequence[RankStatus], ledger: Sequence[Mapping[str, Any]], newest: Mapping[str, Any]) -> int | None:
    known = [rank.step for rank in ranks if rank.step is not None]
    if known:
        return max(known)
    for record in reversed(ledger):
        if record.get("kind") in ("time", "start", "end") and record.get("step") is not None:
            return int(record["step"])
    return newest.get("step")


def _world_size(ledger: Sequence[Mapping[str, Any]]) -> int | None:
    return next((record.get("world_size") for record in reversed(ledger) if record.get("kind") == "start"), None)


def _seconds_left(train: Sequence[Mapping[str, Any]], step: int | None, steps: int | None) -> float | None:
    """By the pace of the last log lines of this attempt, validations and checkpoints included."""
    last = [record for record in train[-PACE_RECORDS:] if record.get("attempt") == train[-1].get("attempt")]
    if step is None or steps is None or len(last) < 2 or last[-1]["step"] <= last[0]["step"]:
        return None
    pace = (last[-1]["time"] - last[0]["time"]) / (last[-1]["step"] - last[0]["step"])
    return max(steps - step, 0) * pace


def _checkpoint(folder: Path, ledger: Sequence[Mapping[str, Any]], now: float) -> dict[str, Any] | None:
    for record in reversed(ledger):
        if record.get("kind") == "checkpoint":
            age = max(now - float(record["time"]), 0.0)
            return {"step": record.get("step"), "age_s": age, "bytes": record.get("bytes")}
    found = sorted((folder / "checkpoints").glob("step_[0-9]*[0-9]"))
    if not found:
        return None
    status = found[-1].stat()
    return {"step": int(found[-1].name[5:]), "age_s": max(now - status.st_mtime, 0.0), "bytes": None}
