"""What the actors of the service and its clients tell one another."""

from dataclasses import dataclass
from typing import Any

NAMESPACE = "onetrain"  # of all named actors: clients and pool may belong to different Ray jobs


def pool_name(run: str) -> str:
    """Name of the actor that looks after a run's builders."""
    return f"onetrain-pool-{run}"


def builder_name(run: str, number: int) -> str:
    """Name of a run's builder."""
    return f"onetrain-data-{run}-{number}"


@dataclass(frozen=True)
class Task:
    """A batch that is being built."""

    position: int  # of the cursor
    rank: int  # data rank
    seconds: float  # since it was begun
    doing: str  # such as "verifying shard-00003.arrow"
    doing_s: float  # for so long

    def __str__(self) -> str:
        return f"{self.doing} for {self.doing_s:.1f} s (position {self.position} of data rank {self.rank})"


@dataclass(frozen=True)
class BuilderStatus:
    """What a builder does and has done since its process began."""

    node: str  # address
    pid: int
    tasks: list[Task]
    batches: int  # steps of a rank
    sequences: int
    events: int
    bytes: int
    latencies: list[float]  # seconds to build, of the last batches

    def __str__(self) -> str:
        return ", ".join(map(str, self.tasks)) or "idle"


@dataclass(frozen=True)
class Member:
    """A builder as the pool last saw it."""

    name: str
    actor: Any
    status: BuilderStatus
    age_s: float  # of the status

    def __str__(self) -> str:
        return f"{self.name} (node {self.status.node}, pid {self.status.pid})"


@dataclass(frozen=True)
class Report:
    """What a client tells the pool, about once a second while it takes steps."""

    rank: int  # data rank
    seconds: float  # since its last report
    waited_s: float  # of these, waiting for data
    messages: tuple[str, ...] = ()  # lines for the person who watches the run


@dataclass(frozen=True)
class PoolStatus:
    """The whole pool."""

    pid: int  # of the pool's process
    wanted: int  # builders
    placed: bool  # whether all of these have their resources
    members: list[Member]  # those that answer
    data_wait: float | None  # share of time, of the trainer that waits most; None before the first reports
    shortage: str | None  # a table, when resources were missing
    cpus_per_actor: float
