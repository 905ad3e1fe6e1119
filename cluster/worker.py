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

from onetrain.cluster.errors import ClusterError


@dataclass(frozen=True)
class Outcome:
    """How the function ended on one rank."""

    pickled: bytes  # its result, or the exception it raised
    failed_at: float | None = None  # epoch seconds; None = it returned


class Mailbox:
    """An actor between the driver and its workers: printed lines go one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._arrived = asyncio.Event()
        self._stop = asyncio.Event()

    async def put(self, lines: list[str]) -> None:
        """Append printed lines; an empty list lets a waiting `take` return."""
        self._lines += lines
        self._arrived.set()

    async def take(self, wait: bool = True) -> list[str]:
        """Wait for `put`, then hand over all lines there are."""
        if wait:
            await self._arrived.wait()
        self._arrived.clear()
        lines, self._lines = self._lines, []
        return lines

    async def stop(self) -> None:
        """Ask every worker to stop."""
        self._stop.set()

    async def stopped(self) -> None:
        """Return when `stop` has been called."""
        await self._stop.wait()


class Worker:
    """An actor that runs a function as one rank, in the main thread of its process."""

    def __init__(self, rank: int, node: str, mailbox: Any) -> None:
        self._where = f"rank {rank} on node {node}"
        self._rank = rank
        self._mailbox = mailbox

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
        threading.Thread(target=self._watch_stop, daemon=True).start()
        with self._lines_to_driver() if self._rank == 0 else contextlib.nullcontext():
            try:
                try:
                    fn, args = cloudpickle.loads(pickled_call)
                except ImportError as error:
                    raise ClusterError(
                        f"{self._where} cannot load the training function: {error}. Install the same code on every "
                        "node, or ship it with `ray job submit --working-dir`."
                    ) from error
                return Outcome(cloudpickle.dumps(fn(*args)))
            except BaseException as error:
                return Outcome(_pickle_error(error, self._where), failed_at=time.time())

    def _watch_stop(self) -> None:
        """Turn the driver's wish to stop into a KeyboardInterrupt of the running function."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._mailbox.stopped.remote())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

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


def _pickle_error(error: BaseException, where: str) -> bytes:
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
