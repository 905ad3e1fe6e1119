"""Reads prepared shards: memory-mapped, any user in constant time, events of many users in one call.

Legend: B rows, E events of a batch one after another.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from onetrain.data.activity import doing
from onetrain.data.errors import DamagedShardError, DataError
from onetrain.data.fingerprint import file_checksum
from onetrain.data.manifest import Manifest, StoredFile
from onetrain.data.mapping import map_file
from onetrain.data.ragged import copy_ranges
from onetrain.data.schema import event_types, extra_column, user_column
from onetrain.data.store import Stamp, Store, open_store
from onetrain.data.stream_options import StreamOptions
from onetrain.data.user_table import USER_TEXT, UserTable

Ids = NDArray[np.int64]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserSequence:
    """One user's n events, oldest first: arrays of shape (n,), read-only views of the shard.

    Events [0, train_start) are context only, [train_start, valid_start) train, [valid_start, test_start) validate,
    [test_start, n) test. `item`, `behaviour` and `scenario` are indices into items.arrow and the manifest's lists;
    times are milliseconds, -1 where unknown. `features`: ids of the user's attributes, 0 where unknown.
    """

    user: str
    item: np.ndarray
    timestamp_ms: np.ndarray
    behaviour: np.ndarray
    scenario: np.ndarray
    watch_ms: np.ndarray
    duration_ms: np.ndarray
    extra: dict[str, np.ndarray]
    valid_start: int
    test_start: int
    features: dict[str, int] = field(default_factory=dict)
    train_start: int = 0

    def __len__(self) -> int:
        return len(self.item)


@dataclass(frozen=True)
class Places:
    """Where the events of B users lie."""

    users: NDArray[Any]  # (B,) records of the user table
    batches: NDArray[Any]  # (B,) records of their record batches
    shards: "list[_OpenShard]"  # that they lie in, mapped as long as this is there
    shard_B: Ids  # which of these

    def first(self, name: str) -> Ids:
        """(B,) number, within its shard, of each user's first value of a column."""
        first_B: Ids = self.batches[name] + self._begin_B
        return first_B

    @cached_property
    def sources(self) -> tuple[Ids, Ids]:
        """(B,) address and bytes of each user's shard."""
        addresses = np.array([shard.bytes.__array_interface__["data"][0] for shard in self.shards], dtype=np.int64)
        return addresses[self.shard_B], np.array([len(shard.bytes) for shard in self.shards])[self.shard_B]

    @cached_property
    def _begin_B(self) -> Ids:  # noqa: N802
        return np.ascontiguousarray(self.users["begin"])


