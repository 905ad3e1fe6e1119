"""One agent per node: looks at processes of its node from outside them, and ends those that do not answer.

A rank that hangs cannot say where; `py-spy --nonblocking` reads its stack without its help, also of a stopped process.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 30.0  # the longest that anybody waits for all nodes
DUMP_S = 10.0  # and for one process
NO_ANSWER = "no answer: "
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = -1


def allow_tracing() -> None:
    """Let any process of this user read this one's stack, where Linux otherwise allows that to parents only (Yama)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_long(PR_SET_PTRACER_ANY), 0, 0, 0)


class NodeAgent:
    """An actor that is bound to one node and takes no CPU of it."""

    def stacks(self, pids: list[int], timeout_s: float = DUMP_S) -> dict[int, str]:
        """Python stacks of these processes of this node, read side by side; "no answer: why" for those that fail."""
        raise NotImplementedError

    def identify(self, pids: list[int]) -> dict[int, float]:
        """pid -> when the process was created, for `kill`; those that are gone are left out."""
        raise NotImplementedError

    def kill(self, created: dict[int, float]) -> list[int]:
        """SIGKILL these processes, if they are still the ones that were created then; returns the pids hit."""
        raise NotImplementedError

    def run(self, pickled_call: bytes) -> bytes:
        """Run `fn(*args)` from a pickled (fn, args); returns the pickled result, or raises what it raised."""
        raise NotImplementedError

    def clock(self) -> float:
        """Unix seconds by this node's clock."""
        return time.time()


class NodeAgents:
    """Agents by Ray node id, made when first asked for. One caller at a time."""

    def get(self, node_id: str) -> Any:
        """The agent of this node; made if need be, without waiting for it."""
        raise NotImplementedError

    def alive_nodes(self) -> dict[str, str]:
        """Node id -> address of every alive node; agents of the others are dropped."""
        raise NotImplementedError

    def stacks_of(self, processes: dict[int, tuple[str, int]], timeout_s: float = ANSWER_S) -> dict[int, str]:
        """Stack of each rank, from rank -> (node id, pid); every rank has a text after `timeout_s` at the latest."""
        raise NotImplementedError

    def kill(self, processes: dict[int, tuple[str, int]], timeout_s: float = ANSWER_S) -> list[int]:
        """SIGKILL the process of each rank, from rank -> (node id, pid); returns the ranks whose process was hit."""
        raise NotImplementedError

    def run_on(
        self, node_ids: list[str], fn: Any, args: tuple[Any, ...], timeout_s: float = ANSWER_S
    ) -> dict[str, Any]:
        """`fn(*args)` on each of these nodes side by side; a result, or the exception raised, for each node id."""
        raise NotImplementedError

    def close(self) -> None:
        """End all agents; safe to call at any time."""
        raise NotImplementedError
