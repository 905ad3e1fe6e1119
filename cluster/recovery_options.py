"""Options of supervision: the `recovery:` section of a configuration."""

from dataclasses import dataclass, field

from onetrain.cluster.beacon import PHASES

DEADLINES_S = {
    "start": 300.0,
    "build": 600.0,
    "restore": 1800.0,
    "first_step": 1800.0,  # compilation included
    "step": 300.0,
    "data_wait": 300.0,
    "checkpoint": 1800.0,
    "validation": 7200.0,
    "end": 300.0,
}


@dataclass(frozen=True)
class RecoveryOptions:
    """When another attempt is made, on how many ranks, and when a rank counts as hanging."""

    max_failures: int = 3  # in a row, without a new checkpoint between them; 0 = the first failure ends the run
    max_preemptions: int | None = None  # in all; None = any number
    backoff_s: float = 2.0  # before the second attempt in a row that failed; doubles from there
    backoff_limit_s: float = 300.0
    min_workers: int | None = None  # fewest ranks to go on with when nodes are missing; None = cluster.workers
    wait_for_nodes_s: float = 1800.0  # for as many as min_workers needs, before giving up
    grow_every_s: float = 60.0  # how often to look for room for more ranks; 0 = never
    heartbeat_s: float = 1.0
    silence_s: float = 30.0  # without a heartbeat, before a rank counts as hanging
    deadlines_s: dict[str, float] = field(default_factory=dict)  # phase -> longest time in it; others keep theirs

    def __post_init__(self) -> None:
        if self.max_failures < 0 or (self.max_preemptions or 0) < 0:
            raise ValueError("recovery.max_failures and recovery.max_preemptions are at least 0")
        if self.min_workers is not None and self.min_workers < 1:
            raise ValueError(f"recovery.min_workers is {self.min_workers}; at least 1 is needed")
        if self.backoff_s < 0 or self.backoff_limit_s < self.backoff_s:
            raise ValueError("recovery.backoff_s is at least 0, and recovery.backoff_limit_s not below it")
        if self.wait_for_nodes_s < 0 or self.grow_every_s < 0:
            raise ValueError("recovery.wait_for_nodes_s and recovery.grow_every_s are at least 0")
        if self.heartbeat_s <= 0 or self.silence_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"recovery.silence_s is {self.silence_s} and heartbeat_s {self.heartbeat_s}: silence is at least three "
                "missing heartbeats"
            )
        for phase, seconds in self.deadlines_s.items():
            if phase not in PHASES:
                raise ValueError(f"recovery.deadlines_s knows no phase {phase!r}; the phases are {', '.join(PHASES)}")
            if seconds <= 0:
                raise ValueError(f"recovery.deadlines_s gives {phase} {seconds} s; it is greater than 0")

    def deadline_s(self, phase: str) -> float:
        """The longest time that a rank may be in this phase (and in one step of it)."""
        return self.deadlines_s.get(phase, DEADLINES_S[phase])
