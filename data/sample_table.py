"""The sample table: which events of which user make up each sample of a split, computed once and kept on disk.

ends.bin holds for every user the number of samples up to and including its own. Where a sample is one event after
another, that is all; else samples.bin holds a record per sample, and moments.bin the time of each (for the time order).

Legend: U users and E events of a record batch, R requests.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onetrain.data.errors import DamagedShardError
from onetrain.data.fingerprint import json_fingerprint
from onetrain.data.options import BatchOptions
from onetrain.data.shards import ShardReader
from onetrain.data.sidecar import append

Split = Literal["train", "valid", "test"]
Ids = NDArray[np.int64]

FORMAT = 1
ORDER_KEYS = ("max_context", "request_by", "share_context", "target_behaviours", "min_context")
SAMPLE = np.dtype([(name, "<i4") for name in ("start", "first", "stop", "end")])
_CHUNK_USERS = 1 << 16
_BATCHES = 8  # record batches that are looked at together


def table_key(reader: ShardReader, split: Split, options: BatchOptions) -> str:
    """Name of the table: equal where all that decides its contents is equal."""
    keys = {key: value for key, value in asdict(options).items() if key in ORDER_KEYS}
    return json_fingerprint([FORMAT, reader.manifest.fingerprint, split, keys])


def is_plain(options: BatchOptions) -> bool:
    """Whether samples follow from the user table alone: every event of the split is one."""
    return options.share_context == "request" and options.request_by == "event" and not options.target_behaviours


def split_range(users: NDArray[Any], split: Split, options: BatchOptions) -> tuple[Ids, Ids]:
    """(U,) first and past-the-last event of the split with enough context, of records of the user table."""
    first = {"train": "train_start", "valid": "valid_start", "test": "test_start"}[split]
    last = {"train": "valid_start", "valid": "test_start", "test": "length"}[split]
    return np.maximum(users[first], options.min_context).astype(np.int64), users[last].astype(np.int64)


def build_table(
    folder: Path, reader: ShardReader, split: Split, options: BatchOptions, *, by_time: bool, skip_damaged: bool
) -> dict[str, Any]:
    """Write the table into `folder`; returns its description: samples, and which shards were left out as damaged.

    Raises DamagedShardError unless `skip_damaged`.
    """
    if is_plain(options) and not by_time:
        return {"samples": _count_plain(folder, reader, split, options), "skipped_shards": []}
    skipped = damaged_shards(reader, range(len(reader.manifest.shards))) if skip_damaged else []
    samples = 0
    for begin, end, shard in _parts(reader):
        if shard in skipped:
            append(folder / "ends.bin", np.full(end - begin, samples, np.int64))
            continue
        requests = _requests(reader, np.arange(begin, end), split, options)
        table, last = _samples(requests, options)
        append(folder / "ends.bin", samples + np.cumsum(np.bincount(requests.user_R[last], minlength=end - begin)))
        if not is_plain(options):
            append(folder / "samples.bin", table)
        if by_time:
            append(folder / "moments.bin", requests.moment_R[last])
        samples += len(table)
    return {"samples": samples, "skipped_shards": skipped}


def _parts(reader: ShardReader) -> Iterator[tuple[int, int, int]]:
    """First and past-the-last row of a few record batches of one shard, and the shard; all of them in turn."""
    batches = reader.table.batches
    begins = (np.arange(len(batches)) % _BATCHES == 0) | (np.diff(batches["shard"], prepend=-1) != 0)
    bounds = np.append(batches["first_row"][begins], reader.n_users).tolist()
    for (begin, end), shard in zip(pairwise(bounds), batches["shard"][begins].tolist(), strict=True):
        yield begin, end, shard


def damaged_shards(reader: ShardReader, shards: Iterable[int]) -> list[int]:
    """Those of these shards that are missing or not what was written; reads all of them."""
    found = []
    for shard in shards:
        try:
            reader.check(shard)
        except DamagedShardError:
            found.append(shard)
    return found


def _count_plain(folder: Path, reader: ShardReader, split: Split, options: BatchOptions) -> int:
    reader.check_users()
    samples, users = 0, reader.table.users
    for start in range(0, len(users), _CHUNK_USERS):
        first, last = split_range(users[start : start + _CHUNK_USERS], split, options)
        ends = samples + np.cumsum(np.maximum(last - first, 0))
        append(folder / "ends.bin", ends)
        samples = int(ends[-1])
    return samples


class _Requests(NamedTuple):
    """Requests of consecutive users, in order of user and time: what a request is, data/samples.py says."""

    user_R: Ids
    end_R: Ids
    first_R: Ids
    stop_R: Ids
    moment_R: Ids  # epoch ms of the first target


def _requests(reader: ShardReader, row_U: Ids, split: Split, options: BatchOptions) -> _Requests:
    places = reader.locate(row_U)
    length_U = places.users["length"].astype(np.int64)
    begin_U = np.cumsum(length_U) - length_U
    user_E = np.repeat(np.arange(len(row_U)), length_U)
    place_E = np.arange(len(user_E)) - begin_U[user_E]
    first_U, last_U = split_range(places.users, split, options)
    target_E = (place_E >= first_U[user_E]) & (place_E < last_U[user_E])

    def column(name: str) -> NDArray[Any]:
        return np.concatenate(reader.pieces(name, places, np.zeros_like(length_U), length_U))

    if options.target_behaviours:
        known = reader.manifest.behaviours
        target_E &= np.isin(column("behaviour"), [known.index(name) for name in options.target_behaviours])
    timestamp_E = column("timestamp_ms")
    end_E = place_E
    if options.request_by == "timestamp":
        new_E = (place_E == 0) | (np.diff(timestamp_E, prepend=0) != 0)
        end_E = place_E[np.maximum.accumulate(np.where(new_E, np.arange(len(new_E)), 0))]
        target_E &= end_E >= options.min_context
    chosen = np.flatnonzero(target_E)
    user, end, place = user_E[chosen], end_E[chosen], place_E[chosen]
    opens = np.ones(len(chosen), dtype=bool)
    opens[1:] = (np.diff(user) != 0) | (np.diff(end) != 0)
    closes = np.append(opens[1:], True)[: len(opens)]
    return _Requests(user[opens], end[opens], place[opens], place[closes] + 1, timestamp_E[chosen[opens]])


def _samples(requests: _Requests, options: BatchOptions) -> tuple[NDArray[Any], Ids]:
    """Records of the samples that these requests make, and the number of each one's last request."""
    size, end_R = options.max_context, requests.end_R
    first = last = np.arange(len(end_R))
    start = np.maximum(end_R - size, 0)
    if options.share_context == "user":
        first, last, start = _windows(requests.user_R, end_R, size)
    table = np.zeros(len(first), SAMPLE)
    table["start"], table["first"], table["stop"] = start, requests.first_R[first], requests.stop_R[last]
    table["end"] = end_R[last]
    return table, last


def _windows(user_R: Ids, end_R: Ids, size: int) -> tuple[Ids, Ids, Ids]:
    """Consecutive requests of a user whose contexts fit into one window; a later window begins half a window back.

    First and last request, and the start, of each window.
    """
    windows: list[tuple[int, int, int]] = []
    for begin, end in pairwise([*np.flatnonzero(np.diff(user_R, prepend=-1)).tolist(), len(user_R)]):
        ends, at = end_R[begin:end], 0
        while at < len(ends):
            back = size if at == 0 else max(size // 2, 1)
            start = max(int(ends[at]) - back, 0)
            following = int(np.searchsorted(ends, start + size, side="right"))
            windows.append((begin + at, begin + following - 1, start))
            at = following
    first, last, start_W = np.array(windows, dtype=np.int64).reshape(-1, 3).T
    return first, last, start_W
