"""The supervisor of a run: one attempt after another, until the training function has returned or help is needed.

pending -> starting -> running -> (waiting -> starting -> running ...) -> done | failed | stopped. What happened and why
is in <run>/events.jsonl; how the ranks are doing in <run>/heartbeats.json. The words are those of Ray Train
(`max_failures`, preemptions apart), whose users know them.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from onetrain.cluster.errors import ClusterError, HangError, LostWorkerError
from onetrain.cluster.event_log import EVENTS, LEDGER, EventLog, read_log
from onetrain.cluster.failures import Ending, ending_of
from onetrain.cluster.hang_report import report_path, short_message, write_report
from onetrain.cluster.heartbeat_file import HeartbeatFile, another_supervisor
from onetrain.cluster.job import Job, Say
from onetrain.cluster.node_agent import NO_ANSWER, NodeAgents
from onetrain.cluster.nodes import answers, draining_nodes, groups_that_wait
from onetrain.cluster.room import largest, wait_for_room, workers_that_fit
from onetrain.cluster.watch import RankView, Verdict
from onetrain.cluster.worker_group import WorkerGroup, shortage

NODES_S = 3.0  # between two looks for nodes that will be taken away
LOST = "its supervisor was lost"  # the reason of an ending that the next supervisor writes
PAUSES_S = (1.0, 4.0, 15.0, 40.0)  # before each further try of storage that does not answer
QUIET_S = 3.0  # of waiting for room, before it is worth a line
T = TypeVar("T")
SUSPECT_S = 60.0  # Ray finds a dead node in less


class Supervisor:
    """Runs a job in this process, which holds a connection to Ray; `say` gets lines for the user.

    `resumed`: takes the place of a supervisor whose process died, and which may have checked everything.
    """

    def __init__(self, job: Job, say: Say, resumed: bool = False) -> None:
        self.job, self.say, self.resumed = job, say, resumed
        self.agents = NodeAgents()
        self.attempt = 0
        self.trained = self.trained_here = self.asked_to_drain = False  # ever, and under this supervisor
        self.events = EventLog(job.folder / EVENTS)
        self.heartbeats = HeartbeatFile(job.folder, _own_node(), job.sizes[0])
        self._stop = threading.Event()
        self._failures = self._preemptions = self._checkpoint = 0
        self._suspects: dict[str, float] = {}  # node id -> when it fell silent
        self._ended: float | None = None  # when the attempt before ended
        self._group: WorkerGroup | None = None

    def run(self) -> Any:
        """The result of rank 0.

        Raises:
            ClusterError: not enough room, too many failures, or another supervisor works on this run.
            Exception: what the function raised for the user.
            KeyboardInterrupt: `stop` was called.
        """
        job = self.job
        if not self.resumed and (other := another_supervisor(job.folder)) is not None:
            raise ClusterError(
                f"{job.folder} belongs to a run that goes on under another supervisor ({other}). Stop that one, or "
                "choose another name."
            )
        checked = self._take_up_log()
        workers = job.cluster.workers
        self._record("supervisor_started", restarted=self.resumed, workers=workers, sizes=job.sizes, **_here())
        self.heartbeats.start()
        try:
            if not checked:
                self._preflight()
            with job.services(self.say):
                while True:
                    ending, result = self._try()
                    if ending.kind == "finished":
                        self._set_state("done")
                        self._record("run_finished", step=ending.step)
                        return result
                    self._decide(ending)
        except KeyboardInterrupt:
            self._set_state("stopped")
            raise
        except BaseException as error:
            if self.heartbeats.state != "failed":
                self._give_up(str(error))
            raise
        finally:
            self.heartbeats.stop()
            self.agents.close()

    def stop(self) -> None:
        """From any thread: end the run as by Ctrl-C."""
        if not self._stop.is_set():
            self._record("stop_asked")  # which a supervisor that Ray makes anew reads
        self._stop.set()
        if (group := self._group) is not None:
            group.stop()

    def _preflight(self) -> None:
        problems = list(self.job.preflight(self.agents, self.say))
        self._record("preflight", ok=not problems, problems=problems)
        if problems:
            raise ClusterError("the run was not started; preflight found:\n" + "\n".join(f"- {p}" for p in problems))

    def _try(self) -> tuple[Ending, Any]:
        """One attempt, from the wait for room to its end."""
        job, first = self.job, self._ended is None and not self.trained
        began, checkpointed = time.monotonic(), self._checkpointed()
        size = self._room(first)
        self.attempt += 1
        self._set_state("starting")
        self.asked_to_drain = False
        options = replace(job.cluster, workers=size)
        first_here = not self.trained_here and not self.resumed
        group = WorkerGroup(options, job.threads_per_worker, self.attempt, job.recovery, first_here)
        self._group = group
        observer = _Attempt(self, group, size, began if self._ended is None else self._ended)
        result, error = None, None
        try:
            if self._stop.is_set():
                raise KeyboardInterrupt
            group.start()
            reason = "start" if self.attempt == 1 else "next attempt"
            nodes = group.nodes
            self._record("attempt_started", world_size=size, wanted=job.sizes[0], nodes=nodes, reason=reason)
            for node, _ in group.processes.values():
                self.agents.get(node)  # while the node is well
            self._record("ranks_running", seconds=round(time.monotonic() - began, 3))
            if size < job.cluster.workers:
                self.say(f"attempt {self.attempt} runs on {size} of {job.cluster.workers} ranks")
            self._set_state("running", size)
            result = group.run(job.function, job.arguments, self.say, observer)[0]
        except (Exception, KeyboardInterrupt) as failure:
            error = KeyboardInterrupt() if self._stop.is_set() else failure
        ended = time.monotonic()
        self._end_group(group, error)
        ending = ending_of(error, observer.step, observer.position, self.trained, self.asked_to_drain)
        self._record("attempt_ended", **ending.fields())
        self._ended = ended
        if self._checkpointed() > checkpointed:
            self._failures = 0
        if isinstance(error, KeyboardInterrupt):
            raise error
        return ending, result

    def _room(self, first: bool) -> int:
        """The world size of the next attempt."""
        job, recovery = self.job, self.job.recovery
        if first and recovery.min_workers is None:
            return job.sizes[0]  # the group itself waits, and shows what is missing
        timeout_s = job.cluster.start_timeout_s if first else recovery.wait_for_nodes_s
        size = wait_for_room(job.cluster, job.sizes, QUIET_S, self._stop.is_set, self._silent_nodes)
        if size != job.sizes[0]:
            self._set_state("waiting")
            self._record("waiting", seconds=timeout_s, reason="room for all ranks")
            self.say(f"waiting for room for {job.sizes[-1]} to {job.sizes[0]} ranks, {timeout_s:g} s at most")
            size = wait_for_room(job.cluster, job.sizes, timeout_s, self._stop.is_set, self._silent_nodes)
        if self._stop.is_set():
            raise KeyboardInterrupt
        if size is None:
            raise ClusterError(
                f"{shortage(replace(job.cluster, workers=job.sizes[-1]), timeout_s)}\n"
                f"The run needs {job.sizes[-1]} ranks at least; started again, it goes on from its newest checkpoint."
            )
        return size

    def _decide(self, ending: Ending) -> None:
        """Go on to another attempt, after a pause where failures repeat; or raise."""
        recovery = self.job.recovery
        if ending.kind == "node_lost":
            ids = {node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == ending.node}
            self._suspects |= dict.fromkeys(ids, time.monotonic())
        if ending.kind == "refused":
            self._give_up(ending.reason)
            assert ending.error is not None
            raise ending.error
        if ending.kind in ("drained", "rolled_back"):
            self.say(f"attempt {self.attempt} ended: {ending.reason}")
            return
        if ending.kind == "preempted":
            self._preemptions += 1
            if recovery.max_preemptions is not None and self._preemptions > recovery.max_preemptions:
                self._fail(f"{self._preemptions} preemptions are more than recovery.max_preemptions", ending)
            self.say(f"attempt {self.attempt} was preempted: {ending.reason}")
            return
        self._failures += 1
        if self._failures > recovery.max_failures:
            limit = f"{self._failures} failure(s) without a new checkpoint between them (recovery.max_failures is "
            self._fail(f"{limit}{recovery.max_failures})", ending)
        pause = 0.0 if self._failures == 1 else recovery.backoff_s * 2 ** (self._failures - 2)
        pause = min(pause, recovery.backoff_limit_s)
        self.say(f"attempt {self.attempt} failed: {ending.reason}")
        self.say(f"another attempt follows{f' in {pause:g} s' if pause else ''} (failure {self._failures} in a row)")
        if pause:
            self._set_state("waiting")
            self._record("waiting", seconds=pause, reason="back-off")
            if self._stop.wait(pause):
                raise KeyboardInterrupt

    def _fail(self, why: str, ending: Ending) -> None:
        self._give_up(f"{why}: {ending.reason}")
        self.say(f"given up: {why}")
        assert ending.error is not None
        raise ending.error

    def _give_up(self, reason: str) -> None:
        self._set_state("failed")
        self._record("gave_up", reason=reason)

    def _end_group(self, group: WorkerGroup, error: BaseException | None) -> None:
        """End every process of the group, also one that is stopped and hears nothing."""
        self._group = None
        if isinstance(error, HangError):
            self.agents.kill(_reachable(group))
        group.shut_down()

    def hang(self, group: WorkerGroup, verdict: Verdict, views: list[RankView]) -> ClusterError:
        """What to raise for ranks that hang, once everything about it is written down before the group is ended."""
        rank = verdict.ranks[0]
        node, address = group.processes[rank][0], group.nodes[rank]
        if verdict.kind == "silent" and not answers(node):
            return LostWorkerError(f"{verdict.message}, and its node does not answer", rank, address, node_lost=True)
        self.say(f"attempt {self.attempt}: {verdict.message}; reading the stacks of all ranks")
        reachable = _reachable(group)
        stacks = {rank: f"{NO_ANSWER}the node does not answer" for rank in group.processes.keys() - reachable.keys()}
        stacks |= self.agents.stacks_of(reachable)
        path = report_path(self.job.folder, self.attempt)
        try:
            write_report(self.job.folder, self.attempt, verdict, views, stacks)
        except OSError as error:  # a full disk
            self.say(f"warning: {path} cannot be written: {error}")
        return HangError(short_message(verdict, views, stacks, path), rank, address, str(path))

    def look_for_room(self, group: WorkerGroup, size: int) -> None:
        """Ask for a new attempt where nodes have come back."""
        if groups_that_wait():
            return  # what is free is theirs, and what this run would give back could be too
        room = size + workers_that_fit(self.job.cluster, self._silent_nodes())
        larger = largest(self.job.sizes, room)
        if larger is not None and larger > size:
            self.asked_to_drain = True
            self._record("nodes", alive=sum(node["Alive"] for node in ray.nodes()), free=room - size)
            group.drain(f"there is room for {larger} ranks instead of {size}")

    def leave_nodes(self, group: WorkerGroup) -> bool:
        """Ask for an end of the attempt where nodes of the group will be taken away; whether there are any."""
        going = draining_nodes() & {node for node, _ in group.processes.values()}
        if going:
            ranks = sorted(rank for rank, (node, _) in group.processes.items() if node in going)
            group.drain(f"Ray was told that the node of rank(s) {', '.join(map(str, ranks))} will be taken away")
        return bool(going)

    def _silent_nodes(self) -> set[str]:
        """Nodes that were lost and have not answered since."""
        now = time.monotonic()
        for node, since in list(self._suspects.items()):
            if now - since > SUSPECT_S or answers(node):
                del self._suspects[node]
        return set(self._suspects)

    def _take_up_log(self) -> bool:
        """What earlier supervisors of the run have left; whether everything was checked by one that this one replaces.

        Raises KeyboardInterrupt where that one was asked to stop.
        """
        log = _patiently(lambda: read_log(self.events.path))
        self.attempt = _patiently(lambda: _last_attempt(self.job.folder, log))
        self._checkpoint = _patiently(self.job.checkpointed)
        self.trained = self._checkpoint > 0 or any(record["event"] == "training" for record in log)
        attempts = [record for record in log if record["event"] in ("attempt_started", "attempt_ended")]
        if attempts and attempts[-1]["event"] == "attempt_started":
            lost = Ending("died", LOST, step=self._checkpoint)
            attempts.append(self._record("attempt_ended", attempt=attempts[-1]["attempt"], **lost.fields()))
        for record in reversed(attempts):  # supervisors that die again and again at one place
            if record["event"] == "attempt_ended":
                if (record["reason"], record["step"]) != (LOST, self._checkpoint):
                    break
                self._failures += 1
        if not self.resumed:
            self._failures = 0
            return False
        since = [record["event"] for record in log]
        since = since[len(since) - since[::-1].index("supervisor_started") :] if "supervisor_started" in since else []
        if "stop_asked" in since:
            raise KeyboardInterrupt
        if self._failures > self.job.recovery.max_failures:
            raise ClusterError(f"{self._failures} supervisors of this run died without a new checkpoint between them")
        return any(record["event"] == "preflight" and record["ok"] for record in log)

    def _checkpointed(self) -> int:
        """The step of the newest checkpoint, as far as the storage answers."""
        try:
            self._checkpoint = self.job.checkpointed()
        except Exception as error:  # of any kind of storage; the next attempt will tell
            self.say(f"warning: the checkpoints cannot be listed: {error}")
        return self._checkpoint

    def _record(self, event: str, **fields: Any) -> dict[str, Any]:
        record = {"event": event, **fields}
        if self.attempt and "attempt" not in record:
            record["attempt"] = self.attempt
        try:
            self.events.add(**record)
        except OSError as error:  # a full disk ends no run
            self.say(f"warning: {self.events.path} cannot be written: {error}")
        return record

    def _set_state(self, state: str, world_size: int = 0) -> None:
        self.heartbeats.set(state, self.attempt, world_size)


class _Attempt:
    """The Observer of one attempt."""

    def __init__(self, supervisor: Supervisor, group: WorkerGroup, size: int, since: float) -> None:
        self._supervisor, self._group, self._size, self._since = supervisor, group, size, since
        self._first_step: int | None = None
        self._trains = False
        self._looked_for_room = self._looked_at_nodes = time.monotonic()
        self._leaves = False
        self.step: int | None = None
        self.position: int | None = None

    def looked(self, views: list[RankView]) -> None:
        """See Observer."""
        now, supervisor = time.monotonic(), self._supervisor
        supervisor.heartbeats.views, main = views, views[0]
        self.step, self.position = main.step, main.position
        if main.step is not None and not self._trains:
            self._first_step = main.step if self._first_step is None else self._first_step
            if main.phase in ("step", "validation") or main.step > self._first_step:
                self._trains = supervisor.trained = supervisor.trained_here = True
                supervisor._record("training", step=main.step, seconds=round(now - self._since, 3))
        if not self._leaves and now - self._looked_at_nodes >= NODES_S:
            self._looked_at_nodes = now
            self._leaves = supervisor.leave_nodes(self._group)
        every = supervisor.job.recovery.grow_every_s
        growing = (
            self._trains and self._size < supervisor.job.sizes[0] and not self._leaves and not supervisor.asked_to_drain
        )
        if every and growing and now - self._looked_for_room >= every:
            self._looked_for_room = now
            supervisor.look_for_room(self._group, self._size)

    def hangs(self, verdict: Verdict, views: list[RankView]) -> ClusterError:
        """See Observer."""
        return self._supervisor.hang(self._group, verdict, views)


def _reachable(group: WorkerGroup) -> dict[int, tuple[str, int]]:
    """The processes on nodes that answer."""
    alive = {node: answers(node) for node in {node for node, _ in group.processes.values()}}
    return {rank: process for rank, process in group.processes.items() if alive[process[0]]}


def _last_attempt(folder: Path, log: list[dict[str, Any]]) -> int:
    records = [*log, *read_log(folder / LEDGER)]
    return max((record["attempt"] for record in records if isinstance(record.get("attempt"), int)), default=0)


def _patiently(read: Callable[[], T]) -> T:
    """Storage that is away for a moment is no reason to give up a run."""
    for pause in PAUSES_S:
        try:
            return read()
        except Exception:
            time.sleep(pause)
    return read()


def _here() -> dict[str, Any]:
    return {"pid": os.getpid(), "node": _own_node()}


def _own_node() -> str:
    try:
        return ray.util.get_node_ip_address()
    except RayError:
        return ""
