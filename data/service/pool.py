"""The pool: a named actor that places builders, replaces them, and has more or fewer of them as trainers wait or not.

It may die at any time. Its next life finds groups and builders by their names; clients go on with those they know.
"""

import os
import threading
import time
import traceback
from collections import deque
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from onetrain.data.service.groups import Groups, find_actor, shortage
from onetrain.data.service.growth import Growth
from onetrain.data.service.messages import BuilderStatus, Member, PoolStatus, Report
from onetrain.data.stream_options import ServiceOptions

TICK_S = 0.5
PLACE_TIMEOUT_S = 30.0  # a growth that found no resources after so long is given up
RETRY_GROWTH_S = 300.0  # and not tried again for so long
HUNG_S = 60.0  # an actor that has not answered for so long is killed and restarted
KEPT_MESSAGES = 1000


class Pool:
    """Looks after the builders of one run, in a thread; its methods answer at once."""

    def __init__(self, run: str, options: ServiceOptions, threads: int, folder: str) -> None:
        self._run, self._options, self._threads, self._folder = run, options, threads, folder
        self._growth = Growth(options.actors, options.max_actors or options.actors)
        self._lock = threading.Lock()
        self._groups: Groups | None = None
        self._wanted: int | None = None
        self._scaled: int | None = None  # what a person asked for
        self._seen: dict[str, tuple[BuilderStatus, float]] = {}
        self._asked: dict[Any, tuple[str, float]] = {}  # status calls on their way
        self._messages: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self._shortage: str | None = None
        self._no_growth_before = 0.0
        self._placed = False
        self._pending_since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="onetrain-pool", daemon=True)
        self._thread.start()

    def report(self, report: Report) -> list[Member]:
        """A client's report; returns the builders that answer."""
        with self._lock:
            self._growth.add(report.rank, report.seconds, report.waited_s)
            self._messages.extend(report.messages)
            return self._members()

    def scale(self, actors: int) -> None:
        """Have so many builders; by itself the pool then stays between this number and max_actors."""
        with self._lock:
            self._scaled = actors

    def status(self) -> PoolStatus:
        """What the pool holds."""
        with self._lock:
            wanted = self._scaled if self._scaled is not None else self._wanted
            return PoolStatus(
                pid=os.getpid(),
                wanted=wanted or self._options.actors,
                placed=self._placed and self._scaled is None,
                members=self._members(),
                data_wait=self._growth.share,
                shortage=self._shortage,
                cpus_per_actor=self._options.cpus_per_actor,
            )

    def take_messages(self) -> list[str]:
        """Lines for the person who watches the run, each given once."""
        with self._lock:
            messages = list(self._messages)
            self._messages.clear()
            return messages

    def stop(self) -> None:
        """Place nothing any more; returns when nothing is being placed."""
        self._ended.set()
        self._thread.join()

    def _members(self) -> list[Member]:
        if self._groups is None:
            return []
        actors, now = self._groups.actors, time.monotonic()
        return [Member(name, actors[name], s, now - at) for name, (s, at) in self._seen.items() if name in actors]

    def _work(self) -> None:
        while not self._ended.is_set():
            try:
                self._tick()
            except Exception:  # the pool must not end for one failed call; the next look may find things mended
                self._say(f"data service: {traceback.format_exc().strip().splitlines()[-1]}")
            self._ended.wait(TICK_S)

    def _tick(self) -> None:
        if self._groups is None:
            groups = Groups(self._run, self._options.cpus_per_actor, self._threads, self._folder)
            groups.revive()
            with self._lock:
                self._wanted, self._groups = groups.size or self._options.actors, groups
        self._place(self._groups)
        self._look(self._groups)
        self._adapt(self._groups)

    def _place(self, groups: Groups) -> None:
        """Bring the groups to the wanted size; give up on a growth that finds no resources."""
        with self._lock:
            if self._scaled is not None:
                self._wanted = self._growth.least = self._scaled
                self._growth.most = max(self._options.max_actors or 0, self._scaled)
                self._scaled = self._shortage = None
                self._placed = False
            wanted = self._wanted or 0
            before = groups.size
        if wanted != before:
            groups.resize(wanted)
            if before:
                self._say(f"data service: {before} -> {wanted} builders")
        pending = [group for group in groups.groups if group.state() == "PENDING"]
        now = time.monotonic()
        self._pending_since = (self._pending_since or now) if pending else None
        self._placed = not pending
        if self._pending_since is None or now - self._pending_since < PLACE_TIMEOUT_S:
            return
        table = shortage(wanted, self._options.cpus_per_actor)
        self._shortage = table
        if pending[-1] is not groups.groups[0]:
            groups.remove(pending[-1])
            self._pending_since, self._no_growth_before = None, now + RETRY_GROWTH_S
            with self._lock:
                self._wanted = groups.size
            self._say(f"data service: no resources to grow to {wanted} builders, it stays at {groups.size}:\n{table}")

    def _look(self, groups: Groups) -> None:
        """Ask every builder for its status; replace those that are gone, restart those that hang."""
        now = time.monotonic()
        if self._asked:
            ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            for ref in ready:
                name, _ = self._asked.pop(ref)
                self._take_status(groups, name, ref)
        asked = {name for name, _ in self._asked.values()}
        for name, actor in groups.actors.items():
            if name not in asked:
                self._asked[actor.status.remote()] = name, now
        for ref, (name, since) in list(self._asked.items()):
            if name not in groups.actors:
                del self._asked[ref]
            elif name in self._seen and now - since > HUNG_S:
                self._say(f"data service: {name} has not answered for {now - since:.0f} s and is restarted")
                self._forget(name)
                ray.kill(groups.actors[name], no_restart=False)
        with self._lock:
            for name in [name for name in self._seen if name not in groups.actors]:
                del self._seen[name]

    def _take_status(self, groups: Groups, name: str, ref: Any) -> None:
        if name not in groups.actors:
            return
        try:
            status = ray.get(ref)
            with self._lock:
                self._seen[name] = status, time.monotonic()
        except RayError as error:
            if (seen := self._seen.get(name)) is not None:
                where = f"{name} (node {seen[0].node}, pid {seen[0].pid})"
                self._say(f"data service: {where} died or cannot be reached; Ray starts it again")
            self._forget(name)
            if isinstance(error, ActorDiedError) and find_actor(name) is None:
                groups.ensure(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._seen.pop(name, None)

    def _adapt(self, groups: Groups) -> None:
        """Grow while trainers wait, shrink when they have not for long."""
        with self._lock:
            built = [status.batches > 0 for status, _ in self._seen.values()]
            settled = len(built) == groups.size and all(built) and self._pending_since is None
            wanted = self._growth.decide(time.monotonic(), groups.size, settled)
            if wanted <= groups.size or time.monotonic() >= self._no_growth_before:
                self._wanted, self._placed = wanted, self._placed and wanted == groups.size

    def _say(self, message: str) -> None:
        with self._lock:
            self._messages.append(message)
