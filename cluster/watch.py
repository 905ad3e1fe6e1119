"""Who hangs: the beats of all ranks against the deadlines of their phases. Pure bookkeeping; the caller has the clock.

In a collective every rank waits for the last one, so that all of them pass their deadline together. A verdict names
the cause: the ranks that the others wait for.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from onetrain.cluster.beacon import Beat
from onetrain.cluster.recovery_options import RecoveryOptions

# phases with the same number of steps done, in the order in which a rank comes through them
ORDER = ("start", "build", "restore", "checkpoint", "validation", "data_wait", "first_step", "step", "end")


@dataclass(frozen=True)
class RankView:
    """A rank as it looks at one moment, by the receiver's clock."""

    rank: int
    node: str  # address; empty where the watch was not told
    pid: int | None  # None before the first beat
    phase: str
    in_phase_s: float
    step: int | None
    position: int | None
    collectives: dict[str, int] = field(default_factory=dict)  # process group -> collectives begun
    age_s: float | None = None  # since the last beat; None before the first

    def as_json(self) -> dict[str, Any]:
        """For heartbeats.json."""
        return asdict(self) | {
            "in_phase_s": round(self.in_phase_s, 3),
            "age_s": None if self.age_s is None else round(self.age_s, 3),
        }

    @property
    def where(self) -> str:
        """In words."""
        node = f" on node {self.node}" if self.node else ""
        return f"rank {self.rank}{node}" + ("" if self.pid is None else f" (pid {self.pid})")


@dataclass(frozen=True)
class Verdict:
    """A hang. `ranks` are the cause, lowest first, as far as beats can tell."""

    kind: Literal["silent", "deadline"]
    ranks: list[int]
    phase: str  # of the first of them
    seconds: float  # that it has been silent, or in its phase
    over_s: float  # seconds past the limit that was passed
    message: str


class Watch:
    """One attempt of `ranks` ranks; `now` is any clock that only grows, in seconds.

    Hand over what was received before asking for a verdict, so that a receiver that was away blames nobody.
    """

    def __init__(self, options: RecoveryOptions, ranks: int, now: float, nodes: Sequence[str] = ()) -> None:
        self._options = options
        self._began = now
        self._nodes = list(nodes) or [""] * ranks
        self._last: dict[int, tuple[Beat, float]] = {}
        self._watched = set(range(ranks))

    def heard(self, beat: Beat, now: float) -> None:
        """A beat has arrived; one of a rank that does not exist is an error of the caller."""
        assert 0 <= beat.rank < len(self._nodes), beat
        self._last[beat.rank] = (beat, now)

    def done(self, rank: int) -> None:
        """This rank's function has returned: nothing more is expected of it."""
        self._watched.discard(rank)

    def snapshot(self, now: float) -> list[RankView]:
        """Every rank, in order."""
        return [self._view(rank, now) for rank in range(len(self._nodes))]

    def verdict(self, now: float) -> Verdict | None:
        """The hang that there is, if any.

        A rank that waits for another may wait as long as the other may take: rank 0 may be in step while rank 1 still
        writes a checkpoint. So a passed deadline counts once a rank that holds up the others has passed its own too, or
        could have.
        """
        views = [self._view(rank, now) for rank in sorted(self._watched)]
        silent = [view for view in views if view.age_s is not None and view.age_s > self._options.silence_s]
        if silent:
            return self._silence(silent)
        late = [view for view in views if self._over(view) > 0]
        if not late:
            return None
        behind = held_up_by(views)
        causes = [view for view in behind if self._over(view) > 0]
        worst = max(late, key=self._over)
        if not causes:
            if self._over(worst) <= max(self._options.deadline_s(view.phase) for view in behind):
                return None
            causes = behind
        return self._lateness(causes, worst, len(views))

    def _view(self, rank: int, now: float) -> RankView:
        node = self._nodes[rank]
        if rank not in self._last:
            return RankView(rank, node, None, "start", now - self._began, None, None)
        beat, at = self._last[rank]
        age = max(now - at, 0.0)
        in_phase = beat.in_phase_s + age  # goes on where beats stop
        return RankView(rank, node, beat.pid, beat.phase, in_phase, beat.step, beat.position, beat.collectives, age)

    def _over(self, view: RankView) -> float:
        return view.in_phase_s - self._options.deadline_s(view.phase)

    def _silence(self, silent: list[RankView]) -> Verdict:
        limit = self._options.silence_s
        first = silent[0]
        age = first.age_s or 0.0
        message = (
            f"{_names(silent)} gave no sign of life for {age:.0f} s (recovery.silence_s is {limit:g}); last seen in "
            f"phase {first.phase}{_step(first)}"
        )
        over = max(view.age_s or 0.0 for view in silent) - limit
        return Verdict("silent", [view.rank for view in silent], first.phase, age, over, message)

    def _lateness(self, causes: list[RankView], worst: RankView, ranks: int) -> Verdict:
        first = causes[0]
        limit = self._options.deadline_s(first.phase)
        message = (
            f"{_names(causes)} has been in phase {first.phase}{_step(first)} for {first.in_phase_s:.0f} s "
            f"(recovery.deadlines_s gives {first.phase} {limit:g} s)"
        )
        if self._over(first) <= 0:  # it was given its time, and went on too late
            message += (
                f", and {worst.where} has waited in phase {worst.phase} for {worst.in_phase_s:.0f} s "
                f"(deadline {self._options.deadline_s(worst.phase):g} s)"
            )
        elif len(causes) < ranks:
            message += "; it is behind the other ranks" if len(causes) == 1 else "; they are behind the other ranks"
        over = max(self._over(view) for view in [*causes, worst])
        return Verdict("deadline", [view.rank for view in causes], first.phase, first.in_phase_s, over, message)


def held_up_by(views: Sequence[RankView]) -> list[RankView]:
    """The ranks that the others wait for: the lowest step, then the fewest collectives, then the earliest phase.

    Not the rarest phase: a rank alone in its phase may be ahead of the others as well as behind them.
    """
    views = _least(views, lambda view: -1 if view.step is None else view.step)
    return _least(_fewest_collectives(views), lambda view: ORDER.index(view.phase))


def _least(views: Sequence[RankView], key: Callable[[RankView], int]) -> list[RankView]:
    least = min(map(key, views))
    return [view for view in views if key(view) == least]


def _fewest_collectives(views: Sequence[RankView]) -> Sequence[RankView]:
    """Those behind in a group that wait for nobody else in another group; all where no rank is behind."""
    most = begun_most(views)
    behind = [view for view in views if any(count < most[group] for group, count in view.collectives.items())]
    lagging = {group for view in behind for group, count in view.collectives.items() if count < most[group]}
    roots = [view for view in behind if all(count < most[g] for g, count in view.collectives.items() if g in lagging)]
    return roots or behind or views


def begun_most(views: Iterable[RankView]) -> dict[str, int]:
    """Process group -> collectives begun by its foremost rank."""
    most: dict[str, int] = {}
    for view in views:
        for group, count in view.collectives.items():
            most[group] = max(count, most.get(group, count))
    return most


def _names(views: Sequence[RankView]) -> str:
    if len(views) <= 4:
        return ", ".join(view.where for view in views)
    return f"{views[0].where} and {len(views) - 1} other ranks"


def _step(view: RankView) -> str:
    return "" if view.step is None else f" after step {view.step}"
