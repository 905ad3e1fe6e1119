"""The supervisor as a detached actor: it outlives the process that started it, and is found again by the run's name."""

import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from onetrain.cluster.errors import ClusterError
from onetrain.cluster.event_log import EVENTS
from onetrain.cluster.job import Job, Say
from onetrain.cluster.supervisor import Supervisor
from onetrain.cluster.worker import Outcome, pickle_error

NAMESPACE = "onetrain"
HEAD = {"node:__internal_head__": 0.001}  # with the head node everything is lost anyway
POLL_S = 0.5
KEPT_LINES = 2000  # for followers that come later
COLLECT_S = 300.0  # how long an ended supervisor waits for somebody to ask how it ended
OTHERS_S = 20.0  # and how long it stays for other followers then
ANSWER_S = 20.0
RETURN_S = 120.0  # how long a supervisor whose process died may take to come back


@dataclass(frozen=True)
class News:
    """What a follower learns."""

    life: str  # of the actor's process: a supervisor that was made anew counts its lines anew
    lines: list[str]  # after those that the follower has seen
    seen: int  # how many there have been in all
    outcome: Outcome | None = None  # how the run ended, if it has


class SupervisorActor:
    """Runs a Supervisor in a thread. Ray makes it anew if its process dies; it then goes on from the run's folder."""

    def __init__(self, pickled_job: bytes) -> None:
        self._job: Job = cloudpickle.loads(pickled_job)
        self._life = uuid.uuid4().hex
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._count = 0
        self._outcome: Outcome | None = None
        self._told = threading.Event()
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._supervisor = Supervisor(self._job, self._say, resumed=again)
        threading.Thread(target=self._run, daemon=True).start()

    def describe(self) -> tuple[str, str]:
        """Digest of the configuration that runs, and the run's folder."""
        return self._job.digest, str(self._job.folder)

    def news(self, life: str, seen: int) -> News:
        """For a follower that has seen so many lines of this life."""
        outcome = self._outcome  # before the lines: nothing is said after the end
        count, lines = self._count, list(self._lines)
        new = count - seen if life == self._life else count
        return News(self._life, lines[-new:] if new else [], count, outcome)

    def stop(self) -> None:
        """End the run as by Ctrl-C."""
        self._supervisor.stop()

    def told(self) -> None:
        """A follower knows how the run ended."""
        self._told.set()

    def _say(self, line: str) -> None:
        self._lines.append(line)
        self._count += 1

    def _run(self) -> None:
        try:
            self._outcome = Outcome(cloudpickle.dumps(self._supervisor.run()))
        except BaseException as error:
            self._outcome = Outcome(pickle_error(error, "the supervisor"), failed_at=time.time())
        self._told.wait(COLLECT_S)
        time.sleep(OTHERS_S)
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
    follower = _Follower(actor, job, say)
    try:
        outcome = follower.follow()
    except KeyboardInterrupt:
        say("stopping the run")
        _ask(actor, "stop")
        outcome = follower.follow()
    actor.told.remote()
    value = cloudpickle.loads(outcome.pickled)
    if outcome.failed_at is not None:
        raise value
    return value


def stop_run(run: str, folder: Path) -> bool:
    """Ask the supervisor of a run to stop it; whether there is one at work.

    Raises ClusterError where that name is of a run in another folder.
    """
    try:
        actor = ray.get_actor(actor_name(run), NAMESPACE)
    except ValueError:
        return False
    if _ask(actor, "news", "", 0).outcome is not None:
        return False
    _, where = _ask(actor, "describe")
    if where != str(folder):
        raise ClusterError(f"the run {run} on this cluster is another one: it writes to {where}, not to {folder}")
    _ask(actor, "stop")
    return True


def _ask(actor: Any, method: str, *arguments: Any) -> Any:
    """A supervisor's answer, also while Ray makes it anew. Raises ActorDiedError where it is gone for good."""
    deadline = time.monotonic() + RETURN_S
    while True:
        try:
            return ray.get(getattr(actor, method).remote(*arguments), timeout=ANSWER_S)
        except ActorDiedError:
            raise
        except (RayError, GetTimeoutError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"the supervisor has not answered for {RETURN_S:.0f} s: {error}") from error
            time.sleep(POLL_S)


def _find(job: Job) -> Any:
    """The supervisor of this job, also one that has ended well; None if there is none."""
    try:
        actor = ray.get_actor(actor_name(job.name), NAMESPACE)
        (digest, folder), outcome = _ask(actor, "describe"), _ask(actor, "news", "", 0).outcome
    except (ValueError, ActorDiedError):
        return None
    if outcome is not None and (outcome.failed_at is not None or digest != job.digest):
        ray.kill(actor)  # this command is another try
        return None
    if digest != job.digest:
        raise ClusterError(
            f"a run named {job.name!r} (in {folder}) goes on under supervision on this cluster, with another "
            "configuration. Follow it with its own configuration, stop it with `onetrain stop`, or choose another name."
        )
    return actor


def _start(job: Job) -> Any:
    options = {"name": actor_name(job.name), "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0}
    actor = ray.remote(SupervisorActor).options(**options, resources=HEAD, max_restarts=-1, max_concurrency=16)
    deadline = time.monotonic() + RETURN_S
    while True:
        try:
            return actor.remote(cloudpickle.dumps(job))
        except (ValueError, RayError):  # somebody was faster, or the one that was just ended still has the name
            if (found := _find(job)) is not None:
                return found
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


class _Follower:
    """Hands over what a supervisor says."""

    def __init__(self, actor: Any, job: Job, say: Say) -> None:
        self.actor, self.job, self.say = actor, job, say
        self._life, self._seen = "", 0

    def follow(self) -> Outcome:
        """Until the run has ended."""
        while True:
            try:
                news: News = _ask(self.actor, "news", self._life, self._seen)
            except (ActorDiedError, ClusterError) as error:
                raise ClusterError(
                    f"the supervisor of {self.job.name} is gone ({error}); {self.job.folder / EVENTS} says what it did "
                    "last. The same command starts another, which goes on from the newest checkpoint."
                ) from error
            self._life, self._seen = news.life, news.seen
            for line in news.lines:
                self.say(line)
            if news.outcome is not None:
                return news.outcome
            time.sleep(POLL_S)
