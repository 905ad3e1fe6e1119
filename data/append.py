"""New logs to a new version of a prepared folder: `onetrain append`.

A version lies in <prepared>/versions/00001, 00002 ... and holds a row per user with new events: the newest events known
of the user as context (before train_start), then the new ones, all of which train. Items, semantic ids and vocabularies
stay those of the folder. Memory is bounded as in data/prepare.py.

Legend: E events of a block, user after user, oldest first.
"""

import dataclasses
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from onetrain.data.contents import ContentsWriter
from onetrain.data.errors import DataError
from onetrain.data.fingerprint import json_fingerprint
from onetrain.data.known_users import Known, KnownUsers, insert
from onetrain.data.manifest import Manifest
from onetrain.data.options import DataOptions
from onetrain.data.prepare import Progress, check_options, connect
from onetrain.data.readers import open_source
from onetrain.data.report import Report
from onetrain.data.schema import BOUNDS, nearest
from onetrain.data.shard_writer import BATCH_EVENTS, UserBlock
from onetrain.data.shards import ShardReader, read_items
from onetrain.data.staging import stage_log
from onetrain.data.store import LocalStore
from onetrain.data.user_events import Events, sort_log, stream_users
from onetrain.data.user_file import index_known_users
from onetrain.data.versions import FOLDER, newest_version, open_version, version_folder
from onetrain.data.workspace import Workspace, check_space, workspace

CONTENT_FORMAT = 1  # of what the fingerprint covers
LOCK = ".append.lock"


@dataclass(frozen=True)
class Appended:
    """What an append did. version, manifest: None when the log held nothing new, so that no version was made."""

    version: int | None
    manifest: Manifest | None
    report: Report


def append(options: DataOptions, progress: Progress | None = None) -> Appended:
    """Prepare the log of `options.source` into a new version of the folder `options.prepared`.

    An event of a user, item, time and behaviour that the folder has already is left out, so that the same log may be
    given again; events of items that the folder lacks are left out too. Both are counted.
    Raises DataError for what `prepare` raises it for, and for names that the folder does not have. A version is there
    as a whole or not at all.
    """
    progress = progress or (lambda stage, done, total: None)
    store = LocalStore(check_options(options))
    readers = [ShardReader(store, Manifest.load(store.folder))]
    _check_like(options, readers[0].manifest)
    with _alone(store.folder):
        for version in range(1, newest_version(store.name) + 1):
            readers.append(ShardReader(store.of_version(version), open_version(store, version)))
        new, report = len(readers), Report()
        try:
            with workspace(store.folder / version_folder(new)) as work, connect(work, options) as con:
                manifest = _append_into(work, con, readers, options, report, progress)
                manifest.save(work.result)
        except _NothingNewError:
            return Appended(None, None, report)
    return Appended(new, manifest, report)


class _NothingNewError(Exception):
    """Ends the work without a result."""


def _append_into(
    work: Workspace,
    con: duckdb.DuckDBPyConnection,
    readers: list[ShardReader],
    options: DataOptions,
    report: Report,
    progress: Progress,
) -> Manifest:
    folder, parent = readers[0].manifest, readers[-1].manifest
    prepared = Path(readers[0].store.name)
    source = open_source(con, dataclasses.replace(options.source, items=None, item_columns={}, item_features={}))
    check_space(prepared, source.n_bytes)
    progress("read", 0, None)
    stage_log(con, source, options, report)
    progress("read", report.rows_read, report.rows_read)
    _index_items(con, prepared, report)
    for column, names in (("behaviour", folder.behaviours), ("scenario", folder.scenarios)):
        _index_names(con, column, names)
    index_known_users(con, source, options, report, folder.user_features)
    n_rows = report.rows_read - report.bad_rows_dropped - report.unknown_items
    progress("sort", 0, n_rows)
    sort_log(con, folder.extra, tuple(folder.user_features))
    known_users = KnownUsers(con, readers, work.scratch)
    progress("sort", n_rows, n_rows)

    writer = ContentsWriter(
        work.result, folder.extra, options.shard_events, tuple(folder.user_features), folder.items.rows, BOUNDS
    )
    done = 0
    try:
        # known events count for min_user_events too (_new_rows); attributes may be known without a file
        every = dataclasses.replace(options.source, user_features={name: name for name in folder.user_features})
        cleaning = dataclasses.replace(options, source=every, min_user_events=1)
        for events in stream_users(con, cleaning, report):
            for part in _parts(events, known_users.sizes(events.users.to_pylist(), options.append_history)):
                for block in _new_rows(part, known_users, options, report):
                    writer.append(block)
                done += int(part.lengths.sum())
                progress("write", done, n_rows)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    if not writer.events:
        raise _NothingNewError
    own = json_fingerprint({"format": CONTENT_FORMAT, "columns": writer.content.digests()})
    return Manifest(
        items=dataclasses.replace(folder.items, file=f"../../{folder.items.file}"),
        behaviours=folder.behaviours,
        scenarios=folder.scenarios,
        extra=folder.extra,
        item_features=folder.item_features,
        user_features=folder.user_features,
        split={"kind": "append", "valid_from": None, "test_from": None},
        catalogue_fingerprint=folder.catalogue_fingerprint,
        fingerprint=json_fingerprint([parent.fingerprint, own]),
        parent=parent.fingerprint,
        append_history=options.append_history,
        report=dataclasses.asdict(report),
        **writer.totals(),
    )


