"""The user table of a prepared folder: where every user's events lie, so that any are found without opening a shard.

users.bin holds a record per user, batches.bin one per record batch. Both are memory-mapped: however many users there
are, they take no memory that the system could not drop. A record batch's own record has the checksums of its bytes in
the shard and of its users' records, so that a reader need only check what it reads.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.mapping import map_file
from onetrain.data.schema import event_types, user_column

USERS, BATCHES = "users.bin", "batches.bin"
USER_TEXT = ("user_offsets", "user_data")  # of a record batch: the two buffers of the users' ids
_ID_MASK = 0x7FFF_FFFF_FFFF_FFFF


def user_id(user: str) -> int:
    """A user's id as a number below 2 ** 63, by a hash."""
    return int(xxhash.xxh3_64_intdigest(user.encode()) & _ID_MASK)


def user_dtype(attributes: Iterable[str]) -> np.dtype:
    """A record of users.bin. begin: number of the user's first event within the record batch."""
    fields = [(name, "<i4") for name in ("length", "train_start", "valid_start", "test_start")]
    fields += [("begin", "<i8"), ("id", "<i8"), *((user_column(name), "<i4") for name in attributes)]
    return np.dtype(fields, align=True)


def batch_dtype(extra: Iterable[str]) -> np.dtype:
    """A record of batches.bin. at, size: its bytes within the shard's file, and xxh3 their checksum; users_xxh3: that
    of its users' records; of every event column the number of its first value, counted from the file's beginning in
    values of its type; of USER_TEXT in bytes.
    """
    fields = [("shard", "<i4"), *((name, "<i8") for name in ("first_row", "at", "size"))]
    fields += [(name, "<u8") for name in ("xxh3", "users_xxh3")]
    return np.dtype([*fields, *((name, "<i8") for name in (*event_types(extra), *USER_TEXT))], align=True)


@dataclass(frozen=True)
class UserTable:
    """Both tables of one folder, memory-mapped."""

    users: NDArray[Any]
    batches: NDArray[Any]

    @classmethod
    def open(cls, users: Path, batches: Path, extra: Iterable[str], attributes: Iterable[str]) -> "UserTable":
        """Map the two files; DataError when one does not hold whole records."""
        return cls(_map(users, user_dtype(attributes)), _map(batches, batch_dtype(extra)))


class UserTableWriter:
    """Writes the table of shards that are finished, one after another."""

    def __init__(self, folder: Path, extra: tuple[str, ...], attributes: tuple[str, ...]) -> None:
        self._types, self._attributes = event_types(extra), attributes
        self._user_dtype, self._batch_dtype = user_dtype(attributes), batch_dtype(extra)
        self._files: list[BinaryIO] = [(folder / name).open("wb") for name in (USERS, BATCHES)]
        self._rows = self._n_batches = self._shards = 0

    def add(self, path: Path) -> None:
        """Add the users of the next shard."""
        with pa.memory_map(str(path)) as source:
            base = source.read_buffer(source.size()).address
            source.seek(0)
            file = pa.ipc.open_file(source)
            for number in range(file.num_record_batches):
                self._add(file.get_batch(number), base)
        self._shards += 1

    def close(self) -> None:
        """Finish both files."""
        for file in self._files:
            file.close()

    def _add(self, batch: pa.RecordBatch, base: int) -> None:
        offsets = batch.column("item").offsets.to_numpy()
        users = np.zeros(batch.num_rows, self._user_dtype)
        users["length"], users["begin"] = np.diff(offsets), offsets[:-1]
        for name in ("train_start", "valid_start", "test_start", *map(user_column, self._attributes)):
            users[name] = batch.column(name).to_numpy()
        users["id"] = [user_id(user) for user in batch.column("user").to_pylist()]
        users.tofile(self._files[0])

        buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer and buffer.size]
        begin = min(buffer.address for buffer in buffers)
        end = max(buffer.address + buffer.size for buffer in buffers)
        record = np.zeros(1, self._batch_dtype)
        record["shard"], record["first_row"] = self._shards, self._rows
        record["at"], record["size"] = begin - base, end - begin
        record["xxh3"] = xxhash.xxh3_64_intdigest(pa.foreign_buffer(begin, end - begin))
        record["users_xxh3"] = xxhash.xxh3_64_intdigest(users.data.cast("B"))
        for name, kind in self._types.items():
            values, width = batch.column(name).values.buffers()[1], kind.bit_width // 8
            at = values.address - base if values.size else 0  # an empty buffer lies nowhere
            if at % width:
                raise DataError(f"column {name} of record batch {self._n_batches} is not aligned to its type")
            record[name] = at // width
        _, *text = batch.column("user").buffers()
        for name, buffer in zip(USER_TEXT, text, strict=True):
            record[name] = buffer.address - base if buffer.size else 0
        record.tofile(self._files[1])
        self._rows += batch.num_rows
        self._n_batches += 1


def _map(path: Path, dtype: np.dtype) -> NDArray[Any]:
    size = os.path.getsize(path)
    if size == 0 or size % dtype.itemsize:
        raise DataError(f"{path} has {size} bytes, no whole number of records. Run `onetrain prepare` again.")
    return map_file(path, dtype)
