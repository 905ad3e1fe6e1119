"""What a run's folder holds, for verbs that only look on: no Ray, no torch, from any machine that sees the folder."""

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from onetrain.cluster.event_log import EVENTS, HEARTBEATS, LEDGER
from onetrain.cluster.recovery_options import RecoveryOptions
from onetrain.launcher.config import load_config, run_folder
from onetrain.launcher.errors import ConfigError

METRICS = "metrics.jsonl"
OF_A_RUN = (EVENTS, LEDGER, HEARTBEATS, METRICS, "config.yaml")
LIVE_STATES = ("pending", "starting", "running", "waiting")
SILENT_S = 15.0  # heartbeats.json is written every 2 s while ranks run
LEDGER_SILENT_S = 60.0  # without a supervisor: the ledger grows every 10 s, but not during a long validation
START_S = 600.0  # a group may take so long to start, which no option says


def find_run(run: str, overrides: Sequence[str] = ()) -> Path:
    """The run's folder, from itself or from its job's YAML file; ConfigError where there is no run."""
    path = Path(run)
    if path.is_dir():
        if overrides:
            raise ConfigError(f"--set changes a configuration, and {run} is a folder; give the job's YAML file")
        folder = path
    elif path.is_file():
        folder = run_folder(load_config(path, overrides, needs_data=False))
    else:
        raise ConfigError(f"there is no {run}; give a run's folder, or the YAML file of its job")
    if not any((folder / name).exists() for name in OF_A_RUN):
        raise ConfigError(f"{folder} holds no run: none of {', '.join(OF_A_RUN)} is there. Has it been started?")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """The run's resolved configuration as it was written, also by another version; empty where there is none."""
    try:
        value = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def part(config: dict[str, Any], section: str, key: str, default: Any = None) -> Any:
    """One option of a configuration as `read_config` gives it."""
    inner = config.get(section)
    return inner.get(key, default) if isinstance(inner, dict) else default


def recovery_options(config: dict[str, Any]) -> RecoveryOptions:
    """The run's `recovery:` section, the defaults where this version cannot read it."""
    given = config.get("recovery")
    known = {option.name for option in fields(RecoveryOptions)}
    try:
        return RecoveryOptions(**{key: value for key, value in (given or {}).items() if key in known})
    except (TypeError, ValueError, AttributeError):
        return RecoveryOptions()


def patience_s(state: str, recovery: RecoveryOptions) -> float:
    """How old heartbeats.json may be in a state: while the supervisor waits, it has nothing to write."""
    if state == "running":
        return SILENT_S
    return SILENT_S + {"waiting": max(recovery.wait_for_nodes_s, recovery.backoff_limit_s)}.get(state, START_S)


def read_heartbeats(folder: Path, last_record: float) -> dict[str, Any]:
    """heartbeats.json; empty where the ledger's last record is much newer: then torchrun has taken over from it."""
    heartbeats = read_json(folder / HEARTBEATS)
    return {} if last_record > float(heartbeats.get("time", 0)) + LEDGER_SILENT_S else heartbeats


def is_alive(heartbeats: dict[str, Any], last_entry: float | None, recovery: RecoveryOptions, now: float) -> bool:
    """Whether a run is going on. `last_entry`: time of the ledger's last record, None if that is the end."""
    if heartbeats:
        state = str(heartbeats.get("state"))
        return state in LIVE_STATES and now - float(heartbeats.get("time", 0)) <= patience_s(state, recovery)
    return last_entry is not None and now - last_entry <= LEDGER_SILENT_S


class Follower:
    """The records of a JSON-lines file that grows: `read` takes up what is new, and starts over for another file.

    `most` keeps only so many of the last records, and begins `TAIL` bytes before the end.
    """

    TAIL = 2**20

    def __init__(self, path: Path, most: int | None = None) -> None:
        self.path, self.most = path, most
        self.records: list[dict[str, Any]] = []
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """All whole records so far (the last `most`)."""
        try:
            stream = self.path.open("rb")
        except OSError:
            self.records, self._file = [], None
            return self.records
        with stream:
            status = os.fstat(stream.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._file or status.st_size < self._offset:
                self.records, self._file, self._offset = [], identity, 0
                if self.most is not None and status.st_size > self.TAIL:
                    self._offset = status.st_size - self.TAIL  # the first line, cut in two, is no record
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # being written
                self._offset += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    self.records.append(record)
        if self.most is not None:
            del self.records[: -self.most]
        return self.records


def event_text(event: dict[str, Any]) -> str:
    """One record of events.jsonl in words."""
    name, get = event.get("event", "?"), event.get
    if name == "supervisor_started":
        return f"supervisor started on {get('node')} for {get('workers')} ranks"
    if name == "preflight":
        return "preflight: " + ("all well" if get("ok") else "; ".join(map(str, get("problems") or ["problems"])))
    if name == "attempt_started":
        fewer = f" of {get('wanted')} wanted" if get("wanted") != get("world_size") else ""
        why = f" ({get('reason')})" if get("reason") else ""
        return f"attempt {get('attempt')} started on {get('world_size')} ranks{fewer}{why}"
    if name == "ranks_running":
        return f"attempt {get('attempt')}: all ranks run, after {seconds_text(get('seconds'))}"
    if name == "training":
        return f"attempt {get('attempt')}: trains from step {get('step')}, after {seconds_text(get('seconds'))}"
    if name == "attempt_ended":
        kind, where = str(get("kind")).replace("_", " "), place(event)
        reason = f": {get('reason')}" if get("reason") else ""
        return f"attempt {get('attempt')} {kind}{f' ({where})' if where else ''}{reason}"
    if name == "waiting":
        return f"waits {seconds_text(get('seconds'))}: {get('reason')}"
    if name == "nodes":
        alive = get("alive")
        return f"{len(alive) if isinstance(alive, list) else alive} nodes are alive, room for {get('free')} more ranks"
    if name == "gave_up":
        return f"gave up: {get('reason')}"
    if name == "run_finished":
        return f"the run is finished, at step {get('step')}"
    return json.dumps({key: value for key, value in event.items() if key != "time"})


def place(event: dict[str, Any]) -> str:
    """Rank and node of an event, as far as it names them."""
    rank, node = event.get("rank"), event.get("node")
    return ", ".join(([] if rank is None else [f"rank {rank}"]) + ([f"node {node}"] if node else []))


def seconds_text(seconds: float | None) -> str:
    """A length of time: 0.4 s, 12 s, 3 min, 2 h 05 min, 3 d 4 h; a dash for None."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def bytes_text(count: float | None) -> str:
    """A size: 812 B, 14.3 GB (powers of ten); a dash for None."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
