"""Finds the users of new events in the versions of a folder, and reads what is known of them.

Legend: U users of a block, P places of them in versions, K their known events, one version after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from onetrain.data.event_rows import ramp
from onetrain.data.schema import event_types, user_column
from onetrain.data.shards import ShardReader
from onetrain.data.sidecar import append, mapped
from onetrain.data.user_table import user_id

Ids = NDArray[np.int64]
_CHUNK = 1 << 20
_PLACE = np.dtype([("id", "<i8"), ("version", "<i8"), ("row", "<i8")])


@dataclass(frozen=True)
class Known:
    """Known events of the users of a block, each once: columns of (K,), and of each user (U,)."""

    user_K: NDArray[np.int64]  # number within the block
    columns: dict[str, np.ndarray]
    events: Ids  # (U,) how many are known, of which the newest are here
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
            reader.check_users()
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

    def read(self, users: Sequence[str], since_ms: Ids, history: int) -> Known:
        """Of each user every event from `since_ms` on, and at least the newest `history` ones before it."""
        manifest, match = self._readers[0].manifest, self._match(users)
        numbers: list[Ids] = []
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in event_types(manifest.extra)}
        events = np.zeros(len(users), np.int64)
        attributes = {name: np.zeros(len(users), np.int32) for name in manifest.user_features}
        for version in np.unique(match.version_P).tolist():
            reader, here = self._readers[version], np.flatnonzero(match.version_P == version)
            places, number_P, row_P = reader.locate(match.row_P[here]), match.user_P[here], match.row_P[here]
            start_P, stop_P = (places.users[name].astype(np.int64) for name in ("train_start", "length"))
            times = reader.pieces("timestamp_ms", places, start_P, stop_P)
            since = since_ms[number_P].tolist()
            before_P = np.array([np.searchsorted(piece, ms) for piece, ms in zip(times, since, strict=True)])
            same_P = np.array(
                [reader.name(r) == users[n] for r, n in zip(row_P.tolist(), number_P.tolist(), strict=True)]
            )
            begin_P = np.where(
                same_P, start_P + np.maximum(before_P - history, 0), stop_P
            )  # else only of the same hash
            for name, values in pieces.items():
                values += reader.pieces(name, places, begin_P, stop_P)
            numbers.append(np.repeat(number_P, stop_P - begin_P))
            np.add.at(events, number_P, np.where(same_P, stop_P - start_P, 0))
            for name, ids in attributes.items():
                found_P = places.users[user_column(name)]
                known = same_P & (found_P > 0)
                ids[number_P[known]] = found_P[known]
        columns = {
            name: np.concatenate([np.empty(0, kind.to_pandas_dtype()), *pieces[name]])
            for name, kind in event_types(manifest.extra).items()
        }
        return Known(np.concatenate([np.empty(0, np.int64), *numbers]), columns, events, attributes)

    def sizes(self, users: Sequence[str], history: int) -> Ids:
        """(U,) about how many events `read` gives of each user."""
        sizes, match = np.zeros(len(users), np.int64), self._match(users)
        for version in np.unique(match.version_P).tolist():
            here = np.flatnonzero(match.version_P == version)
            records = self._readers[version].table.users[match.row_P[here]]
            own = np.minimum(records["length"] - records["train_start"], history)
            np.add.at(sizes, match.user_P[here], own)
        return sizes

    def _match(self, users: Sequence[str]) -> "_Match":
        ids = np.array([user_id(user) for user in users], np.int64)
        first = np.searchsorted(self._places["id"], ids)
        count = np.searchsorted(self._places["id"], ids, side="right") - first
        found = self._places[ramp(count) + np.repeat(first, count)]
        return _Match(np.repeat(np.arange(len(users)), count), found["version"], found["row"])


class _Match(NamedTuple):
    """Places P of users, by user, version and row."""

    user_P: Ids
    version_P: Ids
    row_P: Ids


def insert(con: duckdb.DuckDBPyConnection, table: str, chunk: pa.Table, query: str = "FROM chunk") -> None:
    """Add rows to a table: those of `chunk`, or what `query` makes of them."""
    con.register("chunk", chunk)
    con.execute(f"INSERT INTO {table} {query}")
    con.unregister("chunk")
