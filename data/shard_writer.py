"""Writes user blocks into Arrow IPC shards, a bounded number of events at a time."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from onetrain.data.fingerprint import file_checksum
from onetrain.data.manifest import StoredFile
from onetrain.data.schema import BOUNDS, event_types, shard_schema
from onetrain.data.user_table import BATCHES, USERS, UserTableWriter

# most events of a record batch that holds more than one user: what is read and checked when one of them is first wanted
BATCH_EVENTS = 16_384


@dataclass(frozen=True)
class UserBlock:
    """Whole users: ids, lengths, where each split begins, and their events user after user, oldest first."""

    users: pa.StringArray
    lengths: np.ndarray  # int64, events of each user
    train_start: np.ndarray
    valid_start: np.ndarray
    test_start: np.ndarray
    columns: dict[str, np.ndarray]  # per-event column -> values of all users
    attributes: dict[str, np.ndarray] = field(default_factory=dict)  # attribute -> id of each user

    def __getitem__(self, users: slice) -> "UserBlock":
        bounds = np.concatenate([[0], np.cumsum(self.lengths)])
        start, stop, _ = users.indices(len(self.lengths))
        events = slice(bounds[start], bounds[stop])
        return UserBlock(
            self.users.slice(start, stop - start),
            self.lengths[users],
            self.train_start[users],
            self.valid_start[users],
            self.test_start[users],
            {name: values[events] for name, values in self.columns.items()},
            {name: values[users] for name, values in self.attributes.items()},
        )


def join_blocks(blocks: list[UserBlock]) -> UserBlock:
    """One block of the users of several."""
    return UserBlock(
        pa.concat_arrays([block.users for block in blocks]),
        np.concatenate([block.lengths for block in blocks]),
        np.concatenate([block.train_start for block in blocks]),
        np.concatenate([block.valid_start for block in blocks]),
        np.concatenate([block.test_start for block in blocks]),
        {name: np.concatenate([block.columns[name] for block in blocks]) for name in blocks[0].columns},
        {name: np.concatenate([block.attributes[name] for block in blocks]) for name in blocks[0].attributes},
    )


class ShardWriter:
    """Cuts users into record batches and shards by their lengths alone: how they arrive does not show in the files."""

    def __init__(
        self, folder: Path, extra: tuple[str, ...], shard_events: int, user_features: tuple[str, ...] = ()
    ) -> None:
        self.shards: list[StoredFile] = []
        self._folder = folder
        self._types = event_types(extra)
        self.event_columns = tuple(self._types)
        self._user_features = user_features
        self._schema = shard_schema(extra, user_features)
        self._shard_events = shard_events
        self._batch_events = min(BATCH_EVENTS, shard_events)
        self._table = UserTableWriter(folder, extra, user_features)
        self._waiting: list[UserBlock] = []
        self._file: pa.RecordBatchFileWriter | None = None
        self._rows = self._events = self._n_batches = 0

    def append(self, block: UserBlock) -> None:
        """Add whole users, which come after all users before."""
        self._waiting.append(block)
        if sum(int(waiting.lengths.sum()) for waiting in self._waiting) > self._batch_events:
            self._write_batches(final=False)

    def close(self) -> None:
        """Write what is left and finish the last shard."""
        if self._waiting:
            self._write_batches(final=True)
        self._finish_shard()
        self._table.close()

    def tables(self) -> tuple[StoredFile, StoredFile]:
        """The user table of the finished shards: users.bin and batches.bin."""
        rows = {USERS: sum(shard.rows for shard in self.shards), BATCHES: self._n_batches}
        users, batches = (_stored(self._folder / name, count) for name, count in rows.items())
        return users, batches

    def abort(self) -> None:
        """Close the open file without finishing it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._table.close()

    def _write_batches(self, final: bool) -> None:
        block = join_blocks(self._waiting)
        bounds = np.concatenate([[0], np.cumsum(block.lengths)])
        n_users, start = len(block.lengths), 0
        while start < n_users:
            stop = int(np.searchsorted(bounds, bounds[start] + self._batch_events, side="right")) - 1
            stop = max(stop, start + 1)
            if stop >= n_users and not final:
                break  # the next user may still fit into this batch
            self._write_batch(block[start:stop])
            start = stop
        self._waiting = [block[start:n_users]] if start < n_users else []

    def _write_batch(self, block: UserBlock) -> None:
        events = int(block.lengths.sum())
        if self._rows and self._events + events > self._shard_events:
            self._finish_shard()
        if self._file is None:
            self._file = pa.ipc.new_file(str(self._folder / self._name()), self._schema)
        offsets = pa.array(np.concatenate([[0], np.cumsum(block.lengths)]), pa.int64())
        lists = [
            pa.LargeListArray.from_arrays(offsets, pa.array(block.columns[name], kind))
            for name, kind in self._types.items()
        ]
        starts = [pa.array(getattr(block, name), pa.int32()) for name in BOUNDS]
        users = pa.concat_arrays([block.users])
        attributes = [pa.array(block.attributes[name], pa.int32()) for name in self._user_features]
        columns = [users, *starts, *lists, *attributes]
        self._file.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._rows += len(block.lengths)
        self._n_batches += 1
        self._events += events

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        path = self._folder / self._name()
        self.shards.append(_stored(path, self._rows, self._events))
        self._table.add(path)
        self._rows = self._events = 0

    def _name(self) -> str:
        return f"shard-{len(self.shards):05d}.arrow"


def _stored(path: Path, rows: int, events: int = 0) -> StoredFile:
    return StoredFile(path.name, rows, path.stat().st_size, file_checksum(path), events)
