"""The ledger of a run, <run>/ledger.jsonl: what every millisecond of training went to. Rank 0 writes.

Every rank enters phases, which sets its beacon too. The labels of a "time" record add up to the time since the record
before (of the first: since the training function was entered), so that nothing is counted twice or left out.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from onetrain.cluster.beacon import BEACON
from onetrain.cluster.event_log import LEDGER, EventLog, read_log
from onetrain.launcher.console import print_warning

LABELS = {
    "start": "start_up",
    "build": "start_up",
    "restore": "start_up",
    "first_step": "compute",
    "step": "compute",
    "data_wait": "data_wait",
    "checkpoint": "checkpoint",
    "validation": "validation",
    "end": "checkpoint",  # for a save under way
}
RECORD_EVERY_S = 10.0


class Ledger:
    """The ledger of this attempt, which begins now; `open` says where it is written."""

    def __init__(self) -> None:
        self.begun = time.time()
        self.attempt, self.furthest = 1, 0  # `furthest`: the highest step that an earlier attempt has recorded
        self.total = Counter[str]()  # milliseconds by label
        self._clock = time.monotonic()
        self._until_ms = self._recorded_ms = 0
        self._unrecorded = Counter[str]()
        self._label = LABELS["start"]
        self._path: Path | None = None  # only on rank 0
        self._begun_before, self._useful_before_s = self.begun, 0.0
        self._warned = False
        BEACON.enter("start")

    def open(self, run: Path, is_main: bool) -> None:
        """Takes up what earlier attempts wrote. The run's folder arises with the first record."""
        if not is_main:
            return
        self._path = run / LEDGER
        records = read_log(self._path)
        self.attempt = BEACON.attempt or 1 + last_attempt(records)
        earlier = [record for record in records if record.get("attempt") != self.attempt]
        self.furthest = max((record["step"] for record in earlier if isinstance(record.get("step"), int)), default=0)
        self._begun_before = min((r["begun"] for r in earlier if r.get("kind") == "start"), default=self.begun)
        self._useful_before_s = sum(r["seconds"].get("compute", 0.0) for r in earlier if r.get("kind") == "time")

    def enter(self, phase: str, step: int | None = None, position: int | None = None) -> None:
        """From now on this rank is in `phase`, with `step` optimizer steps done; the time until now is the last's."""
        self._settle()
        BEACON.enter(phase, step, position)
        again = LABELS[phase] == "compute" and step is not None and step < self.furthest
        self._label = "recompute" if again else LABELS[phase]

    def record(self, kind: str, **fields: Any) -> None:
        """Writes one record; that it cannot be written is told once."""
        self._write(kind=kind, **fields)

    def start(self, world_size: int, step: int) -> None:
        """The attempt goes on from the checkpoint at `step`; 0: it is a new run."""
        self.record("start", world_size=world_size, begun=round(self.begun, 3), step=step, furthest=self.furthest)

    def note(self, step: int, position: int, now: bool = False) -> None:
        """At the end of a step: writes where the time went, if `now` or if the last record is some seconds old."""
        self._settle()
        if not now and self._until_ms - self._recorded_ms < 1000 * RECORD_EVERY_S:
            return
        seconds = {label: ms / 1000 for label, ms in self._unrecorded.items() if ms}
        until = round(self.begun + self._until_ms / 1000, 3)
        if self._write(time=until, kind="time", step=step, position=position, seconds=seconds):
            self._unrecorded.clear()
            self._recorded_ms = self._until_ms

    def end(self, outcome: str, step: int, position: int) -> None:
        """The attempt's last record."""
        self.note(step, position, now=True)
        self.record("end", outcome=outcome, step=step)

    def stood_still(self) -> float:
        """Seconds of this attempt, until now, in which training stood still for checkpoints and validations."""
        self._settle()
        return (self.total["checkpoint"] + self.total["validation"]) / 1000

    def goodput(self) -> float:
        """Effective training time ratio: seconds of steps whose result was kept, over all since the run began."""
        self._settle()
        useful = self._useful_before_s + self.total["compute"] / 1000
        return useful / max(time.time() - self._begun_before, 1e-9)

    def _settle(self) -> None:
        """The time since the last look goes to the label of the phase; whole milliseconds, so that sums are exact."""
        now_ms = int((time.monotonic() - self._clock) * 1000)
        self.total[self._label] += now_ms - self._until_ms
        self._unrecorded[self._label] += now_ms - self._until_ms
        self._until_ms = now_ms

    def _write(self, **fields: Any) -> bool:
        if self._path is None:
            return False
        try:
            durable = fields["kind"] != "time"  # these come all the time, and waiting for the disk stops training
            EventLog(self._path).add(durable=durable, attempt=self.attempt, **fields)
        except OSError as error:
            if not self._warned:
                print_warning(f"{self._path} cannot be written ({error}); training goes on without")
            self._warned = True
            return False
        return True


def last_attempt(records: list[dict[str, Any]]) -> int:
    """The highest attempt number of a ledger's records; 0 without any."""
    return max((record["attempt"] for record in records if isinstance(record.get("attempt"), int)), default=0)
