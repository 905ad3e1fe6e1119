"""Raw logs to prepared shards: read and check, sort on disk, clean, split, write; in bounded memory.

Memory grows with the number of items and with the longest user, never with the number of events: DuckDB sorts within
`memory_limit_mb` and spills beside the result, and events pass through in blocks of whole users. The result depends on
the contents of the log alone, not on the order of its rows, its files, or the number of threads.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np

from onetrain.data.catalogue import build_catalogue, catalogue_fingerprint, hash_items, write_items
from onetrain.data.contents import ContentsWriter
from onetrain.data.errors import DataError
from onetrain.data.fingerprint import json_fingerprint
from onetrain.data.manifest import Manifest
from onetrain.data.options import DataOptions
from onetrain.data.readers import Source, open_source
from onetrain.data.report import Report
from onetrain.data.shard_writer import UserBlock
from onetrain.data.split import Split, append_timestamps, check_split, decide_split, needs_time_points
from onetrain.data.staging import stage_log
from onetrain.data.store import local_folder
from onetrain.data.user_events import index_names, sort_log, stream_users
from onetrain.data.user_file import index_users
from onetrain.data.workspace import Workspace, check_space, workspace

Progress = Callable[[str, int, int | None], None]
CONTENT_FORMAT = 1  # of what the fingerprint covers: the same contents keep it, and with it their order in training
MB_PER_THREAD = 128  # less than this, and DuckDB's sort runs out of memory


def prepare(options: DataOptions, progress: Progress | None = None) -> Manifest:
    """Prepare the log of `options.source` into the folder `options.prepared`, replacing an earlier result at the end.

    `progress(stage, done, total)` is called at the start and end of "read", "items" and "sort", and after every block
    of "split" (finding time points) and "write" (events); total None = unknown.
    Raises DataError for anything wrong with options, files, columns, rows, memory or disk; the folder stays as it was.
    """
    progress = progress or (lambda stage, done, total: None)
    prepared = check_options(options)
    with workspace(prepared) as work, connect(work, options) as con:
        source = open_source(con, options.source)
        _check_apart(prepared, source)
        check_space(prepared.parent, source.n_bytes)
        manifest = _prepare_into(work, con, source, options, progress)
        manifest.save(work.result)
    return manifest


def _prepare_into(
    work: Workspace, con: duckdb.DuckDBPyConnection, source: Source, options: DataOptions, progress: Progress
) -> Manifest:
    report, extra = Report(), options.source.extra
    progress("read", 0, None)
    stage_log(con, source, options, report)
    progress("read", report.rows_read, report.rows_read)
    progress("items", 0, None)
    items, item_names = build_catalogue(con, source, options, report)
    user_names = index_users(con, source, options, report)
    progress("items", items.num_rows, items.num_rows)
    behaviours, scenarios = index_names(con, "behaviour"), index_names(con, "scenario")
    n_rows = report.rows_read - report.bad_rows_dropped
    progress("sort", 0, n_rows)
    sort_log(con, extra, tuple(user_names))
    progress("sort", n_rows, n_rows)
    split = _decide_split(work, con, options, n_rows, progress)

    writer = ContentsWriter(work.result, extra, options.shard_events, tuple(user_names), items.num_rows)
    try:
        for events in stream_users(con, options, report):
            valid_start, test_start = split.starts(events.lengths, events.columns["timestamp_ms"])
            train_start = np.zeros_like(events.lengths)
            bounds = (train_start, valid_start, test_start)
            writer.append(UserBlock(events.users, events.lengths, *bounds, events.columns, events.attributes))
            progress("write", writer.events, n_rows)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    if not writer.events:
        raise DataError(
            f"No events are left: all {report.users_dropped} users have fewer than data.min_user_events = "
            f"{options.min_user_events} events. Lower it."
        )
    hash_items(writer.content, items, writer.train_count)
    contents = {
        "format": CONTENT_FORMAT,
        "columns": writer.content.digests(),
        "behaviours": behaviours,
        "scenarios": scenarios,
        "split": dataclasses.asdict(split),
    }
    if item_names or user_names:
        contents |= {"item_features": item_names, "user_features": user_names}
    return Manifest(
        items=write_items(work.result, items, writer.train_count),
        behaviours=behaviours,
        scenarios=scenarios,
        extra=extra,
        item_features=item_names,
        user_features=user_names,
        split=dataclasses.asdict(split),
        catalogue_fingerprint=catalogue_fingerprint(items),
        fingerprint=json_fingerprint(contents),
        report=dataclasses.asdict(report),
        **writer.totals(),
    )


def _decide_split(
    work: Workspace, con: duckdb.DuckDBPyConnection, options: DataOptions, n_rows: int, progress: Progress
) -> Split:
    """The split; time points that are not given cost one more pass over the sorted events."""
    if not needs_time_points(options.split):
        return decide_split(options.split, None)
    path, done = work.scratch / "timestamps.u64", 0
    path.touch()
    for events in stream_users(con, options, Report()):
        append_timestamps(path, events.columns["timestamp_ms"])
        done += int(events.lengths.sum())
        progress("split", done, n_rows)
    return decide_split(options.split, path if done else None)


def connect(work: Workspace, options: DataOptions) -> duckdb.DuckDBPyConnection:
    """A database on disk, within the memory limit, that neither prints nor fetches anything from a network."""
    threads = max(1, min(os.cpu_count() or 1, options.memory_limit_mb // MB_PER_THREAD))
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{options.memory_limit_mb}MiB",
        "threads": threads,
        "temp_directory": str(work.scratch / "spill"),
        "autoinstall_known_extensions": False,
    }
    con = duckdb.connect(str(work.scratch / "work.duckdb"), config=config)
    con.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
    return con


def check_options(options: DataOptions) -> Path:
    """The folder data.prepared. Raises DataError for options that cannot be."""
    if not options.prepared:
        raise DataError("data.prepared is empty. Name the folder that the shards are written into.")
    for name, least in (("min_user_events", 1), ("shard_events", 1), ("append_history", 0), ("memory_limit_mb", 64)):
        if getattr(options, name) < least:
            raise DataError(f"data.{name} is {getattr(options, name)}, the least is {least}.")
    if len(set(options.source.extra)) != len(options.source.extra):
        raise DataError(f"data.source.extra names a column twice: {', '.join(options.source.extra)}.")
    check_split(options.split)
    return local_folder(options.prepared).absolute()


def _check_apart(prepared: Path, source: Source) -> None:
    """The old result is removed at the end: the log must not lie in it."""
    for file in source.files:
        if "://" not in file and Path(file).is_relative_to(prepared):
            raise DataError(f"data.source: {file} lies in data.prepared, which is replaced. Move the log elsewhere.")
