"""A training function of seconds, without torch: ranks count steps, and rank 0 keeps the count as its checkpoint."""

import os
import signal
import time
from pathlib import Path

from onetrain.cluster.job import Job
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.recovery_options import RecoveryOptions

STEP_S = 0.1
SAVE_EVERY = 5


def toy_job(folder: Path, workers: int, steps: int = 20, faults: dict[int, str] | None = None, **recovery) -> Job:
    """`faults`: what the last rank does in attempt N: "exit", "stop" or "error" after a checkpoint, or "exit early"."""
    recovery = {"backoff_s": 0.2, "heartbeat_s": 0.2, "silence_s": 2.0, "grow_every_s": 1.0, **recovery}
    least = recovery.get("min_workers") or workers
    return Job(
        name=folder.name,
        folder=folder,
        function=count_steps,
        arguments=(folder, steps, faults or {}),
        cluster=ClusterOptions(workers=workers, start_timeout_s=60),
        recovery=RecoveryOptions(**recovery),
        threads_per_worker=1,
        sizes=tuple(size for size in (4, 2, 1) if least <= size <= workers),
        checkpointed=Checkpointed(folder),
        digest=str(steps),
    )


class Checkpointed:
    """The step of the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint"

    def __call__(self) -> int:
        return int(self.path.read_text()) if self.path.exists() else 0


def count_steps(folder: Path, steps: int, faults: dict[int, str]) -> dict[str, int]:
    from onetrain.cluster.beacon import BEACON, DRAIN, AttemptEnded  # of the worker: this function travels by value

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    checkpoint = Checkpointed(folder)
    first = checkpoint()
    (folder / f"pid_{BEACON.attempt}_{rank}").write_text(str(os.getpid()))
    for step in range(first + 1, steps + 1):
        time.sleep(STEP_S)
        (folder / f"at_{BEACON.attempt}_{rank}_{step}").touch()
        while not all((folder / f"at_{BEACON.attempt}_{other}_{step}").exists() for other in range(world)):
            time.sleep(0.01)  # as a collective would
        fault, _, early = faults.get(BEACON.attempt, "").partition(" ")
        if rank < world - 1 or step != first + (2 if early else SAVE_EVERY + 3):
            fault = ""
        if fault == "exit":
            os._exit(1)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "error":
            raise RuntimeError("connection closed by peer")
        BEACON.enter("step", step, 8 * step)
        drains = BEACON.wish()[0] == DRAIN
        if rank == 0 and (drains or step % SAVE_EVERY == 0):
            checkpoint.path.write_text(str(step))
        if drains:
            raise AttemptEnded("drained", BEACON.wish()[1], step)
    return {"step": steps, "world": world, "attempt": BEACON.attempt}
