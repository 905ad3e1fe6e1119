"""Readers of raw logs: each opens one layout as canonical events and items."""

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.options import SourceOptions
from onetrain.data.readers import amazon, columns, kuairand, movielens, simulator
from onetrain.data.readers.attributes import check_attributes
from onetrain.data.readers.source import Source

READERS = {
    "amazon": amazon.read,
    "movielens": movielens.read,
    "kuairand": kuairand.read,
    "columns": columns.read,
    "simulator": simulator.read,
    "lifelong": simulator.read_lifelong,
}


def open_source(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Source:
    """Open the log that the options name. Raises DataError for missing files or columns."""
    if options.reader not in READERS:
        raise DataError(f"data.source.reader: {options.reader!r} is none of {', '.join(READERS)}.")
    if options.reader != "columns" and (options.columns or options.item_columns or options.user_columns):
        raise DataError(
            f"data.source.columns, item_columns and user_columns belong to reader 'columns'; reader "
            f"{options.reader!r} knows its columns. Remove them or change data.source.reader."
        )
    check_attributes(options)
    return READERS[options.reader](con, options)


__all__ = ["READERS", "Source", "open_source"]
