"""<run>/heartbeats.json: how the run and every rank are doing, written as long as a supervisor lives."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from onetrain.cluster.atomic import write_atomically
from onetrain.cluster.event_log import HEARTBEATS
from onetrain.cluster.watch import RankView

EVERY_S = 2.0
LIVE = ("pending", "starting", "running", "waiting")
FRESH_S = 120.0  # older files are of supervisors that are gone


class HeartbeatFile:
    """Set its fields; `start` lets a thread write them until `stop`."""

    def __init__(self, folder: Path, node: str, wanted: int) -> None:
        self.path = folder / HEARTBEATS
        self.state = "pending"
        self.attempt = self.world_size = 0
        self.views: list[RankView] = []  # as they were last seen
        self._fixed = {"node": node, "pid": os.getpid(), "wanted": wanted}
        self._over = threading.Event()

    def start(self) -> None:
        """Begin to write."""
        threading.Thread(target=self._write_on, name="heartbeats", daemon=True).start()

    def stop(self) -> None:
        """Write no more."""
        self._over.set()

    def set(self, state: str, attempt: int, world_size: int = 0) -> None:
        """Another state, written at once."""
        self.state, self.attempt, self.world_size, self.views = state, attempt, world_size, []
        self.write()

    def write(self) -> None:
        """The file as things stand, atomically; on a full disk the next one may succeed."""
        value: dict[str, Any] = {
            "time": round(time.time(), 3),
            "state": self.state,
            "attempt": self.attempt,
            "world_size": self.world_size,
            **self._fixed,
            "ranks": [view.as_json() for view in self.views],
        }
        with contextlib.suppress(OSError):
            write_atomically(self.path, json.dumps(value))

    def _write_on(self) -> None:
        while not self._over.wait(EVERY_S):
            self.write()


def another_supervisor(folder: Path) -> str | None:
    """Where another supervisor works on this run right now; None, mostly at once, where there is none."""
    before = _read(folder / HEARTBEATS)
    if before is None or before.get("state") not in LIVE or abs(time.time() - before["time"]) > FRESH_S:
        return None
    time.sleep(2 * EVERY_S)
    after = _read(folder / HEARTBEATS)
    if after is None or after["time"] == before["time"]:
        return None
    return f"node {after.get('node')}, process {after.get('pid')}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
