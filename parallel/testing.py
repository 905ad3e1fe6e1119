"""Runs a function on several ranks of this machine, over gloo on the CPU unless told otherwise, for tests."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing as mp

from onetrain.parallel import process_group

START_TIMEOUT_S = 180  # importing torch and meeting the other ranks, on a busy machine


class RankFailedError(Exception):
    """A rank raised, died or hung; the message holds its traceback."""


class WorkerPool:
    """`world_size` processes in one process group, kept between calls because starting them takes seconds.

    After a failure all of them are ended; the next call starts new ones.
    """

    def __init__(self, world_size: int, backend: str = "gloo", timeout_s: float = 120) -> None:
        self.world_size = world_size
        self.backend = backend
        self.timeout_s = timeout_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(ranks, *args)` on every rank; returns the results in the order of ranks.

        `function` must be importable (defined at the top of a module); arguments and results are pickled. Raises
        RankFailedError with the traceback of the first rank that fails, or after `timeout_s`.
        """
        try:
            if not self._processes:
                self._start()
                self._collect(START_TIMEOUT_S)
            for pipe in self._pipes:
                pipe.send((function, args))
            return self._collect(self.timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, port, self.backend, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(self.world_size) if rank not in results]
                raise RankFailedError(f"Ranks {missing} of {self.world_size} gave no result in {timeout_s:.0f} s.")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    succeeded, value = self._pipes[rank].recv()
                except EOFError:
                    raise RankFailedError(f"Rank {rank} of {self.world_size} died without a traceback.") from None
                if not succeeded:
                    raise RankFailedError(f"Rank {rank} of {self.world_size} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout_s: float = 120
) -> list[Any]:
    """`function(ranks, *args)` on `world_size` fresh processes; see `WorkerPool.run`."""
    with WorkerPool(world_size, backend, timeout_s) as pool:
        return pool.run(function, *args)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, world_size: int, port: int, backend: str, pipe: Connection) -> None:
    """A worker: joins the process group, then runs what comes through the pipe until it closes."""
    values = (rank, world_size, rank, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(process_group.VARIABLES, values, strict=True)})
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    try:
        ranks = process_group.start(START_TIMEOUT_S)
        pipe.send((True, None))
        while True:
            function, args = pipe.recv()
            pipe.send((True, function(ranks, *args)))
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))
