"""What runs in the actor processes of a worker group: one worker per rank, and the mailbox between them and the driver.

This file imports no torch and no numpy: OMP_NUM_THREADS counts only if it is set before those load.
"""

import asyncio
import contextlib
import io
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any, TextIO

import ray
from ray import cloudpickle

from onetrain.cluster.beacon import BEACON, DRAIN, STOP, Beat
from onetrain.cluster.errors import ClusterError
from onetrain.cluster.node_agent import allow_tracing


@dataclass(frozen=True)
class Outcome:
    """How the function ended on one rank."""

    pickled: bytes  # its result, or the exception it raised
    failed_at: float | None = None  # epoch seconds; None = it returned


class Mailbox:
    """An actor between the driver and its workers: printed lines and heartbeats go one way, wishes the other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._beats: dict[int, Beat] = {}
        self._arrived = asyncio.Event()
        self._wish, self._why = "", ""

    async def put(self, lines: list[str]) -> None:
        """Append printed lines; an empty list lets a waiting `take` return."""
        self._lines += lines
        self._arrived.set()

    async def beat(self, beat: Beat) -> tuple[str, str]:
        """A rank shows itself, and learns what is wished of it: ("", ""), (DRAIN, why) or (STOP, why)."""
        self._beats[beat.rank] = beat
        return self._wish, self._why

    async def wish(self, wish: str, why: str) -> None:
        """What every rank is told at its next heartbeat."""
        self._wish, self._why = wish, why

    async def take(self, wait_s: float = 0.0) -> tuple[list[str], list[Beat]]:
        """All lines and the newest beat of every rank since the last `take`, once there are lines or time is up."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), wait_s)
        self._arrived.clear()
        lines, beats, self._lines, self._beats = self._lines, list(self._beats.values()), [], {}
        return lines, beats


class Worker:
    """An actor that runs a function as one rank, in the main thread of its process."""

    def __init__(
        self, rank: int, node: str, mailbox: Any, heartbeat_s: float, attempt: int | None, first: bool
    ) -> None:
        self._where = f"rank {rank} on node {node}"
        self._rank = rank
        self._mailbox = mailbox
        self._heartbeat_s = heartbeat_s
        BEACON.attempt, BEACON.first = attempt, first

    def pid(self) -> int:
        """Process id, once the actor runs."""
        return os.getpid()

    def find_port(self, wanted: int | None) -> int | None:
        """Return `wanted`, or a free port of this node when it is None; None if `wanted` is in use."""
        with socket.socket() as probe:
            # as torch's store does: the connections that a finished run leaves in TIME_WAIT do not count as use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", wanted or 0))
            except OSError:
                return None
            return int(probe.getsockname()[1])

    def set_up(self, environment: dict[str, str], folder: str) -> None:
        """Take on the rank's environment and the driver's working directory, where this node has it."""
        os.environ.update(environment)
        if os.path.isdir(folder):
            os.chdir(folder)

    def run(self, pickled_call: bytes) -> Outcome:
        """Run `fn(*args)` from a pickled (fn, args); whatever it raises becomes part of the outcome."""
        # Ray starts its processes with SIGINT blocked
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        # a node that is taken away says so with SIGTERM: time to save
        signal.signal(signal.SIGTERM, lambda *_: BEACON.ask(DRAIN, f"{self._where} got SIGTERM"))
        allow_tracing()
        threading.Thread(target=self._show_beats, daemon=True).start()
        with self._lines_to_driver() if self._rank == 0 else contextlib.nullcontext():
            try:
                try:
                    fn, args = cloudpickle.loads(pickled_call)
                except ImportError as error:
                    raise ClusterError(
                        f"{self._where} cannot load the training function: {error}. Install the same code on every "
                        "node, or ship it with `onetrain submit`."
                    ) from error
                return Outcome(cloudpickle.dumps(fn(*args)))
            except BaseException as error:
                return Outcome(pickle_error(error, self._where), failed_at=time.time())

    def _show_beats(self) -> None:
        """Send heartbeats, and hand wishes on: to drain through the beacon, to stop as a KeyboardInterrupt."""
        with contextlib.suppress(ray.exceptions.RayError):  # the mailbox is gone, and Ray ends this process too
            while True:
                wish, why = ray.get(self._mailbox.beat.remote(BEACON.beat(self._rank, os.getpid())))
                if wish == STOP:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                if wish:
                    BEACON.ask(wish, why)
                time.sleep(self._heartbeat_s)

    @contextlib.contextmanager
    def _lines_to_driver(self) -> Any:
        """Copy each printed line to the mailbox, beside Ray's own log file."""
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def pump() -> None:
            batch: list[str | None] = []
            while None not in batch:
                batch = [lines.get()]
                while not lines.empty():
                    batch.append(lines.get())
                ray.get(self._mailbox.put.remote([line for line in batch if line is not None]))

        thread = threading.Thread(target=pump, daemon=True)
        thread.start()
        stdout, stderr = _LineCopy(sys.stdout, lines), _LineCopy(sys.stderr, lines)
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            yield
        for stream in (stdout, stderr):
            stream.end_line()
        lines.put(None)
        thread.join(timeout=10)


class _LineCopy(io.TextIOBase):
    """A text stream that also puts each whole line into a queue."""

    def __init__(self, stream: TextIO, lines: "queue.SimpleQueue[str | None]") -> None:
        self._stream = stream
        self._lines = lines
        self._begun = ""

    def write(self, text: str) -> int:
        self._stream.write(text)
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._lines.put(line)
        return len(text)

    def end_line(self) -> None:
        if self._begun:
            self.write("\n")

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True


def pickle_error(error: BaseException, where: str) -> bytes:
    """Pickle an exception with a note of where it was raised; one that cannot make the trip goes as its text."""
    error.add_note(f"raised by {where}:\n{''.join(traceback.format_exception(error))}")
    try:
        pickled = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
        return pickled
    except Exception:
        substitute = RuntimeError(f"{type(error).__name__}: {error}")
        substitute.add_note(error.__notes__[-1])
        if hasattr(error, "exit_code"):
            substitute.exit_code = error.exit_code  # type: ignore[attr-defined]
        return cloudpickle.dumps(substitute)
