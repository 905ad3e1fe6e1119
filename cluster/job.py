"""What the supervisor runs: a training function and all that it must know around it. It travels to an actor."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onetrain.cluster.node_agent import NodeAgents
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.recovery_options import RecoveryOptions

Say = Callable[[str], None]


def nothing_to_check(agents: NodeAgents, say: Say) -> Sequence[str]:
    """A preflight without problems."""
    return ()


def no_services(say: Say) -> AbstractContextManager[Any]:
    """Nothing beside the workers."""
    return contextlib.nullcontext()


def no_checkpoints() -> int:
    """For functions that keep none."""
    return 0


@dataclass(frozen=True)
class Job:
    """A run under supervision. Every callable is picklable, and called where the supervisor runs.

    Args:
        folder: of the run; events.jsonl, heartbeats.json and reports of hangs arise in it.
        sizes: the world sizes that the function may have, largest first.
        checkpointed: the step of the newest checkpoint, 0 without one; failures count until it moves.
        preflight: problems that forbid a start, in words; says what only may go wrong.
        services: held while attempts are made; gets what prints a line for the user.
        digest: of the configuration, to tell one job from another of the same name.
    """

    name: str
    folder: Path
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cluster: ClusterOptions
    recovery: RecoveryOptions
    threads_per_worker: int
    sizes: tuple[int, ...]
    checkpointed: Callable[[], int] = no_checkpoints
    preflight: Callable[[NodeAgents, Say], Sequence[str]] = nothing_to_check
    services: Callable[[Say], AbstractContextManager[Any]] = no_services
    digest: str = ""
