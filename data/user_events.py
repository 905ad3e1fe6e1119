"""Sorts the staged log by user and time on disk, and streams it as cleaned blocks of whole users."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onetrain.data.catalogue import id_order
from onetrain.data.errors import DataError
from onetrain.data.options import DataOptions
from onetrain.data.readers.files import quoted
from onetrain.data.report import Report
from onetrain.data.schema import UNKNOWN_MS, event_types, extra_column, user_column

BATCH_ROWS = 65_536
MAX_NAMES = 32_767  # behaviours or scenarios: indices are int16


@dataclass(frozen=True)
class Events:
    """Events of whole users, user after user: ids, events of each, and the columns of all."""

    users: pa.StringArray
    lengths: np.ndarray  # int64
    columns: dict[str, np.ndarray]
    attributes: dict[str, np.ndarray] = field(default_factory=dict)  # ids of each user

    @property
    def user_number(self) -> np.ndarray:
        """For every event, the number of its user within the block."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def index_names(con: duckdb.DuckDBPyConnection, column: str) -> tuple[str, ...]:
    """Create table `<column>_index` (name, index) of the log's behaviours or scenarios; returns the sorted names."""
    query = f"SELECT DISTINCT {column} FROM log WHERE bad_column IS NULL ORDER BY {column} LIMIT {MAX_NAMES + 1}"
    names = tuple(name for (name,) in con.execute(query).fetchall())
    if len(names) > MAX_NAMES:
        raise DataError(f"The log has more than {MAX_NAMES} {column}s, such as {names[0]!r}. Is that the right column?")
    con.execute(
        f'CREATE TABLE {column}_index AS SELECT {column} AS name, row_number() OVER (ORDER BY {column}) - 1 AS "index" '
        f"FROM (SELECT DISTINCT {column} FROM log WHERE bad_column IS NULL)"
    )
    return names


def sort_log(con: duckdb.DuckDBPyConnection, extra: tuple[str, ...], user_features: tuple[str, ...] = ()) -> None:
    """Turn table `log` into table `sorted`, in the total order of users and events; spills to disk.

    Order: user, timestamp, order, item, behaviour, scenario, watch, duration, extra features. Rows that are equal in
    all of these are interchangeable. Attributes of the user, from table `user_index`, stand beside each event.
    """
    extra_columns = [quoted(extra_column(name)) for name in extra]
    known = ", ".join(
        f"CASE WHEN {name} >= 0 THEN {name} ELSE {UNKNOWN_MS} END AS {name}" for name in ("watch_ms", "duration_ms")
    )
    columns = "".join(f", {name}" for name in extra_columns)
    attributes = [quoted(user_column(name)) for name in user_features]
    of_user = "".join(f", coalesce(u.{name}, 0) AS {name}" for name in attributes)
    con.execute("CREATE VIEW good AS SELECT *, rowid AS position FROM log WHERE bad_column IS NULL")
    con.execute(
        f"""CREATE TABLE sorted AS
        SELECT "user", i."index" AS item, timestamp_ms, b."index" AS behaviour, s."index" AS scenario, {known}{columns},
            position{of_user}
        FROM good JOIN item_index i ON good.item = i.item JOIN behaviour_index b ON good.behaviour = b.name
            JOIN scenario_index s ON good.scenario = s.name
            {'LEFT JOIN user_index u ON good."user" = u.id' if attributes else ""}
        ORDER BY {id_order(con, "good", '"user"')}, timestamp_ms, "order", i."index", b."index", s."index",
            watch_ms, duration_ms{columns}"""
    )
    con.execute("DROP VIEW good; DROP TABLE log")


