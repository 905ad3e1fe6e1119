"""Samples: the requests of a split, numbered, and the context window that each one sees.

A request is the user's context at one moment and the targets of that moment. With `share_context: user`, all requests
of a user that fit into one window become one sample, in which every target sees only the events before its own request.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.options import BatchOptions
from onetrain.data.shards import ShardReader, UserSequence

Split = Literal["train", "valid", "test"]
Bounds = Any  # int or int64 array


@dataclass(frozen=True)
class Request:
    """Targets of one moment: event indices, and the number of events before it."""

    targets: tuple[int, ...]
    context_end: int


@dataclass(frozen=True)
class Sample:
    """One row of a batch: events [start, end) are its context; each request sees those before its own end."""

    user: UserSequence
    start: int
    requests: tuple[Request, ...]

    @property
    def end(self) -> int:
        """End of the context of the last request."""
        return self.requests[-1].context_end


class SampleIndex:
    """Numbers the samples of one split, users in shard order, time order within a user.

    Raises DataError if `target_behaviours` or `behaviour_weights` names a behaviour that the data do not have.
    """

    def __init__(self, reader: ShardReader, split: Split, options: BatchOptions) -> None:
        self.reader, self.split, self.options = reader, split, options
        known = reader.manifest.behaviours
        for name in (*options.target_behaviours, *options.behaviour_weights):
            if name not in known:
                raise DataError(f"batch names the behaviour {name!r}; the prepared data have {', '.join(known)}.")
        self._targets = [known.index(name) for name in options.target_behaviours]
        self._ends = np.cumsum(self._count())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, sample_id: int) -> Sample:
        """The sample of this number; IndexError outside [0, len)."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} is outside [0, {len(self)})")
        row = int(np.searchsorted(self._ends, sample_id, side="right"))
        within = sample_id - (int(self._ends[row - 1]) if row else 0)
        user = self.reader.user(row)
        if self._one_request_per_event:
            first, _ = self._bounds(len(user), user.valid_start, user.test_start)
            target = int(first) + within
            return self._alone(user, Request((target,), target))
        return self._samples(user)[within]

    def reach(self, sample: Sample) -> int:
        """Events that the longest pathway of the sample can hold: what samples of like cost have in common."""
        if self.options.share_context == "user":
            return sample.end - sample.start
        return min(sample.end, max(self.options.pathway_lengths.values()))

    @property
    def _one_request_per_event(self) -> bool:
        """Whether sample numbers follow from the split bounds alone, without reading events."""
        options = self.options
        return options.share_context == "request" and options.request_by == "event" and not self._targets

    def _bounds(self, length: Bounds, valid_start: Bounds, test_start: Bounds) -> tuple[Bounds, Bounds]:
        """First and past-the-last event of this split that has enough context, of one user or of arrays of users."""
        first = {"train": length * 0, "valid": valid_start, "test": test_start}[self.split]
        last = {"train": valid_start, "valid": test_start, "test": length}[self.split]
        return np.maximum(first, self.options.min_context), last

    def _count(self) -> NDArray[np.int64]:
        if self._one_request_per_event:
            first, last = self._bounds(*self.reader.split_bounds())
            return np.maximum(last - first, 0)
        return np.array(
            [len(self._samples(self.reader.user(row))) for row in range(self.reader.n_users)], dtype=np.int64
        )

    def _samples(self, user: UserSequence) -> list[Sample]:
        requests = self._requests(user)
        if self.options.share_context == "request":
            return [self._alone(user, request) for request in requests]
        return self._windows(user, requests)

    def _requests(self, user: UserSequence) -> list[Request]:
        first, last = (int(bound) for bound in self._bounds(len(user), user.valid_start, user.test_start))
        allowed = np.isin(user.behaviour, self._targets) if self._targets else np.ones(len(user), dtype=bool)
        targets = [event for event in range(first, last) if allowed[event]]
        if self.options.request_by == "event":
            return [Request((event,), event) for event in targets]
        moments: dict[int, list[int]] = {}
        for event in targets:
            moment_start = int(np.searchsorted(user.timestamp_ms, user.timestamp_ms[event], side="left"))
            moments.setdefault(moment_start, []).append(event)
        return [Request(tuple(events), end) for end, events in moments.items() if end >= self.options.min_context]

    def _windows(self, user: UserSequence, requests: list[Request]) -> list[Sample]:
        """Consecutive requests whose contexts fit into one window; a later window begins half a window back."""
        size = self.options.max_context
        windows: list[tuple[int, list[Request]]] = []
        for request in requests:
            if not windows:
                windows.append((max(0, request.context_end - size), []))
            elif request.context_end - windows[-1][0] > size:
                windows.append((request.context_end - max(size // 2, 1), []))
            windows[-1][1].append(request)
        return [Sample(user, start, tuple(members)) for start, members in windows]

    def _alone(self, user: UserSequence, request: Request) -> Sample:
        return Sample(user, max(0, request.context_end - self.options.max_context), (request,))