class ShardReader:
    """All users of a prepared folder under one row number: shard after shard, in the order of the manifest.

    Opening reads the table of record batches alone. A shard is opened when one of its users is first asked for, and
    each record batch is held against its checksum when it is first read, and again when the file has changed;
    DamagedShardError names the file that is missing, truncated or changed.
    """

    def __init__(self, store: Store | str | os.PathLike[str], manifest: Manifest) -> None:
        self.store: Store = open_store(store) if isinstance(store, str | os.PathLike) else store
        self.manifest = manifest
        self.types = {name: np.dtype(kind.to_pandas_dtype()) for name, kind in event_types(manifest.extra).items()}
        paths = [self.store.path(manifest.user_table), verified(self.store, manifest.batch_table)]
        self.table = UserTable.open(paths[0], paths[1], manifest.extra, manifest.user_features)
        if len(self.table.users) != manifest.users:
            raise DataError(f"{paths[0]} holds {len(self.table.users)} users, the manifest says {manifest.users}.")
        self.damaged: set[int] = set()  # shards found to be missing, truncated or changed
        self._bad: set[int] = set()  # record batches of them that `readable` found
        self._verified = np.zeros(len(self.table.batches), dtype=bool)
        self._open: dict[int, _OpenShard] = {}

    def __reduce__(self) -> tuple[Callable[..., "ShardReader"], tuple[Any, ...]]:
        return ShardReader, (self.store, self.manifest)

    @property
    def n_users(self) -> int:
        """Number of users, which is the number of rows."""
        return self.manifest.users

    def shards(self, row_B: Ids) -> NDArray[np.int32]:
        """Number of the shard that each of these rows lies in."""
        shard_B: NDArray[np.int32] = self.table.batches["shard"][self._batch(row_B)]
        return shard_B

    def locate(self, row_B: Ids) -> Places:
        """Find the users of these rows, and check what is read for the first time."""
        batch_B = self._batch(row_B)
        batches = self.table.batches[batch_B]
        shards, shard_B = np.unique(batches["shard"], return_inverse=True)
        for shard in shards.tolist():
            self._look_again(shard)
        for batch in set(batch_B[~self._verified[batch_B]].tolist()):
            self._verify(batch)
        return Places(self.table.users[row_B], batches, [self._shard(shard) for shard in shards.tolist()], shard_B)

    def readable(self, row_B: Ids) -> NDArray[np.bool_]:
        """(B,) whether the record batch of each row is what was written; reads those that were not read before.

        A shard that is damaged or missing is warned of once. What was found to be bad stays so for this reader.
        """
        batch_B = self._batch(row_B)
        for shard in set(self.table.batches["shard"][batch_B].tolist()):
            self._look_again(shard)
        for batch in set(batch_B[~self._verified[batch_B]].tolist()) - self._bad:
            known = set(self.damaged)
            try:
                self._verify(batch)
            except DamagedShardError as error:
                self._bad.add(batch)
                if self.damaged - known:
                    _log.warning("Samples of a damaged shard are left out (stream.damaged: skip). %s", error)
        return ~np.isin(batch_B, list(self._bad))

    def check(self, shard: int) -> None:
        """Read all of a shard. Raises DamagedShardError when it is missing or not what was written."""
        self._look_again(shard)
        for batch in np.flatnonzero(self.table.batches["shard"] == shard).tolist():
            self._verify(batch)

    def check_users(self) -> None:
        """Read all of the user table, and nothing else. Raises DamagedShardError when it is not what was written."""
        for batch in range(len(self.table.batches)):
            self._verify_users(batch)

    def pieces(self, name: str, places: Places, start_B: Ids, stop_B: Ids) -> list[NDArray[Any]]:
        """Of each user the events [start, stop) of one column, as views."""
        first_B = places.first(name)
        views = [shard.view(self.types[name]) for shard in places.shards]
        bounds = zip(places.shard_B.tolist(), (first_B + start_B).tolist(), (first_B + stop_B).tolist(), strict=True)
        return [views[shard][begin:end] for shard, begin, end in bounds]

    def copy(self, name: str, places: Places, start_B: Ids, length_B: Ids, at_B: Ids, out: NDArray[Any]) -> None:
        """Of each user `length` events of a column, from `start` on, to out[at : at + length]."""
        if not copy_ranges(*places.sources, places.first(name) + start_B, length_B, at_B, out):
            raise IndexError(f"events from {start_B} on, {length_B} each, are not all there")

    def user(self, row: int) -> UserSequence:
        """Events of the user in this row (0-based). Raises IndexError outside [0, n_users)."""
        if not 0 <= row < self.n_users:
            raise IndexError(f"row {row} is outside [0, {self.n_users})")
        places = self.locate(np.array([row]))
        record, batch = places.users[0], places.batches[0]
        whole = np.array([0]), np.array([record["length"]])
        values = {name: self.pieces(name, places, *whole)[0] for name in self.types}
        return UserSequence(
            user=self._user_text(row, batch),
            item=values["item"],
            timestamp_ms=values["timestamp_ms"],
            behaviour=values["behaviour"],
            scenario=values["scenario"],
            watch_ms=values["watch_ms"],
            duration_ms=values["duration_ms"],
            extra={name: values[extra_column(name)] for name in self.manifest.extra},
            train_start=int(record["train_start"]),
            valid_start=int(record["valid_start"]),
            test_start=int(record["test_start"]),
            features={name: int(record[user_column(name)]) for name in self.manifest.user_features},
        )

    def name(self, row: int) -> str:
        """Id of the user in this row."""
        return self._user_text(row, self.table.batches[self._batch(np.array([row]))[0]])

    def split_bounds(self) -> tuple[Ids, Ids, Ids]:
        """Events, valid_start and test_start of every user: int64 arrays of shape (n_users,)."""
        return self._bounds

    @cached_property
    def _bounds(self) -> tuple[Ids, Ids, Ids]:
        lengths, valid, test = (self.table.users[n].astype(np.int64) for n in ("length", "valid_start", "test_start"))
        return lengths, valid, test

    def _batch(self, row_B: Ids) -> Ids:
        """Number of the record batch that each of these rows lies in."""
        batch_B: Ids = np.searchsorted(self.table.batches["first_row"], row_B, side="right") - 1
        return batch_B

    def _user_text(self, row: int, batch: Any) -> str:
        offsets, data = (int(batch[name]) for name in USER_TEXT)
        file, local = self._shard(int(batch["shard"])).bytes, row - int(batch["first_row"])
        begin, end = file[offsets + 4 * local : offsets + 4 * local + 8].view("<i4")
        return file[data + begin : data + end].tobytes().decode()

    def _verify(self, batch: int) -> None:
        record = self.table.batches[batch]
        shard, at, size = int(record["shard"]), int(record["at"]), int(record["size"])
        stored = self.manifest.shards[shard]
        self._verify_users(batch)
        for _ in range(2):
            content = self._shard(shard).bytes[at : at + size].data
            with doing(f"verifying {stored.file}"):
                found = xxhash.xxh3_64_intdigest(content)
            if found == int(record["xxh3"]):
                self._verified[batch] = True
                return
            if not self.store.mend(stored):
                break
            self._open.pop(shard, None)
        self.damaged.add(shard)
        raise DamagedShardError(
            f"{self.store.name}/{stored.file} is damaged: bytes {at} to {at + size} are not those that were written "
            "(checksum). Copy it again or run `onetrain prepare` again; with stream.damaged: skip a run goes on "
            "without its samples.",
            stored.file,
        )

    def _verify_users(self, batch: int) -> None:
        first_rows, users = self.table.batches["first_row"], self.manifest.user_table
        end = int(first_rows[batch + 1]) if batch + 1 < len(first_rows) else self.n_users
        records = self.table.users[int(first_rows[batch]) : end]
        if xxhash.xxh3_64_intdigest(records.data.cast("B")) != int(self.table.batches["users_xxh3"][batch]):
            self.store.mend(users)  # the next start copies it again
            self.damaged.add(int(self.table.batches["shard"][batch]))
            raise DamagedShardError(
                f"{self.store.name}/{users.file} is damaged: the records of users {first_rows[batch]} to {end - 1} are "
                "not those that were written (checksum). Copy it again or run `onetrain prepare` again.",
                users.file,
            )

    def _look_again(self, shard: int) -> None:
        """Let go of a shard whose file is gone or has changed since it was opened."""
        shown = self._open.get(shard)
        if shown is not None and self.store.stamp(shown.path) != shown.stamp:
            self._let_go(shard)

    def _let_go(self, shard: int) -> None:
        self._open.pop(shard, None)
        self._verified[self.table.batches["shard"] == shard] = False

    def _shard(self, shard: int) -> "_OpenShard":
        shown = self._open.get(shard)
        if shown is None:
            for other, known in list(self._open.items()):
                if not known.path.exists():  # a copy that made room on the disk takes its own until it is let go
                    self._let_go(other)
            try:
                with doing(f"fetching {self.manifest.shards[shard].file}"):
                    shown = self._open[shard] = self._opened(shard)
            except DamagedShardError:
                self.damaged.add(shard)
                raise
        return shown

    def _opened(self, shard: int) -> "_OpenShard":
        stored = self.manifest.shards[shard]
        while True:
            path = self.store.path(stored)
            stamp = self.store.stamp(path)
            try:
                found = map_file(path)
            except FileNotFoundError:  # made room for another copy: `path` looks again
                continue
            if stamp is not None and len(found) == stored.bytes:
                return _OpenShard(path, stamp, found)


