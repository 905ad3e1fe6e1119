"""The exceptions of the cluster room."""

from typing import Any


class ClusterError(Exception):
    """Ray, a node or a worker failed; the message says what, where, and what to do.

    The launcher prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 5


class LostWorkerError(ClusterError):
    """A rank's process is gone. `node_lost`: with its node; `preempted`: Ray was told that the node would be taken."""

    def __init__(self, message: str, rank: int, node: str, node_lost: bool = False, preempted: bool = False) -> None:
        super().__init__(message)
        self.rank, self.node, self.node_lost, self.preempted = rank, node, node_lost, preempted

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.rank, self.node, self.node_lost, self.preempted)


class HangError(ClusterError):
    """A rank gave no sign of life, or stayed in a phase past its deadline. `report` has the stacks of all ranks."""

    def __init__(self, message: str, rank: int, node: str, report: str) -> None:
        super().__init__(message)
        self.rank, self.node, self.report = rank, node, report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.rank, self.node, self.report)
