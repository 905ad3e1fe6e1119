"""Requests of one client to a pool's builders: spread, sent again when a builder fails, watched when it is late."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from onetrain.data.cursor import Cursor
from onetrain.data.errors import DataError, LateBatchError
from onetrain.data.service.groups import find_actor
from onetrain.data.service.messages import BuilderStatus, Member, Report, pool_name
from onetrain.data.steps import BuiltStep, StreamSpec

LOOK_S = 0.2  # between looks at what is late, while waiting
REPORT_S = 1.0  # between reports to the pool
AVOID_S = (
    10.0  # a builder that failed is avoided for so long, unless the pool sees it alive before, or there is no other
)
AGAIN_S = 0.5  # between requests to builders that fail, when there is no other
STATUS_TIMEOUT_S = 1.0


@dataclass(eq=False)
class Request:
    """A step that was asked for, of one builder or, after failures and stalls, of several."""

    cursor: Cursor
    asked: dict[Any, str] = field(default_factory=dict)  # builder's name of every call on its way
    built: BuiltStep | None = None
    error: BaseException | None = None
    stalls: int = 0  # times that it was found late
    asked_at: float = float("-inf")

    @property
    def done(self) -> bool:
        """Whether there is an answer."""
        return self.built is not None or self.error is not None


class Dispatcher:
    """Keeps requests going, on the thread of its caller. DataError if there is no pool for this run."""

    def __init__(self, run: str, spec: StreamSpec, rank: int, warn: Callable[[str], None]) -> None:
        self._pool = find_actor(pool_name(run))
        if self._pool is None:
            raise DataError(
                f"there is no data service for the run {run!r} on this Ray cluster (no actor {pool_name(run)}). "
                "It lives as long as the command that started it; set stream.service.actors to 0 to do without."
            )
        self._spec, self._rank, self._warn = spec, rank, warn
        self._service = spec.stream.service
        self._members: dict[str, Member] = {}  # that answer, by name
        self._known: dict[str, Member] = {}  # and those that did
        self._requests: list[Request] = []
        self._late: dict[Any, str] = {}  # calls whose step another builder delivered first
        self._failed: dict[str, float] = {}  # builders that failed, and when
        self._stalled: dict[str, int] = {}  # builders that were late, and their process
        self._report: Any = None
        self._reported_at = self._learned_at = time.monotonic()
        self._waited = 0.0  # since the last report
        self._turn = rank

    def ask(self, cursor: Cursor) -> Request:
        """Request the step that begins at the cursor."""
        request = Request(cursor)
        self._requests.append(request)
        self._send(request)
        return request

    def take(self, request: Request) -> tuple[BuiltStep, float]:
        """Wait for a requested step; returns it and the seconds of waiting. Raises what building it raised.

        Raises LateBatchError when it is later than stream.service.give_up_s.
        """
        begun = before = time.perf_counter()
        self.look(0.0)
        while not request.done:
            late = time.perf_counter() - begun
            if late >= self._service.give_up_s:
                line = self._late_line(request, late, self._status(set(request.asked.values())))
                raise LateBatchError(
                    f"{line}. stream.service.give_up_s is over; look at that shard's disk or store, at the actor's "
                    "node, and for free resources."
                )
            if late >= (request.stalls + 1) * self._service.stall_warning_s:
                self._stall(request, late)
            self.look(min(LOOK_S, self._service.stall_warning_s, self._service.give_up_s))
            now = time.perf_counter()
            self._waited, before = self._waited + now - before, now
        self.forget([request])
        if request.error is not None:
            raise request.error
        assert request.built is not None
        return request.built, time.perf_counter() - begun

    def forget(self, requests: list[Request]) -> None:
        """Requests whose answers nobody wants any more.

        They are not cancelled: with Ray 2.60 that may hold up an actor's later calls for half a minute.
        """
        for request in requests:
            self._late |= request.asked
        self._requests = [request for request in self._requests if request not in requests]

    def look(self, wait_s: float) -> None:
        """Take what has arrived, wait for something so long if nothing has, and see to what failed."""
        calls = {ref: request for request in self._requests for ref in request.asked}
        refs = [*calls, *self._late, *([] if self._report is None else [self._report])]
        ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
        if not ready and wait_s:
            if refs:
                ready = ray.wait(refs, num_returns=1, timeout=wait_s)[0]
            else:
                time.sleep(wait_s)
        for ref in ready:
            if ref == self._report:
                self._learn(ref)
            elif ref in self._late:
                self._delivers(self._late.pop(ref))
            else:
                self._answer(calls[ref], ref)
        self._send_again()
        self._tell()

    def _answer(self, request: Request, ref: Any) -> None:
        name = request.asked.pop(ref)
        try:
            built = ray.get(ref).open()
        except RayTaskError as error:
            if not request.done:
                request.error = error.cause if isinstance(error.cause, Exception) else error
                request.error.add_note(f"raised by the data service's actor {self._known[name]}: {error}")
        except RayError:
            self._failed[name] = time.monotonic()
            return
        else:
            request.built = request.built or built
        self._delivers(name)
        self._late |= request.asked
        request.asked = {}

    def _delivers(self, name: str) -> None:
        self._stalled.pop(name, None)

    def _send(self, request: Request, besides: tuple[str, ...] = ()) -> list[str]:
        """Ask the best builder that is not among `besides`; returns it, or nothing if there is none."""
        now = time.monotonic()
        self._failed = {name: at for name, at in self._failed.items() if now - at < AVOID_S}
        avoided = self._failed.keys() | self._stalled.keys()
        names = sorted(self._members.keys() - set(besides))
        good = [name for name in names if name not in avoided]
        if not good and (besides or now - request.asked_at < AGAIN_S):
            return []
        busy = Counter([name for request in self._requests for name in request.asked.values()])
        busy.update(self._late.values())
        turned = [(good or names)[(self._turn + n) % len(good or names)] for n in range(len(good or names))]
        if not turned:
            return []
        name = min(turned, key=lambda name: busy[name])
        self._turn, request.asked_at = self._turn + 1, now
        ref = self._members[name].actor.build.remote(self._spec, request.cursor, self._rank)
        request.asked[ref] = name
        return [name]

    def _send_again(self) -> list[str]:
        """Ask others for what failed, or is with builders that are late; returns whom."""
        asked = []
        for request in self._requests:
            if not request.done and all(name in self._stalled for name in request.asked.values()):
                asked += self._send(request, tuple(request.asked.values()))
        return asked

    def _stall(self, request: Request, late: float) -> None:
        """Say who is late and where; what was asked of these builders is also asked of others."""
        first, asked, begun = request.stalls == 0, dict(request.asked), time.monotonic()
        status = self._status(set(asked.values()))
        request.stalls = int((late + time.monotonic() - begun) / self._service.stall_warning_s)
        self.look(0.0)  # asking took its time
        if request.done:
            return
        line = self._late_line(request, late, status)
        again = time.monotonic() - request.asked_at < self._service.stall_warning_s  # asked lately
        for ref, name in asked.items():
            if name in status and not status[name].tasks and not again and ref in request.asked:
                self._late[ref] = request.asked.pop(ref)  # the call or its answer was lost
            elif name not in status or not again:
                self._stalled[name] = self._known[name].status.pid
        others = self._send_again()
        if first or others:
            line += f"; asking {', '.join(sorted(set(others)))}" if others else "; no other builder answers"
            self._warn(line)
            if self._rank:  # only data rank 0's output is shown
                self._pool.report.remote(Report(self._rank, 0.0, 0.0, (line,)))

    def _late_line(self, request: Request, late: float, status: dict[str, BuilderStatus]) -> str:
        """Who is late, and what each builder is at: by its own word, or by the last that the pool heard of it."""
        facts = []
        for name in request.asked.values():
            member = self._known[name]
            ago = member.age_s + time.monotonic() - self._learned_at
            silent = f"does not answer; {ago:.1f} s ago it was {member.status}"
            facts.append(f"{member} {f'is {status[name]}' if name in status else silent}")
        if not facts:
            facts = [f"no builder answers, of {', '.join(map(str, self._known.values())) or 'none known'}"]
        position = request.cursor.position
        return f"the step at position {position} of data rank {self._rank} is {late:.1f} s late: {'; '.join(facts)}"

    def _status(self, names: set[str]) -> dict[str, BuilderStatus]:
        """What these builders do now, those that answer."""
        calls = {self._known[name].actor.status.remote(): name for name in names}
        found = {}
        for ref in ray.wait(list(calls), num_returns=len(calls), timeout=STATUS_TIMEOUT_S)[0] if calls else []:
            with contextlib.suppress(RayError):
                found[calls[ref]] = ray.get(ref)
        return found

    def _tell(self) -> None:
        """Report to the pool, if it is time and the last report has arrived."""
        now = time.monotonic()
        if self._report is not None or now - self._reported_at < (REPORT_S if self._members else LOOK_S):
            return
        report = Report(self._rank, now - self._reported_at, self._waited)
        self._report, self._reported_at, self._waited = self._pool.report.remote(report), now, 0.0

    def _learn(self, ref: Any) -> None:
        """The pool's answer: the builders there are."""
        self._report = None
        try:
            members = ray.get(ref)
        except RayError:
            return  # it restarts
        self._learned_at = now = time.monotonic()
        self._members = {member.name: member for member in members}
        self._known |= self._members
        for name, member in self._members.items():
            if now - member.age_s > self._failed.get(name, now):
                del self._failed[name]
            if self._stalled.get(name, member.status.pid) != member.status.pid:
                del self._stalled[name]
