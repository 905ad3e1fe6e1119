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
