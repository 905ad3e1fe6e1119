"""The supervisor of a run: one attempt after another, until the training function has returned or help is needed.

pending -> starting -> running -> (waiting -> starting -> running ...) -> done | failed | stopped. What happened and why
is in <run>/events.jsonl; how the ranks are doing in <run>/heartbeats.json. The words are those of Ray Train
(`max_failures`, preemptions apart), whose users know them.
"""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from onetrain.cluster.errors import ClusterError, HangError
from onetrain.cluster.event_log import EVENTS, HEARTBEATS, EventLog, read_log
from onetrain.cluster.failures import Ending, ending_of
from onetrain.cluster.hang_report import report_path, short_message, write_report
from onetrain.cluster.job import Job, Say
from onetrain.cluster.node_agent import NodeAgents
from onetrain.cluster.nodes import answers, draining_nodes
from onetrain.cluster.room import largest, wait_for_room, workers_that_fit
from onetrain.cluster.watch import RankView, Verdict
from onetrain.cluster.worker_group import WorkerGroup

NODES_S = 3.0  # between two looks for nodes that will be taken away
HEARTBEATS_S = 2.0  # between two versions of heartbeats.json
SUSPECT_S = 60.0  # Ray finds a dead node in less


class Supervisor:
    """Runs a job in this process, which holds a connection to Ray; `say` gets lines for the user.

    `resumed`: takes the place of a supervisor whose process died, and which had checked everything.
    """

    def __init__(self, job: Job, say: Say, resumed: bool = False) -> None:
        self.job, self.say, self.resumed = job, say, resumed
        self.events = EventLog(job.folder / EVENTS)
        self.agents = NodeAgents()
        self.state = "pending"
        self.attempt = _last_attempt(job.folder)
        self._stop = threading.Event()
        self._failures = self._preemptions = 0
        self._suspects: dict[str, float] = {}  # node id -> when it fell silent
        self._ended: float | None = None  # when the attempt before ended
        self._group: WorkerGroup | None = None
        self.asked_to_drain = False
        self.trained = job.checkpointed() > 0 or any(r["event"] == "training" for r in read_log(self.events.path))
        self.views: list[RankView] = []  # as they were last seen
        self._world_size = 0

    def run(self) -> Any:
        """The result of rank 0.

        Raises:
            ClusterError: not enough room, or too many failures; the last one is its cause.
            Exception: what the function raised for the user.
            KeyboardInterrupt: `stop` was called.
        """
        job = self.job
        self._note_a_lost_supervisor()
        self._record("supervisor_started", pid=os.getpid(), node=_own_node(), restarted=self.resumed,
                     workers=job.cluster.workers, sizes=job.sizes)  # fmt: skip
        over = threading.Event()
        threading.Thread(target=self._show_heartbeats, args=(over,), daemon=True).start()
        try:
            if not self.resumed:
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
            if self.state != "failed":
                self._give_up(str(error))
            raise
        finally:
            over.set()
            self.agents.close()

    def stop(self) -> None:
        """From any thread: end the run as by Ctrl-C."""
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
        began, checkpointed = time.monotonic(), job.checkpointed()
        size = self._room(first)
        self.attempt += 1
        self._set_state("starting")
        self.asked_to_drain = False
        self._group = group = WorkerGroup(
            replace(job.cluster, workers=size), job.threads_per_worker, self.attempt, job.recovery
        )
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
            error = failure
        ended = time.monotonic()
        self._end_group(group, error)
        ending = ending_of(error, observer.step, observer.position, self.trained, self.asked_to_drain)
        self._record("attempt_ended", **ending.fields())
        self._ended = ended
        if job.checkpointed() > checkpointed:
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
        self._set_state("waiting")
        size = wait_for_room(job.cluster, job.sizes, timeout_s, self._stop.is_set, self._silent_nodes)
        if self._stop.is_set():
            raise KeyboardInterrupt
        if size is None:
            room = workers_that_fit(job.cluster, free=True)
            raise ClusterError(
                f"after {timeout_s:g} s the cluster has room for {room} workers, and the run needs {job.sizes[-1]} at "
                "least. Add or free nodes and start it again: it goes on from its newest checkpoint."
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
        assert ending.error is not None
        ending.error.add_note(f"given up: {why}")
        raise ending.error

    def _give_up(self, reason: str) -> None:
        self._set_state("failed")
        self._record("gave_up", reason=reason)

    def _end_group(self, group: WorkerGroup, error: BaseException | None) -> None:
        """End every process of the group, also one that is stopped and hears nothing."""
        self._group = None
        if isinstance(error, HangError):
            self.agents.kill(group.processes)
        group.shut_down()

    def hang(self, group: WorkerGroup, verdict: Verdict, views: list[RankView]) -> HangError:
        """Everything about ranks that hang, written down before the group is ended."""
        self.say(f"attempt {self.attempt}: {verdict.message}; reading the stacks of all ranks")
        stacks = self.agents.stacks_of(group.processes)
        path = report_path(self.job.folder, self.attempt)
        try:
            write_report(self.job.folder, self.attempt, verdict, views, stacks)
        except OSError as error:  # a full disk
            self.say(f"warning: {path} cannot be written: {error}")
        rank = verdict.ranks[0]
        return HangError(short_message(verdict, views, stacks, path), rank, group.nodes[rank], str(path))

    def look_for_room(self, group: WorkerGroup, size: int) -> None:
        """Ask for a new attempt where nodes have come back."""
        room = size + workers_that_fit(self.job.cluster, free=True, without=self._silent_nodes())
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

    def _note_a_lost_supervisor(self) -> None:
        """End in the log what a supervisor before this one had begun and could not end."""
        last = next((r for r in reversed(read_log(self.events.path)) if r["event"].startswith("attempt_")), None)
        if last is not None and last["event"] == "attempt_started":
            fields = Ending("died", "its supervisor was lost").fields()
            self.events.add(event="attempt_ended", attempt=last["attempt"], **fields)

    def _record(self, event: str, **fields: Any) -> None:
        record = {"event": event, **fields}
        if self.attempt and "attempt" not in record:
            record["attempt"] = self.attempt
        try:
            self.events.add(**record)
        except OSError as error:  # a full disk ends no run
            self.say(f"warning: {self.events.path} cannot be written: {error}")

    def _set_state(self, state: str, world_size: int = 0) -> None:
        self.state, self._world_size, self.views = state, world_size, []
        self._write_heartbeats()

    def _show_heartbeats(self, over: threading.Event) -> None:
        while not over.wait(HEARTBEATS_S):
            self._write_heartbeats()

    def _write_heartbeats(self) -> None:
        """The file that `onetrain status` reads."""
        path = self.job.folder / HEARTBEATS
        value = {
            "time": round(time.time(), 3),
            "state": self.state,
            "attempt": self.attempt,
            "world_size": self._world_size,
            "wanted": self.job.sizes[0],
            "ranks": [view.as_json() for view in self.views],
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_text(json.dumps(value), encoding="utf-8")
            os.replace(temporary, path)
        except OSError:  # a full disk: the next one may succeed
            temporary.unlink(missing_ok=True)


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
        supervisor.views, main = views, views[0]
        self.step, self.position = main.step, main.position
        if main.step is not None and not self._trains:
            self._first_step = main.step if self._first_step is None else self._first_step
            if main.phase in ("step", "validation", "end") or main.step > self._first_step:
                self._trains = supervisor.trained = True
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

    def hangs(self, verdict: Verdict, views: list[RankView]) -> HangError:
        """See Observer."""
        return self._supervisor.hang(self._group, verdict, views)


def _last_attempt(folder: Path) -> int:
    records = [*read_log(folder / EVENTS), *read_log(folder / "ledger.jsonl")]
    return max((record["attempt"] for record in records if isinstance(record.get("attempt"), int)), default=0)


def _own_node() -> str:
    try:
        return ray.util.get_node_ip_address()
    except RayError:
        return ""
