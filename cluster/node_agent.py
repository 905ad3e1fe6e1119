"""One agent per node: looks at processes of its node from outside them, and ends those that do not answer.

A rank that hangs cannot say where; `py-spy --nonblocking` reads its stack without its help, also of a stopped process.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 30.0  # the longest that anybody waits for all nodes together
DUMP_S = 10.0  # and an agent for the stacks of its node
DUMPS_AT_ONCE = 8
NO_ANSWER = "no answer: "
STATE = "the process is "
STATES = {
    psutil.STATUS_STOPPED: "stopped by a signal",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "in a wait of the kernel that nothing interrupts (disk, network file system, driver)",
}
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = -1

Processes = dict[int, tuple[str, int]]  # rank -> (Ray node id, pid)
Calls = dict[str, tuple[str, tuple[Any, ...]]]  # Ray node id -> (method, arguments)


def allow_tracing() -> None:
    """Let any process of this user read this one's stack, where Linux otherwise allows that to parents only (Yama)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_long(PR_SET_PTRACER_ANY), 0, 0, 0)


class NodeAgent:
    """An actor that is bound to one node and takes no CPU of it."""

    def stacks(self, pids: list[int], timeout_s: float = DUMP_S) -> dict[int, str]:
        """Python stacks of these processes, read side by side; "no answer: why" for those that cannot be read."""
        deadline = time.monotonic() + timeout_s
        with ThreadPoolExecutor(DUMPS_AT_ONCE) as pool:
            return dict(zip(pids, pool.map(lambda pid: _stack(pid, deadline), pids), strict=True))

    def kill(self, pids: list[int]) -> list[int]:
        """SIGKILL these workers of this node with all that they started; returns the pids hit.

        A pid that now is somebody else's is left alone: a rank is a Ray worker of the same raylet as this agent.
        """
        return [pid for pid in pids if _kill(pid)]

    def run(self, pickled_call: bytes) -> bytes:
        """Run `fn(*args)` from a pickled (fn, args); returns the pickled result, or raises what it raised."""
        fn, args = cloudpickle.loads(pickled_call)
        return cloudpickle.dumps(fn(*args))

    def clock(self) -> float:
        """Unix seconds by this node's clock."""
        return time.time()


