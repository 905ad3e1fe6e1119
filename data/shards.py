"""Reads prepared shards: memory-mapped, any user in constant time, without copies."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest, verify_shards, verify_sizes
from onetrain.data.schema import event_types, extra_column, user_column


@dataclass(frozen=True)
class UserSequence:
    """One user's n events, oldest first: arrays of shape (n,), read-only views of the shard.

    Events [0, valid_start) train, [valid_start, test_start) validate, [test_start, n) test. `item`, `behaviour` and
    `scenario` are indices into items.arrow and the manifest's lists; times are milliseconds, -1 where unknown.
    `features`: ids of the user's attributes, 0 where unknown.
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

    def __len__(self) -> int:
        return len(self.item)


class _Batch:
    """Numpy views of one record batch."""

    def __init__(self, batch: pa.RecordBatch, manifest: Manifest) -> None:
        self.users = batch.column("user")
        self.valid_start = batch.column("valid_start").to_numpy()
        self.test_start = batch.column("test_start").to_numpy()
        self.offsets = batch.column("item").offsets.to_numpy()
        self.values = {name: batch.column(name).values.to_numpy() for name in event_types(manifest.extra)}
        self.features = {name: batch.column(user_column(name)).to_numpy() for name in manifest.user_features}


class ShardReader:
    """All users of a prepared folder under one row number: shard after shard, in the order of the manifest.

    Opening checks the size of every file, and with `checksum=True` (the default) its checksum too; pass False where
    another process of the job has just checked. Raises DataError that names the missing or damaged file.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest, *, checksum: bool = True) -> None:
        self.folder = local_folder(folder)
        self.manifest = manifest
        (verify_shards if checksum else verify_sizes)(manifest, self.folder)
        self._files = [self._open(self.folder / shard.file) for shard in manifest.shards]
        self._batches = [(file, index) for file in self._files for index in range(file.num_record_batches)]
        rows = [file.get_batch(index).num_rows for file, index in self._batches]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        if self._starts[-1] != manifest.users:
            raise DataError(f"{self.folder}: shards hold {self._starts[-1]} users, the manifest says {manifest.users}.")
        self._views: dict[int, _Batch] = {}

    def __reduce__(self) -> tuple[Callable[..., "ShardReader"], tuple[Any, ...]]:
        return _reopen, (self.folder, self.manifest)

    @property
    def n_users(self) -> int:
        """Number of users, which is the number of rows."""
        return self.manifest.users

    def user(self, row: int) -> UserSequence:
        """Events of the user in this row (0-based). Raises IndexError outside [0, n_users)."""
        if not 0 <= row < self.n_users:
            raise IndexError(f"row {row} is outside [0, {self.n_users})")
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch = self._view(index)
        local = row - int(self._starts[index])
        events = slice(int(batch.offsets[local]), int(batch.offsets[local + 1]))
        values = batch.values
        return UserSequence(
            user=batch.users[local].as_py(),
            item=values["item"][events],
            timestamp_ms=values["timestamp_ms"][events],
            behaviour=values["behaviour"][events],
            scenario=values["scenario"][events],
            watch_ms=values["watch_ms"][events],
            duration_ms=values["duration_ms"][events],
            extra={name: values[extra_column(name)][events] for name in self.manifest.extra},
            valid_start=int(batch.valid_start[local]),
            test_start=int(batch.test_start[local]),
            features={name: int(ids[local]) for name, ids in batch.features.items()},
        )

    def split_bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Events, valid_start and test_start of every user: int64 arrays of shape (n_users,).

        Reads list offsets and the two integer columns, no events.
        """
        return self._bounds

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        views = [self._view(index) for index in range(len(self._batches))]
        lengths = np.concatenate([np.diff(view.offsets) for view in views])
        valid_start = np.concatenate([view.valid_start for view in views]).astype(np.int64)
        test_start = np.concatenate([view.test_start for view in views]).astype(np.int64)
        return lengths, valid_start, test_start

    def _view(self, index: int) -> _Batch:
        if index not in self._views:
            file, number = self._batches[index]
            self._views[index] = _Batch(file.get_batch(number), self.manifest)
        return self._views[index]

    @staticmethod
    def _open(path: Path) -> pa.RecordBatchFileReader:
        try:
            return pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is no Arrow file ({error}). Run `onetrain prepare` again.") from error


def read_items(folder: str | os.PathLike[str]) -> pa.Table:
    """The item table of a prepared folder, memory-mapped; row number = item index.

    Columns: item, text, categories, embedding (only if the source has one), f_<name> (int32) of every item attribute,
    train_count.
    """
    path = local_folder(folder) / "items.arrow"
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Run `onetrain prepare` first.") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no Arrow file ({error}). Run `onetrain prepare` again.") from error


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder` as a local path. Raises DataError for a remote one: shards are memory-mapped."""
    text = os.fspath(folder).removeprefix("file://")
    if "://" in text:
        raise DataError(
            f"{text}: prepared shards are memory-mapped and must lie on a local disk. Copy the folder to each machine "
            "and set data.prepared to the copy."
        )
    return Path(text)


def _reopen(folder: Path, manifest: Manifest) -> ShardReader:
    """A reader in another process, of files that were checked when the first one was opened."""
    return ShardReader(folder, manifest, checksum=False)
