"""Options of the stream: how prepared shards reach the trainers (the `stream:` section of a configuration)."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

MOST_PARTS = 10_000  # of a mixture's cycle


@dataclass(frozen=True)
class MixtureOptions:
    """One source of a mixture."""

    parts: float  # of every cycle; all sources' parts make the proportions, which are exact
    prepared: str | None = None  # prepared folder, of the same items and SIDs; None = data.prepared

    def __post_init__(self) -> None:
        if not self.parts > 0:
            raise ValueError(f"stream.mixture: parts is {self.parts}; it is above 0. Leave the source out instead")


@dataclass(frozen=True)
class ServiceOptions:
    """Ray actors that build batches. Their number is no part of the order and may change at any time."""

    actors: int = 0  # 0 = every rank builds its own batches
    max_actors: int | None = None  # grows to so many while trainers wait; None = stays at `actors`
    cpus_per_actor: float = 1.0
    memory_gib: float = 1.0  # of a node's object store for finished batches
    stall_warning_s: float = 30.0  # a batch later than this is reported, with its actor and shard
    give_up_s: float = 600.0  # a batch later than this is an error

    def __post_init__(self) -> None:
        if self.actors < 0:
            raise ValueError(f"stream.service.actors is {self.actors}; it is at least 0")
        if self.max_actors is not None and self.max_actors < max(self.actors, 1):
            raise ValueError(f"stream.service.max_actors is {self.max_actors}, fewer than actors {self.actors}")
        for name in ("cpus_per_actor", "memory_gib", "stall_warning_s", "give_up_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"stream.service.{name} is {getattr(self, name)}; it is above 0")


@dataclass(frozen=True)
class StreamOptions:
    """Order of samples, and how they are read."""

    order: Literal["shuffled", "time"] = "shuffled"  # time: one pass in the order of requests' moments
    shuffle_window: int | None = None  # samples that are shuffled among one another; None = all of an epoch
    mixture: dict[str, MixtureOptions] = field(default_factory=dict)  # by name of the source; empty = data.prepared
    prefetch_steps: int = 2  # built ahead; counts as nothing for the cursor
    builder_threads: int = 1  # of each rank, or of each service actor
    watch_every: int = 0  # steps between looks for shards that were appended; 0 = only at the start
    damaged: Literal["error", "skip"] = "error"  # skip: samples of damaged or vanished shards are left out, and counted
    cache: str | None = (
        None  # folder of this machine for indices and for copies of remote shards; None = ~/.cache/onetrain
    )
    cache_gib: float = 50.0  # of remote shards, least recently used first out
    service: ServiceOptions = field(default_factory=ServiceOptions)

    def __post_init__(self) -> None:
        for name, least in (("prefetch_steps", 1), ("builder_threads", 1), ("watch_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"stream.{name} is {getattr(self, name)}; it is at least {least}")
        if self.shuffle_window is not None and self.shuffle_window < 1:
            raise ValueError(f"stream.shuffle_window is {self.shuffle_window}; it is at least 1, or null")
        if self.cache_gib <= 0:
            raise ValueError(f"stream.cache_gib is {self.cache_gib}; it is above 0")
        if self.order == "time" and (len(self.mixture) > 1 or self.shuffle_window is not None):
            raise ValueError(
                "stream.order time reads one source in the order of time: leave stream.mixture and "
                "stream.shuffle_window out, or set stream.order to shuffled"
            )
        self.cycle()

    def cycle(self) -> dict[str, int]:
        """How many samples of each source a cycle of the mixture holds, in lowest terms.

        Raises ValueError for parts whose common cycle is longer than MOST_PARTS.
        """
        exact = {name: Fraction(str(self.mixture[name].parts)) for name in sorted(self.mixture)}  # in any order
        if not exact:
            return {"": 1}
        unit = min(exact.values())
        for value in exact.values():
            unit = _gcd(unit, value)
        counts = {name: int(value / unit) for name, value in exact.items()}
        if sum(counts.values()) > MOST_PARTS:
            parts, length = ", ".join(str(source.parts) for source in self.mixture.values()), sum(counts.values())
            raise ValueError(
                f"stream.mixture: parts {parts} make a cycle of {length:,} samples, and the most is {MOST_PARTS:,}. "
                "Round them"
            )
        return counts


def _gcd(a: Fraction, b: Fraction) -> Fraction:
    while b:
        a, b = b, a % b
    return a
