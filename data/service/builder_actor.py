"""The actor that builds batches. It knows nothing that it could lose: every request carries all that it needs."""

import os
import threading
import time
from collections import deque
from typing import Any

import ray

from onetrain.data.activity import activity, doing
from onetrain.data.cursor import Cursor
from onetrain.data.service.messages import BuilderStatus, Task
from onetrain.data.service.parcel import Parcel
from onetrain.data.steps import BuiltStep, StepBuilder, StreamSpec

KEPT_LATENCIES = 256


class Builder:
    """Builds steps for whoever asks, several at a time; `status` answers meanwhile."""

    def __init__(self, folder: str) -> None:
        if os.path.isdir(folder):  # paths of the configuration are relative to it
            os.chdir(folder)
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._builder: StepBuilder | None = None
        self._tasks: dict[int, tuple[int, int, float]] = {}  # by thread: position, rank, since
        self._latencies: deque[float] = deque(maxlen=KEPT_LATENCIES)
        self._counts = dict.fromkeys(("batches", "sequences", "events", "bytes"), 0)
        self._node = ray.util.get_node_ip_address()

    @ray.method(concurrency_group="build")
    def build(self, spec: StreamSpec, cursor: Cursor, rank: int) -> Parcel:
        """The step of a rank that begins at the cursor, a BuiltStep."""
        me = threading.get_ident()
        self._tasks[me] = cursor.position, rank, time.monotonic()
        try:
            with doing("building"):
                built = self._opened(spec).build(cursor, rank)
            self._count(built)
            return Parcel.pack(built)
        finally:
            self._tasks.pop(me, None)

    @ray.method(concurrency_group="status")
    def status(self) -> BuilderStatus:
        """What this actor does right now."""
        now, tasks = time.monotonic(), []
        for thread, (position, rank, since) in list(self._tasks.items()):
            what, seconds = activity(thread) or ("building", now - since)
            tasks.append(Task(position, rank, now - since, what, seconds))
        with self._lock:
            return BuilderStatus(self._node, os.getpid(), tasks, latencies=list(self._latencies), **self._counts)

    def _opened(self, spec: StreamSpec) -> StepBuilder:
        """The builder of this stream; another stream than the last one's takes its place."""
        with self._opening:
            if self._builder is None or self._builder.spec != spec:
                self._builder = None
                with doing(f"opening {spec.prepared}"):
                    self._builder = StepBuilder(spec)
            return self._builder

    def _count(self, built: BuiltStep) -> None:
        stats = built.stats
        new = {"batches": 1, "sequences": stats.samples, "events": stats.events, "bytes": stats.bytes}
        with self._lock:
            self._latencies.append(stats.seconds)
            for name, count in new.items():
                self._counts[name] += count


def actor_class(threads: int) -> Any:
    """`Builder` as a Ray actor that builds so many steps at a time."""
    options: dict[str, Any] = {"concurrency_groups": {"build": threads, "status": 2}}
    return ray.remote(**options)(Builder)