def stream_users(con: duckdb.DuckDBPyConnection, options: DataOptions, report: Report) -> Iterator[Events]:
    """Blocks of whole users of table `sorted`, without duplicates and short users; counts go into the report.

    A block holds about BATCH_ROWS events, or one longer user.
    """
    for events in _whole_users(con, options.source.extra, tuple(options.source.user_features)):
        report.unsorted += _count_unsorted(events)
        repeated = _repeated(events)
        report.duplicates += int(repeated.sum())
        if options.duplicates == "drop":
            report.duplicates_dropped += int(repeated.sum())
            events = _kept(events, ~repeated)
        report.ties += int(_same_moment(events).sum())
        long_enough = events.lengths >= options.min_user_events
        report.users_dropped += int((~long_enough).sum())
        report.events_dropped += int(events.lengths[~long_enough].sum())
        if not long_enough.all():
            kept = _kept(events, np.repeat(long_enough, events.lengths))
            users = kept.users.filter(pa.array(long_enough))
            attributes = {name: ids[long_enough] for name, ids in kept.attributes.items()}
            events = Events(users, kept.lengths[long_enough], kept.columns, attributes)
        if len(events.lengths):
            yield events


def _whole_users(
    con: duckdb.DuckDBPyConnection, extra: tuple[str, ...], user_features: tuple[str, ...]
) -> Iterator[Events]:
    started: list[pa.RecordBatch] = []  # rows of a user whose last row is still to come
    for batch in con.sql("FROM sorted").to_arrow_reader(BATCH_ROWS):
        users = batch["user"]
        if started and users[0] != started[0]["user"][0]:
            yield _events(started, extra, user_features)
            started = []
        last = batch.num_rows - 1
        first_of_last = int(pc.index(users, users[last]).as_py())
        if first_of_last == 0:
            started.append(batch)
        else:
            yield _events([*started, batch.slice(0, first_of_last)], extra, user_features)
            started = [batch.slice(first_of_last)]
    if started:
        yield _events(started, extra, user_features)


def _events(batches: list[pa.RecordBatch], extra: tuple[str, ...], user_features: tuple[str, ...]) -> Events:
    table = pa.Table.from_batches(batches).combine_chunks()
    users = table["user"].combine_chunks()
    changes = np.flatnonzero(pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)) + 1
    first = np.concatenate([[0], changes])
    lengths = np.diff(np.append(first, table.num_rows))
    columns = {
        name: table[name].to_numpy().astype(kind.to_pandas_dtype(), copy=False)
        for name, kind in event_types(extra).items()
    }
    for name in map(extra_column, extra):
        # one zero and one NaN: values that compare equal, or are both unknown, get equal bytes
        columns[name] = np.where(np.isnan(columns[name]), np.float32(np.nan), columns[name] + np.float32(0))
    columns["position"] = table["position"].to_numpy()
    attributes = {name: table[user_column(name)].to_numpy()[first].astype(np.int32) for name in user_features}
    return Events(users.take(pa.array(first)).cast(pa.string()), lengths, columns, attributes)


def _count_unsorted(events: Events) -> int:
    """Rows with a lower timestamp than the row before of the same user, in the order of the files."""
    user = events.user_number
    by_position = np.lexsort((events.columns["position"], user))
    earlier = np.diff(events.columns["timestamp_ms"][by_position]) < 0
    return int((earlier & (np.diff(user) == 0)).sum())


def _same_moment(events: Events) -> np.ndarray:
    """Events with the timestamp of the event before of the same user."""
    user, time = events.user_number, events.columns["timestamp_ms"]
    return np.concatenate([[False], (np.diff(user) == 0) & (np.diff(time) == 0)])


def _repeated(events: Events) -> np.ndarray:
    """Events whose (user, item, timestamp, behaviour) an earlier event has."""
    same = _same_moment(events)
    repeated = np.zeros(len(same), bool)
    tied = np.flatnonzero(same | np.append(same[1:], False))  # only these can be repeats
    keys = [events.columns[name][tied] for name in ("behaviour", "item", "timestamp_ms")] + [events.user_number[tied]]
    order = np.lexsort(keys)  # stable: the first in the total order stays first
    equal = np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys])
    repeated[tied[order[1:][equal]]] = True
    return repeated


def _kept(events: Events, keep: np.ndarray) -> Events:
    """The events where `keep` is true; users keep their place, with fewer events."""
    if keep.all():
        return events
    lengths = np.bincount(events.user_number[keep], minlength=len(events.lengths))
    return Events(
        events.users, lengths, {name: values[keep] for name, values in events.columns.items()}, events.attributes
    )