@dataclass(frozen=True)
class _OpenShard:
    """A mapped shard: its bytes, and the same as values of any type."""

    path: Path
    stamp: Stamp
    bytes: NDArray[np.uint8]
    views: dict[np.dtype, NDArray[Any]] = field(default_factory=dict)

    def view(self, kind: np.dtype) -> NDArray[Any]:
        """As values of one type."""
        found = self.views.get(kind)
        if found is None:
            found = self.bytes[: len(self.bytes) // kind.itemsize * kind.itemsize].view(kind)
            self.views[kind] = found
        return found


class Histories:
    """The whole histories of B users in any of several readers: located, and read column by column."""

    def __init__(self, readers: Sequence[ShardReader], reader_B: Ids, row_B: Ids) -> None:
        present = np.unique(reader_B).tolist()
        self._parts = [(readers[number], np.flatnonzero(reader_B == number)) for number in present]
        self._places = [reader.locate(row_B[here]) for reader, here in self._parts]

    def events(self, name: str, start_B: Ids, stop_B: Ids) -> NDArray[Any]:
        """(E,) values of a column: of each user the events [start, stop), one user after another."""
        length_B = stop_B - start_B
        at_B = np.cumsum(length_B) - length_B
        out = np.empty(int(length_B.sum()), self._parts[0][0].types[name])
        for (reader, here), places in zip(self._parts, self._places, strict=True):
            reader.copy(name, places, start_B[here], length_B[here], at_B[here], out)
        return out

    def users(self, name: str) -> Ids:
        """(B,) values of a field of the user table: id, length, train_start, u_<attribute> ..."""
        values = np.empty(sum(len(here) for _, here in self._parts), dtype=np.int64)
        for (_, here), places in zip(self._parts, self._places, strict=True):
            values[here] = places.users[name]
        return values


def verified(store: Store, stored: StoredFile) -> Path:
    """A local file, read and held against its checksum. Raises DamagedShardError when it is missing or damaged."""
    for _ in range(2):
        path = store.path(stored)
        if file_checksum(path) == stored.xxh3_128:
            return path
        if not store.mend(stored):
            break
    raise DamagedShardError(
        f"{store.name}/{stored.file} is damaged (checksum). Copy it again or run `onetrain prepare` again.", stored.file
    )


def read_items(folder: str | os.PathLike[str], options: StreamOptions | None = None) -> pa.Table:
    """The item table of a prepared folder, memory-mapped; row number = item index.

    Columns: item, text, categories, embedding (only if the source has one), f_<name> (int32) of every item attribute,
    train_count. `options` say where copies of a remote folder's files are kept.
    """
    path = verified(open_store(folder, options), Manifest.load(folder).items)
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no Arrow file ({error}). Run `onetrain prepare` again.") from error
