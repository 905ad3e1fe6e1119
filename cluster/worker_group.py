"""The worker group: one Ray actor per rank, placed together, started together, ended together.

A rank that dies cannot rejoin its process group, so nothing is restarted here: the group ends as a whole, and the
supervisor decides about another attempt.
"""

import ipaddress
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from onetrain.cluster.beacon import DRAIN, STOP
from onetrain.cluster.errors import ClusterError, LostWorkerError
from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.nodes import answers
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.recovery_options import RecoveryOptions
from onetrain.cluster.watch import RankView, Verdict, Watch
from onetrain.cluster.worker import Mailbox, Outcome, Worker

T = TypeVar("T")

STOP_GRACE_S = 5.0  # between asking the workers to stop and killing them
LOOK_S = 0.5  # between two looks at heartbeats
END_GRACE_S = 60.0  # for ranks that tidy up after an error of all ranks
BEATS_PER_S = 250  # in all, that a mailbox is asked to take
SILENT_BEATS = 4  # heartbeats that a rank has missed when it counts as the cause of others' broken connections
FAILURE_GRACE_S = 2.0  # one failing rank breaks the others' collectives; wait this long for the cause among the effects


def run_on_workers(
    fn: Callable[..., T],
    args: tuple[Any, ...],
    options: ClusterOptions,
    threads_per_worker: int,
    on_message: Callable[[str], None] | None = None,
) -> list[T]:
    """Run `fn(*args)` once per rank on Ray and return the results in rank order.

    `fn` needs to know nothing of Ray: it finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT and OMP_NUM_THREADS (= `threads_per_worker`) in its environment, and runs in the main thread of its own
    process, in the driver's working directory where its node has that. Where Ray masks the GPUs (`gpus_per_worker` >
    0) LOCAL_RANK is 0, the first of the visible ones. What rank 0 prints goes line by line to `on_message` (default:
    print); the other ranks' output stays in Ray's log files.

    Ctrl-C reaches `fn` as a KeyboardInterrupt on every rank; a rank still running 5 s later is killed.

    Raises:
        ClusterError: Ray cannot be reached, resources are missing after `start_timeout_s`, the master port is in use,
            or a worker died.
        Exception: what the first failing rank raised, with its traceback as a note.
    """
    with ray_session(options):
        group = WorkerGroup(options, threads_per_worker)
        try:
            group.start()
            return group.run(fn, args, on_message or print)
        except RayError as error:
            raise ClusterError(f"Ray failed: {error}") from error
        finally:
            group.shut_down()


class Observer(Protocol):
    """Who looks at a running group."""

    def looked(self, views: list[RankView]) -> None:
        """Called twice a second with every rank's state."""

    def hangs(self, verdict: Verdict, views: list[RankView]) -> Exception:
        """A rank hangs: what to raise, once everything about it is written down."""


