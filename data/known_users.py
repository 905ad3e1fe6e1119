"""Finds the users of new events in the versions of a folder, and reads what is known of them.

Legend: U users of a block, K their known events, one user after another and one version after another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from onetrain.data.schema import event_types, extra_column
from onetrain.data.shards import ShardReader, UserSequence
from onetrain.data.sidecar import append, mapped
from onetrain.data.user_table import user_id

_CHUNK = 1 << 20
_PLACE = np.dtype([("id", "<i8"), ("version", "<i8"), ("row", "<i8")])


@dataclass(frozen=True)
class Known:
    """Known events of the users of a block, each once: columns of (K,), and of each user (U,)."""

    user_K: NDArray[np.int64]  # number within the block
    columns: dict[str, np.ndarray]
    events: NDArray[np.int64]  # (U,) how many are known, of which the newest are here
    attributes: dict[str, np.ndarray]  # (U,) newest known ids, 0 = unknown


class KnownUsers:
    """Where the users of table `sorted` are in each of the versions; found once, and kept on disk.

    A version owns the events from train_start on of each of its rows; those before are context, of an earlier one.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, readers: Sequence[ShardReader], scratch: Path) -> None:
        self._readers = readers
        path = scratch / "known.bin"
        con.execute("CREATE TABLE new_users (id BIGINT)")
        con.execute("CREATE TABLE known (id BIGINT, version BIGINT, row BIGINT)")
        cursor = con.cursor()  # reads while the connection writes
        for batch in cursor.sql('SELECT DISTINCT "user" FROM sorted').to_arrow_reader(_CHUNK):
            ids = pa.table({"id": np.array([user_id(user) for user in batch["user"].to_pylist()], np.int64)})
            insert(con, "new_users", ids)
        cursor.close()
        for version, reader in enumerate(readers):
            users = reader.table.users
            for start in range(0, len(users), _CHUNK):
                ids = np.ascontiguousarray(users["id"][start : start + _CHUNK])
                rows = pa.table({"id": ids, "row": np.arange(start, start + len(ids))})
                insert(con, "known", rows, f"SELECT id, {version}, row FROM chunk SEMI JOIN new_users USING (id)")
        for batch in con.sql("FROM known ORDER BY id, version, row").to_arrow_reader(_CHUNK):
            found = np.empty(batch.num_rows, _PLACE)
            for name in _PLACE.names or ():
                found[name] = batch[name].to_numpy()
            append(path, found)
        con.execute("DROP TABLE known; DROP TABLE new_users")
        self._places = mapped(path, _PLACE)

    def read(self, users: Sequence[str], since_ms: NDArray[np.int64], history: int) -> Known:
        """Of each user every event from `since_ms` on, and at least the newest `history` ones before it."""
        manifest = self._readers[0].manifest
        types = {name: kind.to_pandas_dtype() for name, kind in event_types(manifest.extra).items()}
        pieces: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in types.items()}
        lengths, events = np.zeros(len(users), np.int64), np.zeros(len(users), np.int64)
        attributes = {name: np.zeros(len(users), np.int32) for name in manifest.user_features}
        for number, user in enumerate(users):
            for row in self._rows(user):
                times = row.timestamp_ms[row.train_start :]
                begin = row.train_start + max(int(np.searchsorted(times, since_ms[number])) - history, 0)
                for name, values in pieces.items():
                    values.append(_column(row, name)[begin:])
                lengths[number] += len(row) - begin
                events[number] += len(times)
                for name, ids in attributes.items():
                    ids[number] = row.features[name] or ids[number]
        user_K = np.repeat(np.arange(len(users)), lengths)
        return Known(user_K, {name: np.concatenate(values) for name, values in pieces.items()}, events, attributes)

    def sizes(self, users: Sequence[str], history: int) -> NDArray[np.int64]:
        """(U,) about how many events `read` gives of each user."""
        sizes = np.zeros(len(users), np.int64)
        for number, user in enumerate(users):
            for version, row in self._found(user):
                record = self._readers[version].table.users[row]
                sizes[number] += min(int(record["length"] - record["train_start"]), history)
        return sizes

    def _rows(self, user: str) -> Iterator[UserSequence]:
        """What the versions hold of a user, oldest version first."""
        for version, number in self._found(user):
            row = self._readers[version].user(number)
            if row.user == user:  # and not another one of the same hash
                yield row

    def _found(self, user: str) -> list[tuple[int, int]]:
        key, ids = user_id(user), self._places["id"]
        found = self._places[np.searchsorted(ids, key) : np.searchsorted(ids, key, side="right")]
        return list(zip(found["version"].tolist(), found["row"].tolist(), strict=True))


def _column(row: UserSequence, name: str) -> np.ndarray:
    extra = {extra_column(key): values for key, values in row.extra.items()}
    values: np.ndarray = extra[name] if name in extra else getattr(row, name)
    return values


def insert(con: duckdb.DuckDBPyConnection, table: str, chunk: pa.Table, query: str = "FROM chunk") -> None:
    """Add rows to a table: those of `chunk`, or what `query` makes of them."""
    con.register("chunk", chunk)
    con.execute(f"INSERT INTO {table} {query}")
    con.unregister("chunk")
