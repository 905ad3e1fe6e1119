"""Reader of KuaiRand (Gao et al., CIKM 2022): short-video exposures with many kinds of feedback.

Reads the original CSV files (log_*.csv) and Parquet files of the same columns.
"""

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.options import SourceOptions
from onetrain.data.readers.attributes import item_attributes, open_users, users_query
from onetrain.data.readers.files import FILE, find_files, open_table, quoted
from onetrain.data.readers.source import Source
from onetrain.data.schema import extra_column

# The strongest feedback of an exposure is its behaviour. Hate comes first, so that a rejected video never counts as
# liked; then from the rarest and most deliberate to the most common.
PRIORITY = {
    "hate": "is_hate",
    "follow": "is_follow",
    "forward": "is_forward",
    "comment": "is_comment",
    "like": "is_like",
    "profile_enter": "is_profile_enter",
    "long_view": "long_view",
    "click": "is_click",
}
NO_FEEDBACK = "view"
NAMES = {
    "user": "user_id",
    "item": "video_id",
    "timestamp": "time_ms",
    "scenario": "tab",
    "watch_ms": "play_time_ms",
    "duration_ms": "duration_ms",
}


def read(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Source:
    """Open exposures as events, one per row; behaviour = strongest feedback (PRIORITY), scenario = tab.

    Of a folder, the files log_* are read, except log_random_* (random exposures; name them by a glob to read them).
    The item file is video_features_basic_*.csv or a Parquet file with video_id and tag; the tags are its categories.
    The user file has user_id.
    Raises DataError for missing files and columns.
    """
    files = find_files(options.events, "data.source.events")
    if len(files) > 1:
        bases = {name: name.rsplit("/", 1)[-1] for name in files}
        logs = [name for name, base in bases.items() if base.startswith("log_")]
        files = [name for name in logs if not bases[name].startswith("log_random_")] or logs
        if not files:
            raise DataError(f"data.source.events: no file named log_* among those of {options.events!r}.")
    table = open_table(con, files, "data.source.events")
    setting = "data.source.events"
    columns = [f"{table.require(name, setting)} AS {quoted(key)}" for key, name in NAMES.items()]
    branches = " ".join(
        f"WHEN TRY_CAST({table.require(column, setting)} AS DOUBLE) > 0 THEN '{behaviour}'"
        for behaviour, column in PRIORITY.items()
    )
    columns.append(f"CASE {branches} ELSE '{NO_FEEDBACK}' END AS behaviour")
    columns += [f"{table.require(name, 'data.source.extra')} AS {quoted(extra_column(name))}" for name in options.extra]
    items, item_files, n_bytes = None, [], table.n_bytes
    if options.items:
        item_files = find_files(options.items, "data.source.items")
        item_table = open_table(con, item_files, "data.source.items")
        tag = item_table.require("tag", "data.source.items")
        item_columns = [
            f"{item_table.text('video_id', 'data.source.items')} AS id",
            f"string_split(CAST({tag} AS VARCHAR), ',') AS categories",
            *item_attributes(item_table, options),
        ]
        items = f"SELECT {', '.join(item_columns)} FROM {item_table.relation}"
        n_bytes += item_table.n_bytes
    users = open_users(con, options)
    names = NAMES | {extra_column(name): name for name in options.extra}
    return Source(
        events=f"SELECT {', '.join(columns)}, {FILE} AS file FROM {table.relation}",
        names=names,
        timestamp_unit="ms",
        files=(*files, *item_files, *(users.files if users else ())),
        n_bytes=n_bytes + (users.n_bytes if users else 0),
        items=items,
        users=users_query(users, options),
    )
