"""What a rank shows of itself: phase, step and cursor, which the training function sets and its worker sends out.

It knows nothing of Ray, so that the training function sets the same beacon in every front end; without a worker nobody
looks.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

PHASES = ("start", "build", "restore", "first_step", "step", "data_wait", "checkpoint", "validation", "end")
DRAIN = "drain"  # the wish that the run saves a checkpoint after its current step and ends the attempt
STOP = "stop"  # the wish that it ends at once, unsaved


class AttemptEnded(Exception):  # noqa: N818 - an attempt that ends on purpose is no error
    """The training function ends this attempt on purpose, its state saved; another one goes on from there.

    `kind` is "drained" (asked to: nodes to be given back, or to grow) or "rolled_back" (a guard wants the newest
    checkpoint back). Outside a supervised run the user starts the next attempt.
    """

    exit_code = 7

    def __init__(self, kind: str, reason: str, step: int) -> None:
        super().__init__(f"{reason}; the same command goes on")
        self.kind, self.reason, self.step = kind, reason, step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, self.reason, self.step)


@dataclass(frozen=True)
class Beat:
    """One look at a rank."""

    rank: int
    pid: int
    phase: str
    in_phase_s: float  # since phase or step changed, by the rank's own clock
    step: int | None = None  # optimizer steps done
    position: int | None = None  # of the cursor: samples consumed by all ranks
    collectives: dict[str, int] = field(default_factory=dict)  # process group -> collectives begun

    def as_json(self) -> dict[str, Any]:
        """For heartbeats.json."""
        return asdict(self)


class Beacon:
    """The state of this process; `BEACON` is the only one."""

    def __init__(self) -> None:
        self.attempt: int | None = None  # number of the supervised attempt, None outside one
        self.first = True  # whether no other attempt of this start came before: what an earlier run left is not its own
        self.collectives: Callable[[], dict[str, int]] = dict
        self._lock = threading.RLock()  # a signal handler may come in between
        self._phase, self._since = "start", time.monotonic()
        self._step: int | None = None
        self._position: int | None = None
        self._wish, self._why = "", ""

    def enter(self, phase: str, step: int | None = None, position: int | None = None) -> None:
        """From now on this rank is in `phase`; step and position stay what they were where they are None."""
        assert phase in PHASES, phase
        with self._lock:
            self._phase, self._since = phase, time.monotonic()
            self._step = self._step if step is None else step
            self._position = self._position if position is None else position

    def ask(self, wish: str, why: str) -> None:
        """What the worker hands on to the training function; the first wish stays."""
        with self._lock:
            if not self._wish:
                self._wish, self._why = wish, why

    def wish(self) -> tuple[str, str]:
        """("", "") or (DRAIN, why)."""
        with self._lock:
            return self._wish, self._why

    def beat(self, rank: int, pid: int) -> Beat:
        """How things stand."""
        try:
            collectives = self.collectives()
        except Exception:  # a process group on its way up or down
            collectives = {}
        with self._lock:
            seconds = time.monotonic() - self._since
            return Beat(rank, pid, self._phase, seconds, self._step, self._position, collectives)


BEACON = Beacon()
