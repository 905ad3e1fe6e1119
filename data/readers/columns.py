"""Reader of any Parquet or delimited text log, by the column names of source.columns and source.item_columns."""

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.options import SourceOptions
from onetrain.data.readers.attributes import item_attributes, open_users, users_query
from onetrain.data.readers.files import FILE, Table, find_files, open_table, quoted
from onetrain.data.readers.source import Source
from onetrain.data.schema import (
    EVENT_COLUMNS,
    ITEM_COLUMNS,
    REQUIRED_EVENT_COLUMNS,
    extra_column,
    nearest,
)

CATEGORY_DELIMITER = "|"  # between the categories of one item, where they are text


def read(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Source:
    """Open a log whose columns have canonical names, or the names that source.columns gives them.

    Columns of the item file that hold categories may be lists or text with `|` between; embeddings lists of numbers.
    Raises DataError for missing files and columns.
    """
    item_files = find_files(options.items, "data.source.items") if options.items else []
    users = open_users(con, options, "id")
    others = {*item_files, *(users.files if users else ())}
    event_files = [name for name in find_files(options.events, "data.source.events") if name not in others]
    if not event_files:
        raise DataError("data.source.events names only the item or user file. Give the files of the log.")
    events = open_table(con, event_files, "data.source.events")
    items = open_table(con, item_files, "data.source.items") if item_files else None
    names = _matched(
        events, options.columns, EVENT_COLUMNS, REQUIRED_EVENT_COLUMNS, "data.source.columns", options.extra
    )
    columns = [f"{events.require(name, 'data.source.columns')} AS {quoted(key)}" for key, name in names.items()]
    for name in options.extra:
        column = options.columns.get(name, name)
        names[extra_column(name)] = column
        columns.append(f"{events.require(column, 'data.source.extra')} AS {quoted(extra_column(name))}")
    return Source(
        events=f"SELECT {', '.join(columns)}, {FILE} AS file FROM {events.relation}",
        names=names,
        timestamp_unit=options.timestamp_unit,
        files=(*event_files, *item_files, *(users.files if users else ())),
        n_bytes=sum(table.n_bytes for table in (events, items, users) if table),
        items=_items_query(items, options) if items else None,
        users=users_query(users, options, "id"),
    )


def _items_query(table: Table, options: SourceOptions) -> str:
    setting = "data.source.item_columns"
    names = _matched(table, options.item_columns, ITEM_COLUMNS, ("id",), setting)
    columns = [f"{table.text(names['id'], f'{setting}.id')} AS id", *item_attributes(table, options)]
    if "text" in names:
        columns.append(f"nullif(CAST({quoted(names['text'])} AS VARCHAR), '') AS text")
    if "categories" in names:
        column = quoted(names["categories"])
        if table.types[names["categories"]].endswith("[]"):
            columns.append(f"CAST({column} AS VARCHAR[]) AS categories")
        else:
            columns.append(f"string_split(CAST({column} AS VARCHAR), '{CATEGORY_DELIMITER}') AS categories")
    if "embedding" in names:
        columns.append(f"CAST({quoted(names['embedding'])} AS FLOAT[]) AS embedding")
    return f"SELECT {', '.join(columns)} FROM {table.relation}"


def _matched(
    table: Table,
    mapping: dict[str, str],
    canonical: tuple[str, ...],
    required: tuple[str, ...],
    setting: str,
    extra: tuple[str, ...] = (),
) -> dict[str, str]:
    """Canonical column -> column of the table, for all that are mapped or are there under their own name."""
    for key, name in mapping.items():
        if key not in canonical and key not in extra:
            known = ", ".join((*canonical, *extra))
            raise DataError(f"{setting}: {key!r} is no canonical column ({known}).{nearest(key, canonical)}")
        table.require(name, f"{setting}.{key}")
    for key in required:
        table.require(mapping.get(key, key), f"{setting}.{key}")
    return {key: mapping.get(key, key) for key in canonical if key in mapping or key in table.types}