class WorkerGroup:
    """`options.workers` actors in one placement group; `start`, `run` once, and always `shut_down`.

    `attempt` numbers the try of a supervised run, and `first` says whether it is the first since the user's command;
    `recovery` says how often ranks show themselves, and when they hang.
    """

    def __init__(
        self,
        options: ClusterOptions,
        threads_per_worker: int,
        attempt: int | None = None,
        recovery: RecoveryOptions | None = None,
        first: bool = True,
    ) -> None:
        self.nodes: list[str] = []  # node address of each rank
        self.processes: dict[int, tuple[str, int]] = {}  # rank -> (node id, pid)
        self._options = options
        self._threads_per_worker = threads_per_worker
        self._attempt, self._first = attempt, first
        self._recovery = recovery or RecoveryOptions()
        self._heartbeat_s = max(self._recovery.heartbeat_s, options.workers / BEATS_PER_S)
        self._stop_wanted = threading.Event()
        self._placement: PlacementGroup | None = None
        self._workers: list[Any] = []
        self._mailbox: Any = None

    def start(self) -> None:
        """Reserve the resources, start one actor per rank, and give each its rank's environment.

        Raises:
            ClusterError: not enough resources, an actor that does not start, or a master port in use.
        """
        options = self._options
        deadline = time.monotonic() + options.start_timeout_s
        bundle = {"CPU": options.cpus_per_worker}
        if options.gpus_per_worker:
            bundle["GPU"] = options.gpus_per_worker
        self._placement = placement_group([bundle] * options.workers, strategy="PACK")
        while not self._placement.wait(LOOK_S):
            self._heed_stop()
            if time.monotonic() > deadline:
                raise ClusterError(shortage(options, options.start_timeout_s))

        places = _sorted_places(self._placement)
        self.nodes = [address for address, _, _ in places]
        # beside this process: it outlives every other node
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=options.workers + 8, scheduling_strategy=here)
        self._mailbox = mailbox.remote()
        for rank, (address, _, bundle_index) in enumerate(places):
            actor = ray.remote(Worker).options(
                num_cpus=options.cpus_per_worker,
                num_gpus=options.gpus_per_worker,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, bundle_index),
            )
            arguments = (rank, address, self._mailbox, self._heartbeat_s, self._attempt, self._first)
            self._workers.append(actor.remote(*arguments))
        slow = (
            f"the {options.workers} workers were placed but did not start within cluster.start_timeout_s = "
            f"{options.start_timeout_s:g} s; raise it if the nodes are slow to import, and see Ray's worker logs"
        )
        try:
            pids = self._get([worker.pid.remote() for worker in self._workers], deadline, slow)
        except RayError as error:
            raise ClusterError(
                f"a worker did not start; is onetrain installed on every node? Ray says: {error}"
            ) from error

        self.processes = {rank: (node_id, pids[rank]) for rank, (_, node_id, _) in enumerate(places)}
        try:
            (port,) = self._get([self._workers[0].find_port.remote(options.master_port)], deadline, slow)
            if port is None:
                raise ClusterError(
                    f"port {options.master_port} is in use on node {self.nodes[0]}, where rank 0 runs; choose another "
                    "cluster.master_port, or leave it out to take a free one"
                )
            environments = zip(self._workers, self._environments(places, port), strict=True)
            self._get([worker.set_up.remote(values, os.getcwd()) for worker, values in environments], deadline, slow)
        except RayError as error:
            raise LostWorkerError(
                f"a worker died while it was set up. Ray says: {_reason(error)}", 0, self.nodes[0]
            ) from error

    def run(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        on_message: Callable[[str], None],
        observer: Observer | None = None,
    ) -> list[T]:
        """Run `fn(*args)` on every rank; see `run_on_workers`.

        With an observer also raises what it makes of a rank that hangs.
        """
        call = ray.put(cloudpickle.dumps((fn, args)))
        pending = {worker.run.remote(call): rank for rank, worker in enumerate(self._workers)}
        watch = Watch(self._recovery, len(self._workers), time.monotonic(), self.nodes)
        look = self._mailbox.take.remote(LOOK_S)
        outcomes: dict[int, Outcome | ClusterError] = {}
        give_up = last_end = float("inf")
        try:
            while pending:
                left = give_up - time.monotonic()
                if left <= 0 and not (give_up < last_end and self._tidy_up(outcomes, watch)):
                    break
                # `look` last, so that steady printing cannot hide a failed rank
                ready, _ = ray.wait([*pending, look], timeout=None if left == float("inf") else max(left, LOOK_S))
                for ref in ready:
                    if ref == look:
                        taken, look = look, self._mailbox.take.remote(LOOK_S)
                        self._take_up(taken, on_message, watch, observer if give_up == float("inf") else None)
                        continue
                    rank = pending.pop(ref)
                    watch.done(rank)
                    outcomes[rank] = outcome = self._outcome(ref, rank)
                    if isinstance(outcome, ClusterError) or outcome.failed_at is not None:
                        give_up = min(give_up, time.monotonic() + FAILURE_GRACE_S)
                        last_end = min(last_end, time.monotonic() + END_GRACE_S)
                self._heed_stop()
        except (KeyboardInterrupt, SystemExit):
            self._mailbox.wish.remote(STOP, "stopped")
            ray.wait(list(pending), num_returns=len(pending), timeout=STOP_GRACE_S)
            raise
        finally:
            for rest in (look, self._mailbox.take.remote()):
                _deliver(ray.get(rest)[0], on_message)
        views = [view for view in watch.snapshot(time.monotonic()) if view.rank not in outcomes]
        _raise_first_failure(outcomes, self._gone(views))
        return [cloudpickle.loads(outcomes[rank].pickled) for rank in sorted(outcomes)]  # type: ignore[union-attr]

    def drain(self, why: str) -> None:
        """Ask the function, which reads its beacon, to save and to end this attempt."""
        self._mailbox.wish.remote(DRAIN, why)

    def stop(self) -> None:
        """From any thread: `run` ends as by Ctrl-C."""
        self._stop_wanted.set()

    def shut_down(self) -> None:
        """Kill every actor and remove the placement group; safe to call at any time."""
        for actor in [*self._workers, self._mailbox]:
            if actor is not None:
                ray.kill(actor)
        if self._placement is not None:
            remove_placement_group(self._placement)
        self._workers, self._mailbox, self._placement = [], None, None

    def _environments(self, places: list[tuple[str, str, int]], port: int) -> list[dict[str, str]]:
        """The environment variables of each rank."""
        node_ids = [node_id for _, node_id, _ in places]
        masked = self._options.gpus_per_worker > 0
        no_gpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # Ray does not hide GPUs that nobody asked for
        return [
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": "0" if masked else str(node_ids[:rank].count(node_id)),
                "LOCAL_WORLD_SIZE": str(node_ids.count(node_id)),
                "MASTER_ADDR": self.nodes[0],
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(self._threads_per_worker),
                **({} if masked else no_gpu),
            }
            for rank, node_id in enumerate(node_ids)
        ]

    def _take_up(self, look: Any, on_message: Callable[[str], None], watch: Watch, observer: Observer | None) -> None:
        """One look at the mailbox."""
        lines, beats = ray.get(look)
        _deliver(lines, on_message)
        now = time.monotonic()
        for beat in beats:
            watch.heard(beat, now)
        if observer is not None:
            observer.looked(views := watch.snapshot(now))
            if (verdict := watch.verdict(now)) is not None:
                raise observer.hangs(verdict, views)

    def _tidy_up(self, outcomes: dict[int, Outcome | ClusterError], watch: Watch) -> bool:
        """Whether all ranks met an error of their own making, and those that are left are about to end."""
        for outcome in outcomes.values():
            if isinstance(outcome, ClusterError):
                return False
            if outcome.failed_at is not None and not hasattr(cloudpickle.loads(outcome.pickled), "exit_code"):
                return False
        views = watch.snapshot(time.monotonic())
        return all(view.phase == "end" for view in views if view.rank not in outcomes)

    def _get(self, refs: list[Any], deadline: float, too_late: str) -> list[Any]:
        """`ray.get` that a wish to stop ends, and that raises ClusterError after the deadline."""
        while len(ray.wait(refs, num_returns=len(refs), timeout=LOOK_S)[0]) < len(refs):
            self._heed_stop()
            if time.monotonic() > deadline:
                raise ClusterError(too_late)
        return ray.get(refs)

    def _heed_stop(self) -> None:
        if self._stop_wanted.is_set():
            raise KeyboardInterrupt

    def _outcome(self, ref: Any, rank: int) -> Outcome | LostWorkerError:
        """How a rank ended."""
        try:
            return ray.get(ref)
        except RayError as error:
            node_id, pid = self.processes[rank]
            message = (
                f"the worker of rank {rank} on node {self.nodes[rank]} (pid {pid}) died; the others were "
                f"stopped. Ray says: {_reason(error)}"
            )
            preempted = bool(getattr(error, "preempted", False))
            return LostWorkerError(message, rank, self.nodes[rank], not answers(node_id), preempted)

    def _gone(self, views: list[RankView]) -> LostWorkerError | None:
        """The first rank that has neither ended nor shown itself of late."""
        limit = SILENT_BEATS * self._heartbeat_s
        silent = {view.rank: view.age_s for view in views if view.age_s is not None and view.age_s > limit}
        if not silent:
            return None
        rank = min(silent)
        node_id, pid = self.processes[rank]
        node_lost = not answers(node_id)
        what = f"node {self.nodes[rank]}, with rank {rank}," if node_lost else f"rank {rank} on node {self.nodes[rank]}"
        message = (
            f"{what} (pid {pid}) has not shown itself for {silent[rank]:.0f} s, and the other ranks lost it; they were "
            "stopped."
        )
        return LostWorkerError(message, rank, self.nodes[rank], node_lost)