def _parts(events: Events, known: NDArray[np.int64]) -> Iterator[Events]:
    """The same users in parts that, with what is known of them, have about BATCH_EVENTS events, or one longer user."""
    part = np.cumsum(known + events.lengths) // BATCH_EVENTS
    ends = np.cumsum(events.lengths)
    for number in np.unique(part).tolist():
        users = np.flatnonzero(part == number)
        first, last = int(users[0]), int(users[-1]) + 1
        chosen = slice(int(ends[first] - events.lengths[first]), int(ends[last - 1]))
        yield Events(
            events.users.slice(first, last - first),
            events.lengths[first:last],
            {name: values[chosen] for name, values in events.columns.items()},
            {name: ids[first:last] for name, ids in events.attributes.items()},
        )


def _new_rows(events: Events, known_users: KnownUsers, options: DataOptions, report: Report) -> Iterator[UserBlock]:
    """Rows for the new among these events: a user's run of them, with the newest events before it.

    A user has one run, unless new events lie between known ones: an event that came late has its own row, so that no
    known event trains again.
    """
    times = events.columns["timestamp_ms"]
    since = np.minimum.reduceat(times, np.cumsum(events.lengths) - events.lengths)
    known = known_users.read(events.users.to_pylist(), since, options.append_history)
    merged = _merge(events, known)
    repeated = merged.is_new & _known_before(merged)
    report.known_events += int(repeated.sum())
    merged = merged[~repeated]
    new = np.bincount(merged.user_E[merged.is_new], minlength=len(events.lengths))
    short = (new > 0) & (known.events + new < options.min_user_events)
    report.users_dropped += int(short.sum())
    report.events_dropped += int(new[short].sum())
    merged = merged[~short[merged.user_E]]
    report.new_users += int(((new > 0) & ~short & (known.events == 0)).sum())
    report.late_events += _late(merged, len(events.lengths))

    first_R, stop_R = _runs(merged)
    user_R = merged.user_E[first_R]
    begin_R = np.maximum(first_R - options.append_history, np.searchsorted(merged.user_E, user_R))
    length_R = stop_R - begin_R
    attributes = {
        name: np.where(ids > 0, ids, known.attributes[name]).astype(np.int32) for name, ids in events.attributes.items()
    }
    part_R = np.cumsum(length_R) // BATCH_EVENTS
    for number in np.unique(part_R).tolist():
        here = np.flatnonzero(part_R == number)
        length, ends = length_R[here], np.cumsum(length_R[here])
        place_E = np.arange(int(ends[-1])) - np.repeat(ends - length - begin_R[here], length)
        yield UserBlock(
            events.users.take(pa.array(user_R[here])),
            length,
            first_R[here] - begin_R[here],
            length,
            length,
            {name: values[place_E] for name, values in merged.columns.items()},
            {name: ids[user_R[here]] for name, ids in attributes.items()},
        )


@dataclass(frozen=True)
class _Merged:
    """Known and new events: user after user, by time, known before new where times are equal."""

    user_E: NDArray[np.int64]
    is_new: NDArray[np.bool_]
    columns: dict[str, np.ndarray]

    def __getitem__(self, keep: NDArray[Any]) -> "_Merged":
        """Some of the events, by a mask or their places."""
        columns = {name: values[keep] for name, values in self.columns.items()}
        return _Merged(self.user_E[keep], self.is_new[keep], columns)