class NodeAgents:
    """Agents by Ray node id, made when first asked for; for one calling thread."""

    def __init__(self) -> None:
        self._agents: dict[str, Any] = {}

    def get(self, node_id: str) -> Any:
        """The agent of this node; made if need be, without waiting for it (it takes about a second)."""
        if node_id not in self._agents:
            actor = ray.remote(NodeAgent).options(
                num_cpus=0,
                max_restarts=0,
                max_concurrency=8,  # a call that waits for a dead file system must not hold up the stacks
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            self._agents[node_id] = actor.remote()
        return self._agents[node_id]

    def alive_nodes(self) -> dict[str, str]:
        """Node id -> address of every alive node; agents of the others are dropped."""
        alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        for node_id in self._agents.keys() - alive.keys():
            self._drop(node_id)
        return alive

    def stacks_of(self, processes: Processes, timeout_s: float = ANSWER_S) -> dict[int, str]:
        """Stack of each rank; every one has a text after `timeout_s`, whatever its node does."""
        pids = _by_node(processes)
        calls = {node_id: ("stacks", (pids[node_id], min(DUMP_S, timeout_s / 2))) for node_id in pids}
        answers = self._ask(calls, timeout_s)
        return {rank: _text(answers[node_id], pid) for rank, (node_id, pid) in processes.items()}

    def kill(self, processes: Processes, timeout_s: float = ANSWER_S) -> list[int]:
        """SIGKILL the process of each rank; returns the ranks whose process was hit."""
        answers = self._ask({node_id: ("kill", (pids,)) for node_id, pids in _by_node(processes).items()}, timeout_s)
        return [rank for rank, (node, pid) in processes.items() if _hit(answers[node], pid)]

    def run_on(
        self, node_ids: Iterable[str], fn: Callable[..., Any], args: tuple[Any, ...] = (), timeout_s: float = ANSWER_S
    ) -> dict[str, Any]:
        """`fn(*args)` in the agent of each node, side by side: its result, or the exception, for each node id."""
        call = cloudpickle.dumps((fn, args))
        answers = self._ask({node_id: ("run", (call,)) for node_id in node_ids}, timeout_s)
        return {node: cloudpickle.loads(got) if isinstance(got, bytes) else got for node, got in answers.items()}

    def close(self) -> None:
        """End all agents; safe to call at any time."""
        for node_id in list(self._agents):
            self._drop(node_id)

    def _drop(self, node_id: str) -> None:
        agent = self._agents.pop(node_id)
        if ray.is_initialized():
            with contextlib.suppress(RayError, ValueError):
                ray.kill(agent)

    def _ask(self, calls: Calls, timeout_s: float) -> dict[str, Any]:
        """Call a method of each node's agent; its answer, or the exception, for each node id.

        An agent that is gone or does not answer is dropped, so that the next call makes a new one. One that had gone
        before this call is asked again as a new one.
        """
        deadline = time.monotonic() + timeout_s
        known = set(self._agents)
        answers = self._ask_once(calls, timeout_s)
        again = {node: calls[node] for node in known & calls.keys() if isinstance(answers[node], RayActorError)}
        return answers | self._ask_once(again, max(deadline - time.monotonic(), 0.0))

    def _ask_once(self, calls: Calls, timeout_s: float) -> dict[str, Any]:
        refs = {node: getattr(self.get(node), method).remote(*args) for node, (method, args) in calls.items()}
        ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
        answers: dict[str, Any] = {}
        for node_id, ref in refs.items():
            if ref not in ready:
                answers[node_id] = TimeoutError(f"the node did not answer within {timeout_s:.0f} s")
                self._drop(node_id)
                continue
            try:
                answers[node_id] = ray.get(ref, timeout=1.0)
            except RayTaskError as error:  # the function raised; the agent is well
                answers[node_id] = error.cause or error
            except (RayError, GetTimeoutError) as error:
                answers[node_id] = error
                self._drop(node_id)
        return answers


def _by_node(processes: Processes) -> dict[str, list[int]]:
    pids: dict[str, list[int]] = {}
    for node_id, pid in processes.values():
        pids.setdefault(node_id, []).append(pid)
    return pids


def _text(answer: Any, pid: int) -> str:
    """A rank's stack out of its node's answer."""
    if isinstance(answer, dict):
        return str(answer[pid])
    return f"{NO_ANSWER}{reason_of(answer)}"


def reason_of(error: BaseException) -> str:
    """Why a node gave no answer, in a line."""
    if isinstance(error, ActorUnschedulableError):
        return "the node is no longer in the cluster"
    if isinstance(error, RayActorError):
        return f"the node or its agent died: {str(error).strip().splitlines()[0]}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _hit(answer: Any, pid: int) -> bool:
    return isinstance(answer, list) and pid in answer


def _stack(pid: int, deadline: float) -> str:
    """`py-spy dump` of one process."""
    left = deadline - time.monotonic()
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return f'{NO_ANSWER}no py-spy on this node; it comes with `pip install "ray[default]"`'
    if left <= 0:
        return f"{NO_ANSWER}no time was left after the node's other processes"
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=left)
    except subprocess.TimeoutExpired:
        return f"{NO_ANSWER}py-spy did not read the process within {left:.0f} s"
    except OSError as error:
        return f"{NO_ANSWER}py-spy cannot run: {error}"
    text = done.stdout.strip()
    if done.returncode or not text:
        reason = " ".join(done.stderr.partition("Stack backtrace:")[0].split())  # that would be py-spy's own
        return f"{NO_ANSWER}{reason or f'py-spy ended with {done.returncode}'}"
    with contextlib.suppress(psutil.Error):
        if (state := psutil.Process(pid).status()) in STATES:
            return f"{STATE}{STATES[state]}\n{text}"
    return text


def _kill(pid: int) -> bool:
    """Whether this was a worker of our raylet, which now is killed."""
    try:
        process = psutil.Process(pid)
        if pid == os.getpid() or process.ppid() != os.getppid() or not _is_ray_worker(process):
            return False
        started = process.children(recursive=True)
        process.kill()
    except psutil.Error:
        return False
    for child in started:
        with contextlib.suppress(psutil.Error):
            child.kill()
    return True


def _is_ray_worker(process: psutil.Process) -> bool:
    """Ray names its workers ray::<what they do>."""
    return any(part.startswith("ray::") for part in process.cmdline())
