"""Attributes of items and users: categorical columns of the item file and of the user file."""

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.options import SourceOptions
from onetrain.data.readers.files import Table, find_files, open_table, quoted
from onetrain.data.schema import BUILT_IN_FEATURES, item_column, nearest, user_column


def check_attributes(options: SourceOptions) -> None:
    """Raises DataError for names that no attribute can have, and for attributes without a file."""
    for setting in ("item_features", "user_features"):
        for name in getattr(options, setting):
            if not name.isidentifier() or name in BUILT_IN_FEATURES or name.startswith("x_"):
                raise DataError(
                    f"data.source.{setting}: {name!r} cannot name an attribute: use letters, digits and _, no x_ in "
                    f"front, and none of {', '.join(BUILT_IN_FEATURES)}."
                )
        if len({name.lower() for name in getattr(options, setting)}) < len(getattr(options, setting)):
            raise DataError(f"data.source.{setting}: names differ only in upper and lower case. Rename one.")
    if options.user_features and not options.users and options.reader != "simulator":
        raise DataError("data.source.user_features needs a user file. Name it in data.source.users.")
    if options.item_features and not options.items and options.reader not in ("simulator", "movielens"):
        raise DataError("data.source.item_features needs an item file. Name it in data.source.items.")


def item_attributes(table: Table, options: SourceOptions) -> list[str]:
    """SELECT terms f_<name> of the item attributes. Raises DataError for a column that the item file lacks."""
    return [
        f"{table.text(column, f'data.source.item_features.{name}')} AS {quoted(item_column(name))}"
        for name, column in options.item_features.items()
    ]


def open_users(con: duckdb.DuckDBPyConnection, options: SourceOptions, id_column: str = "user_id") -> Table | None:
    """The user file, if one is named; source.user_columns may call its id otherwise. DataError if that is missing."""
    if not options.users:
        return None
    for key in options.user_columns:
        if key != "id":
            raise DataError(f"data.source.user_columns: {key!r} is no canonical column (id).{nearest(key, ('id',))}")
    table = open_table(con, find_files(options.users, "data.source.users"), "data.source.users")
    table.require(options.user_columns.get("id", id_column), "data.source.user_columns.id")
    return table


def users_query(table: Table | None, options: SourceOptions, id_column: str = "user_id") -> str | None:
    """id and u_<name> of the user attributes. Raises DataError for a column that the user file lacks."""
    if table is None:
        return None
    key = options.user_columns.get("id", id_column)
    columns = [f"{table.text(key, 'data.source.user_columns.id')} AS id"] + [
        f"{table.text(column, f'data.source.user_features.{name}')} AS {quoted(user_column(name))}"
        for name, column in options.user_features.items()
    ]
    return f"SELECT {', '.join(columns)} FROM {table.relation}"