def _reason(error: RayError) -> str:
    """Ray's own words, without its guesses at common causes."""
    return str(error).strip().splitlines()[-1].partition(" Some common causes")[0]


def _sorted_places(placement: PlacementGroup) -> list[tuple[str, str, int]]:
    """(node address, node id, bundle index) of each rank: ranks of one node are contiguous."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = placement_group_table(placement)["bundles_to_node_id"]
    places = [(addresses[node_id], node_id, int(index)) for index, node_id in nodes.items()]
    return sorted(places, key=lambda place: (ipaddress.ip_address(place[0]).packed, *place[1:]))


def _deliver(lines: list[str], on_message: Callable[[str], None]) -> None:
    """Hand over the lines that rank 0 printed."""
    for line in lines:
        on_message(line)


def _raise_first_failure(outcomes: dict[int, Outcome | ClusterError], gone: ClusterError | None) -> None:
    """Raise the cause, if any rank failed: a death before all, then errors for the user, then a rank that went silent,
    then the earliest."""
    for _, outcome in sorted(outcomes.items()):
        if isinstance(outcome, ClusterError):
            raise outcome
    failed = [o for o in outcomes.values() if isinstance(o, Outcome) and o.failed_at is not None]
    if failed:
        errors = [cloudpickle.loads(o.pickled) for o in sorted(failed, key=lambda o: o.failed_at or 0.0)]
        meant_for_the_user = [error for error in errors if hasattr(error, "exit_code")]
        raise [*meant_for_the_user, *([] if gone is None else [gone]), *errors][0]


def shortage(options: ClusterOptions, waited_s: float) -> str:
    """The wanted resources beside those of the cluster, as a small table."""
    total, free = ray.cluster_resources(), ray.available_resources()
    worker = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    rows = {
        "one worker wants": worker,
        f"{options.workers} workers want": {kind: options.workers * amount for kind, amount in worker.items()},
        "cluster has free": free,
        "cluster has in all": total,
    }
    rows |= {f"  node {node['NodeManagerAddress']}": node["Resources"] for node in ray.nodes() if node["Alive"]}
    width = max(len(name) for name in rows)
    table = "\n".join(f"  {name:{width}}{row.get('CPU', 0):8g}{row.get('GPU', 0):8g}" for name, row in rows.items())
    return (
        f"not enough resources for the worker group after {waited_s:g} s:\n"
        f"  {'':{width}}{'CPU':>8}{'GPU':>8}\n{table}\n"
        "Lower cluster.workers, cpus_per_worker or gpus_per_worker, or free or add nodes; one node must hold a worker."
    )
