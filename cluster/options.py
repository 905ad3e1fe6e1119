"""Options of the Ray worker group: the `cluster:` section of a configuration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClusterOptions:
    """How many ranks run, and what each reserves."""

    workers: int = 2
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    address: str | None = None  # Ray address; None = start a local Ray
    start_timeout_s: float = 120.0  # waiting for resources before giving up with a table of wanted / available
    master_port: int | None = None  # None = a free port on rank 0's node

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"cluster.workers is {self.workers}; at least 1 is needed")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cluster.cpus_per_worker is {self.cpus_per_worker}; it is greater than 0")
        if self.gpus_per_worker < 0 or self.gpus_per_worker % 1:
            raise ValueError(f"cluster.gpus_per_worker is {self.gpus_per_worker}; it is a whole number, 0 for CPU only")
        if self.start_timeout_s <= 0:
            raise ValueError(f"cluster.start_timeout_s is {self.start_timeout_s}; it is greater than 0")
        if self.master_port is not None and not 1 <= self.master_port <= 65535:
            raise ValueError(f"cluster.master_port is {self.master_port}; it is between 1 and 65535, or null")
