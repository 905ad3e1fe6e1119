"""Samples: the requests of a split, numbered, and the context window that each one sees.

A request is the user's context at one moment and the targets of that moment. With `share_context: user`, all requests
of a user that fit into one window become one sample, in which every target sees only the events before its own request.

Legend: B samples.
"""

import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.fingerprint import json_fingerprint
from onetrain.data.options import BatchOptions
from onetrain.data.sample_table import (
    SAMPLE,
    Split,
    build_table,
    damaged_shards,
    is_plain,
    split_range,
    table_key,
)
from onetrain.data.shards import Histories, ShardReader, UserSequence
from onetrain.data.sidecar import default_cache, mapped, sidecar
from onetrain.data.time_order import build_time_order

Ids = NDArray[np.int64]
_log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class SampleRows:
    """Samples as columns of (B,): where each one's user is, and which of the user's events it is about.

    Events [start, end) are the window; the targets are those among [first, stop) whose behaviour is a target.
    """

    readers: tuple[ShardReader, ...]
    reader_B: Ids
    row_B: Ids
    start_B: Ids
    first_B: Ids
    stop_B: Ids
    end_B: Ids

    def __len__(self) -> int:
        return len(self.row_B)

    def __getitem__(self, chosen: Any) -> "SampleRows":
        """Some of the samples, by a slice, a mask or an array of their places."""
        columns = (self.reader_B, self.row_B, self.start_B, self.first_B, self.stop_B, self.end_B)
        return SampleRows(self.readers, *(column[chosen] for column in columns))

    def histories(self) -> Histories:
        """The users' events, located."""
        return Histories(self.readers, self.reader_B, self.row_B)

    def readable(self) -> NDArray[np.bool_]:
        """(B,) whether the record batch that holds each sample's user is what was written."""
        mask = np.ones(len(self), dtype=bool)
        for number in np.unique(self.reader_B).tolist():
            here = np.flatnonzero(self.reader_B == number)
            mask[here] = self.readers[number].readable(self.row_B[here])
        return mask

    def reach(self, options: BatchOptions) -> Ids:
        """Events that the longest pathway of each sample can hold: what samples of like cost have in common."""
        if options.share_context == "user":
            return self.end_B - self.start_B
        return np.minimum(self.end_B, max(options.pathway_lengths.values()))


class SampleIndex:
    """Numbers the samples of one split, users in shard order, time order within a user.

    The numbering is computed once and kept on disk: beside the shards, or in `cache` where that cannot be. With
    `by_time` also the order of the samples' moments. Raises DataError if `target_behaviours` or `behaviour_weights`
    names a behaviour that the data do not have.
    """

    def __init__(
        self,
        reader: ShardReader,
        split: Split,
        options: BatchOptions,
        *,
        by_time: bool = False,
        skip_damaged: bool = False,
        cache: Path | None = None,
    ) -> None:
        self.reader, self.split, self.options = reader, split, options
        known = reader.manifest.behaviours
        for name in (*options.target_behaviours, *options.behaviour_weights):
            if name not in known:
                raise DataError(f"batch names the behaviour {name!r}; the prepared data have {', '.join(known)}.")
        self._targets = [known.index(name) for name in options.target_behaviours]
        self._plain = is_plain(options)

        def build(folder: Path) -> dict[str, Any]:
            description = build_table(folder, reader, split, options, by_time=by_time, skip_damaged=skip_damaged)
            if by_time:
                build_time_order(folder)
            return description

        def usable(description: dict[str, Any]) -> bool:
            """Whole, or without shards that are damaged still."""
            without = description["skipped_shards"]
            return not without or (skip_damaged and damaged_shards(reader, without) == without)

        folders = [*reader.store.index_folders, (cache or default_cache()) / "index"]
        name = f"{split}-{table_key(reader, split, options)}" + ("-by-time" if by_time else "")
        folder, description = sidecar(folders, name, build, _variant, usable)
        self._without: list[int] = description["skipped_shards"]
        if self._without:
            shards = ", ".join(self.skipped_shards)
            _log.warning("%s: damaged shards are left out (stream.damaged: skip): %s", reader.store.name, shards)
        self._ends = mapped(folder / "ends.bin", np.int64)
        self._samples = mapped(folder / "samples.bin", SAMPLE)
        self.by_time: Ids = mapped(folder / "by_time.bin", np.int64)  # empty unless asked for
        tables = [self.by_time] * by_time + [self._samples] * (not self._plain)
        samples, found = description["samples"], [len(self), *map(len, tables)]
        if len(self._ends) != reader.n_users or any(count != samples for count in found):
            raise DataError(
                f"{folder} numbers {found} samples of {len(self._ends)} users; they are {samples} of {reader.n_users}. "
                "Remove it: it is made again."
            )

    @property
    def skipped_shards(self) -> tuple[str, ...]:
        """Files whose users have no number, because they were damaged when the samples were counted."""
        return tuple(self.reader.manifest.shards[shard].file for shard in self._without)

    @property
    def fingerprint(self) -> str:
        """Of the contents that are numbered: the manifest's, unless shards are left out."""
        own = self.reader.manifest.fingerprint
        return json_fingerprint([own, "without", self._without]) if self._without else own

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, ids: Any) -> SampleRows:
        """The samples of these numbers; IndexError for one outside [0, len)."""
        id_B = np.asarray(ids, dtype=np.int64)
        if len(id_B) and not (id_B.min() >= 0 and id_B.max() < len(self)):
            raise IndexError(f"samples {id_B.min()} to {id_B.max()} are not all in [0, {len(self)})")
        row_B = np.searchsorted(self._ends, id_B, side="right")
        if self._plain:
            begun_B = np.where(row_B > 0, self._ends[row_B - 1], 0)
            first_B = split_range(self.reader.table.users[row_B], self.split, self.options)[0] + id_B - begun_B
            start_B, stop_B, end_B = np.maximum(first_B - self.options.max_context, 0), first_B + 1, first_B
        else:
            record_B = self._samples[id_B]
            start_B, first_B, stop_B, end_B = (record_B[name].astype(np.int64) for name in SAMPLE.names or ())
        return SampleRows((self.reader,), np.zeros_like(row_B), row_B, start_B, first_B, stop_B, end_B)

    def any_readable(self) -> SampleRows | None:
        """The first sample that can be read; None when there is none."""
        firsts = self.reader.table.batches["first_row"]
        for first, end in pairwise([*firsts.tolist(), self.reader.n_users]):
            begun = int(self._ends[first - 1]) if first else 0
            if self._ends[end - 1] > begun and (rows := self.rows([begun])).readable().all():
                return rows
        return None

    def __getitem__(self, sample_id: int) -> Sample:
        """The sample of this number, to look at; IndexError outside [0, len)."""
        rows = self.rows([sample_id])
        user = self.reader.user(int(rows.row_B[0]))
        moments: dict[int, list[int]] = {}
        for event in range(int(rows.first_B[0]), int(rows.stop_B[0])):
            if not self._targets or int(user.behaviour[event]) in self._targets:
                moments.setdefault(self._context_end(user, event), []).append(event)
        requests = tuple(Request(tuple(events), end) for end, events in moments.items())
        return Sample(user, int(rows.start_B[0]), requests)

    def _context_end(self, user: UserSequence, event: int) -> int:
        if self.options.request_by == "event":
            return event
        return int(np.searchsorted(user.timestamp_ms, user.timestamp_ms[event], side="left"))


def _variant(description: dict[str, Any]) -> str:
    """What the name of an index has behind it: nothing when it is whole."""
    without = description["skipped_shards"]
    return f"-without-{json_fingerprint(without)}" if without else ""
