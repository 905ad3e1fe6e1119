"""The supervisor as a detached actor: it outlives the process that started it, and is found again by the run's name."""

import threading
import time
from collections import deque
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError

from onetrain.cluster.errors import ClusterError
from onetrain.cluster.job import Job, Say
from onetrain.cluster.supervisor import Supervisor
from onetrain.cluster.worker import Outcome, pickle_error

NAMESPACE = "onetrain"
HEAD = {"node:__internal_head__": 0.001}  # with the head node everything is lost anyway
POLL_S = 0.5
KEPT_LINES = 2000  # for followers that come later
COLLECT_S = 300.0  # how long an ended supervisor waits for somebody to ask how it ended
RETURN_S = 120.0  # how long a supervisor whose process died may take to come back


class SupervisorActor:
    """Runs a Supervisor in a thread. Ray makes it anew if its process dies; it then goes on from the run's folder."""

    def __init__(self, pickled_job: bytes) -> None:
        self._job: Job = cloudpickle.loads(pickled_job)
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._count = 0
        self._outcome: Outcome | None = None
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._supervisor = Supervisor(self._job, self._say, resumed=again)
        threading.Thread(target=self._run, daemon=True).start()

    def digest(self) -> str:
        """Of the configuration that runs."""
        return self._job.digest

    def news(self, seen: int) -> tuple[list[str], int, Outcome | None]:
        """Lines after the first `seen`, how many there have been in all, and how the run ended, if it has."""
        outcome = self._outcome  # before the lines: nothing is said after the end
        count, lines = self._count, list(self._lines)
        new = count - seen if 0 <= seen <= count else count  # a supervisor that was made anew counts anew
        return lines[-new:] if new else [], count, outcome

    def stop(self) -> None:
        """End the run as by Ctrl-C."""
        self._supervisor.stop()

    def _say(self, line: str) -> None:
        self._lines.append(line)
        self._count += 1

    def _run(self) -> None:
        try:
            self._outcome = Outcome(cloudpickle.dumps(self._supervisor.run()))
        except BaseException as error:
            self._outcome = Outcome(pickle_error(error, "the supervisor"), failed_at=time.time())
        time.sleep(COLLECT_S)
        ray.kill(ray.get_actor(actor_name(self._job.name), NAMESPACE))  # not a return: Ray would make it anew


def actor_name(run: str) -> str:
    """The supervisor's name on the Ray cluster."""
    return f"supervisor of {run}"


def supervise(job: Job, say: Say) -> Any:
    """Start the supervisor of a run on the cluster that this process is connected to, or find it, and follow it.

    Returns the result of rank 0. Ctrl-C stops the run; the death of this process does not.

    Raises:
        ClusterError: a run of this name goes on with another configuration, or the supervisor does not answer.
        Exception: what `Supervisor.run` raises.
    """
    actor = _find(job)
    if actor is None:
        actor = _start(job)
    else:
        say(f"found the supervisor of {job.name} on the cluster; following it")
    try:
        outcome = _follow(actor, job, say)
    except KeyboardInterrupt:
        say("stopping the run")
        actor.stop.remote()
        outcome = _follow(actor, job, say)
    ray.kill(actor)  # it has told how it ended; the name is free again
    value = cloudpickle.loads(outcome.pickled)
    if outcome.failed_at is not None:
        raise value
    return value


def stop_run(run: str) -> bool:
    """Ask the supervisor of a run to stop it; whether there is one."""
    try:
        ray.get(ray.get_actor(actor_name(run), NAMESPACE).stop.remote())
    except ValueError:
        return False
    return True


def _find(job: Job) -> Any:
    """The supervisor of this job, also one that has ended well; None if there is none."""
    try:
        actor = ray.get_actor(actor_name(job.name), NAMESPACE)
    except ValueError:
        return None
    answers: Any = ray.get([actor.digest.remote(), actor.news.remote(0)], timeout=RETURN_S)
    digest, (_, _, outcome) = answers
    if outcome is not None and (outcome.failed_at is not None or digest != job.digest):
        ray.kill(actor)  # this command is another try
        return None
    if digest != job.digest:
        raise ClusterError(
            f"a run named {job.name!r} goes on under supervision on this cluster, with another configuration. Follow "
            "it with its own configuration, stop it with `onetrain stop`, or choose another name."
        )
    return actor


def _start(job: Job) -> Any:
    options = {"name": actor_name(job.name), "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
    actor = ray.remote(SupervisorActor).options(**options, resources=HEAD, max_restarts=-1, max_concurrency=16)
    deadline = time.monotonic() + RETURN_S
    while True:
        try:
            return actor.remote(cloudpickle.dumps(job))
        except ValueError:  # the one that was just ended still has the name
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _follow(actor: Any, job: Job, say: Say) -> Outcome:
    """Hand over what the supervisor says until it has ended."""
    seen, last = 0, time.monotonic()
    while True:
        try:
            lines, seen, outcome = ray.get(actor.news.remote(seen), timeout=RETURN_S)
        except (RayError, GetTimeoutError) as error:
            if time.monotonic() - last > RETURN_S:
                raise ClusterError(
                    f"the supervisor of {job.name} has not answered for {RETURN_S:.0f} s: {error}. The same command "
                    "finds it again, or starts another, which goes on from the newest checkpoint."
                ) from error
        else:
            last = time.monotonic()
            for line in lines:
                say(line)
            if outcome is not None:
                return outcome
        time.sleep(POLL_S)