def _merge(events: Events, known: Known) -> _Merged:
    user_E = np.concatenate([known.user_K, events.user_number])
    is_new = np.arange(len(user_E)) >= len(known.user_K)
    columns = {name: np.concatenate([values, events.columns[name]]) for name, values in known.columns.items()}
    merged = _Merged(user_E, is_new, columns)
    return merged[np.lexsort((is_new, columns["timestamp_ms"], user_E))]  # stable


def _known_before(merged: _Merged) -> NDArray[np.bool_]:
    """Events whose (user, item, timestamp, behaviour) a known event has."""
    keys = [merged.columns[name] for name in ("behaviour", "item", "timestamp_ms")] + [merged.user_E]
    order = np.lexsort(keys)  # stable: of equal ones the known come first
    opens = np.ones(len(order), bool)
    opens[1:] = np.logical_or.reduce([np.diff(key[order]) != 0 for key in keys])
    first = order[np.maximum.accumulate(np.where(opens, np.arange(len(order)), 0))]
    found = np.zeros(len(order), bool)
    found[order] = ~merged.is_new[first]
    return found


def _late(merged: _Merged, users: int) -> int:
    """New events that are older than the newest known one of their user."""
    newest = np.full(users, np.iinfo(np.int64).min)
    times, known = merged.columns["timestamp_ms"], ~merged.is_new
    np.maximum.at(newest, merged.user_E[known], times[known])
    return int((merged.is_new & (times < newest[merged.user_E])).sum())


def _runs(merged: _Merged) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Begin and end of every run of new events of one user."""
    run_E = np.where(merged.is_new, merged.user_E, -1)
    changes = np.flatnonzero(np.diff(run_E, prepend=-2, append=-2))
    first, stop = changes[:-1], changes[1:]
    new = merged.is_new[first]
    return first[new], stop[new]


def _index_items(con: duckdb.DuckDBPyConnection, prepared: Path, report: Report) -> None:
    """Create table `item_index` of the folder's items; count the rows of others, which sorting leaves out."""
    con.execute('CREATE TABLE item_index (item VARCHAR, "index" BIGINT)')
    start = 0
    for batch in read_items(prepared).select(["item"]).to_batches():
        places = np.arange(start, start + batch.num_rows)
        insert(con, "item_index", pa.table({"item": batch["item"], "index": places}))
        start += batch.num_rows
    query = "SELECT count(*), arg_min(item, rowid) FROM log ANTI JOIN item_index USING (item) WHERE bad_column IS NULL"
    ((report.unknown_items, example),) = con.execute(query).fetchall()
    if report.unknown_items and report.unknown_items == report.rows_read - report.bad_rows_dropped:
        raise DataError(
            f"data.source.events: no item of the log is among the {start} items of {prepared}, such as {example!r}. Is "
            "this the log that belongs to it? New items need `onetrain prepare` and `onetrain tokenize`."
        )


def _index_names(con: duckdb.DuckDBPyConnection, column: str, names: tuple[str, ...]) -> None:
    """Create table `<column>_index` of the folder's names. DataError for one that the folder lacks."""
    con.execute(f'CREATE TABLE {column}_index (name VARCHAR, "index" BIGINT)')
    insert(con, f"{column}_index", pa.table({"name": pa.array(names), "index": np.arange(len(names))}))
    query = f"""SELECT DISTINCT {column} FROM log ANTI JOIN {column}_index ON {column} = name
        WHERE bad_column IS NULL ORDER BY 1 LIMIT 5"""
    unknown = [name for (name,) in con.execute(query).fetchall()]
    if unknown:
        raise DataError(
            f"data.source.events: the log has {column} {', '.join(map(repr, unknown))}, the folder knows "
            f"{', '.join(names)}.{nearest(unknown[0], names)} Correct data.source, or prepare the whole log anew."
        )


def _check_like(options: DataOptions, folder: Manifest) -> None:
    """Raises DataError for columns that are not those of the folder."""
    if options.source.extra != folder.extra:
        raise DataError(
            f"data.source.extra is {', '.join(options.source.extra) or 'empty'}; the folder {options.prepared} was "
            f"prepared with {', '.join(folder.extra) or 'none'}. Use the same."
        )
    named = set(options.source.user_features)
    if named and named != set(folder.user_features):
        raise DataError(
            f"data.source.user_features names {', '.join(sorted(named))}; the folder {options.prepared} was prepared "
            f"with {', '.join(sorted(folder.user_features)) or 'none'}. Use the same."
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other append works on the folder. Removes what a killed one left behind."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another `onetrain append` is at work in {folder}. Wait until it has finished.") from None
        for left in (folder / FOLDER).glob(".*.preparing-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
