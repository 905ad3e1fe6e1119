"""How an attempt ended, and whether another one is worth it."""

from dataclasses import dataclass
from typing import Any

from onetrain.cluster.beacon import AttemptEnded
from onetrain.cluster.errors import ClusterError, HangError, LostWorkerError


@dataclass(frozen=True)
class Ending:
    """Why an attempt ended.

    `kind`: finished | stopped (by the user) | drained (to grow, its state saved) | rolled_back (a guard wants the
    newest checkpoint) | preempted (its node was taken away) | node_lost | died (a process) | hang | failed (an
    unexpected error) | refused (another attempt would meet the same).
    """

    kind: str
    reason: str
    rank: int | None = None
    node: str | None = None
    step: int | None = None
    position: int | None = None
    error: BaseException | None = None

    def fields(self) -> dict[str, Any]:
        """For the event log."""
        names = ("kind", "reason", "rank", "node", "step", "position")
        return {name: getattr(self, name) for name in names}


def ending_of(
    error: BaseException | None, step: int | None, position: int | None, trained: bool, asked_to_drain: bool
) -> Ending:
    """The ending that an exception of the worker group means; None is the end of the run.

    `trained`: whether some attempt of the run has got as far as a step. Until then errors of starting are refused: they
    are wrong settings more often than accidents. An error that says of itself that it is `transient` is tried again.
    """
    at: dict[str, Any] = {"step": step, "position": position, "error": error}
    if error is None:
        return Ending("finished", "the last step is done", **at)
    if isinstance(error, KeyboardInterrupt):
        return Ending("stopped", "stopped by the user", **at)
    if isinstance(error, AttemptEnded):
        kind = "preempted" if error.kind == "drained" and not asked_to_drain else error.kind
        return Ending(kind, error.reason, **at | {"step": error.step})
    if isinstance(error, HangError):
        return Ending("hang", str(error), error.rank, error.node, **at)
    if isinstance(error, LostWorkerError):
        kind = "preempted" if error.preempted else "node_lost" if error.node_lost else "died"
        return Ending(kind, str(error), error.rank, error.node, **at)
    for_the_user = hasattr(error, "exit_code") and not isinstance(error, ClusterError)
    if (for_the_user or not trained) and not getattr(error, "transient", False):
        return Ending("refused", _in_short(error), **at)
    return Ending("failed", _in_short(error), **at)


def _in_short(error: BaseException) -> str:
    text = str(error).strip()
    return text if hasattr(error, "exit_code") else f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
