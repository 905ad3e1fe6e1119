"""Global order: which sample stands at which position, as a pure function of fingerprints, seed, position and updates.

Shuffled, epoch after epoch, or by time, once. A source that grows in the middle of an epoch goes on with what is left
of it and the new samples, evenly interleaved, so that the epoch still holds every sample exactly once.

Legend: B positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onetrain.data.cursor import Update
from onetrain.data.permutation import key_of, permute_in_windows

Ids = NDArray[np.int64]


class SourceOrder(Protocol):
    """The samples of one source, in order."""

    @property
    def length(self) -> int | None:
        """Positions there are; None = without end."""

    def sample_ids(self, position_B: Ids) -> Ids:
        """The sample at each position."""


@dataclass(frozen=True)
class _Shuffle:
    """Samples [first, first + length), shuffled."""

    first: int
    length: int
    key: int
    window: int | None

    def __getitem__(self, index_B: Ids) -> Ids:
        return self.first + permute_in_windows(index_B, self.length, self.key, self.window)


@dataclass(frozen=True)
class _Merge:
    """What `old` holds from `consumed` on, and all of `new`, evenly interleaved."""

    old: "_Shuffle | _Merge"
    consumed: int
    new: _Shuffle

    @cached_property
    def length(self) -> int:
        return self.old.length - self.consumed + self.new.length

    def __getitem__(self, index_B: Ids) -> Ids:
        ids, place_B = np.empty_like(index_B), np.arange(len(index_B))
        stock: _Merge | _Shuffle = self
        while isinstance(stock, _Merge):  # a source may grow many times within an epoch
            before_B = _share(index_B, stock.new.length, stock.length)  # of the new ones
            is_new_B = _share(index_B + 1, stock.new.length, stock.length) > before_B
            ids[place_B[is_new_B]] = stock.new[before_B[is_new_B]]
            index_B, place_B = stock.consumed + (index_B - before_B)[~is_new_B], place_B[~is_new_B]
            stock = stock.old
        ids[place_B] = stock[index_B]
        return ids


def _share(index_B: Ids, part: int, whole: int) -> Ids:
    """floor(index * part / whole), exactly."""
    if whole * part < 2**62:
        return index_B * part // whole
    return np.array([index * part // whole for index in index_B.tolist()], dtype=np.int64)


@dataclass(frozen=True)
class _Phase:
    """From `start` on: the rest of an epoch, then epochs of all `samples`."""

    start: int
    epoch: int
    rest: _Shuffle | _Merge
    samples: int
    fingerprint: str


@dataclass(frozen=True)
class ShuffledOrder:
    """Epoch after epoch, each a permutation of its own.

    sizes: samples of versions 0 to v together. fingerprints: of the contents up to each version. updates: position of
    this source's own order -> version from there on; the first is at 0. window: see `permute_in_windows`.
    """

    sizes: tuple[int, ...]
    fingerprints: tuple[str, ...]
    seed: int
    updates: tuple[tuple[int, int], ...] = ((0, 0),)
    window: int | None = None

    @property
    def length(self) -> None:
        """Without end."""
        return None

    def sample_ids(self, position_B: Ids) -> Ids:
        """The sample at each position; IndexError below 0."""
        if len(position_B) and position_B.min() < 0:
            raise IndexError(f"position {position_B.min()} is below 0")
        ids = np.empty(len(position_B), dtype=np.int64)
        starts = np.array([phase.start for phase in self._phases])
        number_B = np.searchsorted(starts, position_B, side="right") - 1
        for number in np.unique(number_B).tolist():
            here = np.flatnonzero(number_B == number)
            ids[here] = self._in_phase(self._phases[number], position_B[here])
        return ids

    def _in_phase(self, phase: _Phase, position_B: Ids) -> Ids:
        index_B = position_B - phase.start
        ids = np.empty_like(index_B)
        rest = index_B < phase.rest.length
        if rest.any():
            ids[rest] = phase.rest[index_B[rest]]
        beyond_B = index_B - phase.rest.length
        epochs = beyond_B // phase.samples
        for epoch in np.unique(epochs[~rest]).tolist():
            here = ~rest & (epochs == epoch)
            ids[here] = self._epoch(phase, phase.epoch + 1 + epoch)[beyond_B[here] % phase.samples]
        return ids

    def _epoch(self, phase: _Phase, epoch: int) -> _Shuffle:
        return _Shuffle(0, phase.samples, key_of(phase.fingerprint, self.seed, epoch), self.window)

    @cached_property
    def _phases(self) -> list[_Phase]:
        (start, version), *later = self.updates
        samples, fingerprint = self.sizes[version], self.fingerprints[version]
        whole = _Shuffle(0, samples, key_of(fingerprint, self.seed, 0), self.window)
        phases = [_Phase(start, 0, whole, samples, fingerprint)]
        for position, version in later:
            phases.append(self._grown(phases[-1], position, version))
        return phases

    def _grown(self, phase: _Phase, position: int, version: int) -> _Phase:
        """The phase that follows when more samples are there from `position` on."""
        stock, epoch, consumed = phase.rest, phase.epoch, position - phase.start
        if consumed >= stock.length:  # in a later epoch
            epochs, consumed = divmod(consumed - stock.length, phase.samples)
            epoch += 1 + epochs
            stock = self._epoch(phase, epoch)
        samples, fingerprint = self.sizes[version], self.fingerprints[version]
        added = samples - phase.samples
        if added > 0:
            new = _Shuffle(phase.samples, added, key_of(fingerprint, self.seed, epoch, "new"), self.window)
            stock, consumed = _Merge(stock, consumed, new), 0
        return _Phase(position - consumed, epoch, stock, samples, fingerprint)


@dataclass(frozen=True)
class TimeOrder:
    """Once, by the moments of requests: a version after the one before it.

    by_time: of each version its sample numbers in order, memory-mapped.
    """

    by_time: tuple[Ids, ...]

    @property
    def length(self) -> int:
        """Samples of all versions."""
        return sum(map(len, self.by_time))

    def sample_ids(self, position_B: Ids) -> Ids:
        """The sample at each position; IndexError outside [0, length)."""
        if len(position_B) and not (position_B.min() >= 0 and position_B.max() < self.length):
            raise IndexError(f"positions {position_B.min()} to {position_B.max()} are not all in [0, {self.length})")
        ends = np.cumsum([len(part) for part in self.by_time])
        ids, version_B = np.empty(len(position_B), dtype=np.int64), np.searchsorted(ends, position_B, side="right")
        for version in np.unique(version_B).tolist():
            here, begun = version_B == version, int(ends[version - 1]) if version else 0
            ids[here] = begun + self.by_time[version][position_B[here] - begun]
        return ids


class Cycle:
    """Spreads positions over sources: of every `length` in a row, source s has exactly counts[s], well spread."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.length = sum(counts)
        keys = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        owner = np.repeat(np.arange(len(counts)), counts)
        self.source_C = owner[np.argsort(keys, kind="stable")]
        self._counts = np.array(counts)
        self._rank_C = np.array([int((self.source_C[:at] == source).sum()) for at, source in enumerate(self.source_C)])

    def split(self, position_B: Ids) -> tuple[Ids, Ids]:
        """Of each position the source, and the position in that source's own order."""
        turn_B, place_B = np.divmod(position_B, self.length)
        source_B = self.source_C[place_B]
        return source_B, turn_B * self._counts[source_B] + self._rank_C[place_B]

    def before(self, position: int, source: int) -> int:
        """Positions of a source among the first `position`."""
        turn, place = divmod(position, self.length)
        return int(turn * self._counts[source] + (self.source_C[:place] == source).sum())


class GlobalOrder:
    """The order of a run: its sources' orders, mixed."""

    def __init__(self, sources: Sequence[SourceOrder], cycle: Cycle) -> None:
        self.sources, self.cycle = sources, cycle

    @property
    def length(self) -> int | None:
        """Positions there are; None = without end. Only the order of a single source ends."""
        return self.sources[0].length if len(self.sources) == 1 else None

    def sample_ids(self, start: int, count: int) -> tuple[Ids, Ids]:
        """Source and sample at each of the positions [start, start + count), as far as there are any."""
        stop = start + count if self.length is None else min(start + count, self.length)
        source_B, position_B = self.cycle.split(np.arange(start, max(stop, start), dtype=np.int64))
        ids = np.empty_like(position_B)
        for source in np.unique(source_B).tolist():
            here = source_B == source
            ids[here] = self.sources[source].sample_ids(position_B[here])
        return source_B, ids


def source_updates(updates: Sequence[Update], name: str, cycle: Cycle, number: int) -> tuple[tuple[int, int], ...]:
    """A cursor's updates of one source, at positions of that source's own order."""
    return tuple((cycle.before(u.position, number), u.version) for u in updates if u.source == name)
