"""Reader of MovieLens ratings in its three layouts: 100K (u.data), 1M and 10M (ratings.dat), 20M and later (.csv)."""

from collections.abc import Sequence

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.options import SourceOptions
from onetrain.data.readers.attributes import item_attributes, open_users, users_query
from onetrain.data.readers.files import FILE, Table, filesystem_of, find_files, literal, open_table, quoted
from onetrain.data.readers.source import Source
from onetrain.data.schema import extra_column

RATINGS = ("ratings.csv", "ratings.dat", "u.data")
USERS = ("users.dat", "u.user")
MOVIES = ("movies.csv", "movies.dat", "u.item")
RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")
MOVIE_COLUMNS = ("movieId", "title", "genres")
USER_COLUMNS = ("userId", "gender", "age", "occupation", "zip")  # of users.dat
GENRES = (  # the flags of u.item, in order
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def read(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Source:
    """Open ratings as events. `source.events` is the ratings file or its folder; `source.items` is found beside it.
    `source.users` is users.dat, u.user or any file with userId.

    The behaviour is `default_behaviour`, or where `source.behaviours` maps ratings ("5", "4.5") to names, the name of
    the rating. `rating` may be an extra feature. Raises DataError for missing files and other extra features.
    """
    ratings = open_layout(con, _located(options.events, RATINGS, "data.source.events"), "data.source.events")
    if set(options.extra) - {"rating"}:
        raise DataError(f"data.source.extra: reader 'movielens' has only 'rating', found {', '.join(options.extra)}.")
    columns = ["userId AS user", "movieId AS item", "timestamp"]
    if options.behaviours:
        branches = " ".join(f"WHEN {literal(value)} THEN {literal(value)}" for value in options.behaviours)
        default = literal(options.default_behaviour)
        columns.append(f"CASE printf('%g', TRY_CAST(rating AS DOUBLE)) {branches} ELSE {default} END AS behaviour")
    columns += [f"rating AS {extra_column('rating')}" for _ in options.extra]
    movies, users = _movies(con, options), _users(con, options)
    if options.item_features and not movies:
        raise DataError("data.source.item_features needs the file of the movies. Name it in data.source.items.")
    tables = [table for table in (ratings, movies, users) if table]
    return Source(
        events=f"SELECT {', '.join(columns)}, {FILE} AS file FROM {ratings.relation}",
        names=dict(zip(("user", "item", "behaviour", "timestamp"), RATING_COLUMNS, strict=True)),
        timestamp_unit="s",
        files=tuple(file for table in tables for file in table.files),
        n_bytes=sum(table.n_bytes for table in tables),
        items=_items_query(movies, options) if movies else None,
        users=users_query(users, options, USER_COLUMNS[0]),
    )


def open_layout(con: duckdb.DuckDBPyConnection, file: str, setting: str) -> Table:
    """Open a file of ratings or movies by the layout that its name tells."""
    base = file.rsplit("/", 1)[-1]
    if base.endswith(".csv"):
        table = open_table(con, [file], setting)
        for column in RATING_COLUMNS if base.startswith("ratings") else MOVIE_COLUMNS:
            table.require(column, setting)
        return table
    if base == "u.data":
        return open_table(con, [file], setting, delimiter="\t", names=RATING_COLUMNS, quote="")
    if base == "u.item":
        item_columns = ("movieId", "title", "released", "video_released", "url", *GENRES)
        return open_table(con, [file], setting, delimiter="|", names=item_columns, quote="", encoding="latin-1")
    names: Sequence[str] = RATING_COLUMNS if base.startswith("ratings") else MOVIE_COLUMNS
    return open_table(con, [file], setting, delimiter="::", names=names, quote="", encoding="latin-1")


def _located(path: str, candidates: tuple[str, ...], setting: str) -> str:
    """The file itself, or the one of the candidates that a folder holds."""
    fs, root = filesystem_of(path, setting)
    if not fs.isdir(root):
        return find_files(path, setting)[0]
    for name in candidates:
        if fs.isfile(f"{root}/{name}"):
            return find_files(f"{path.rstrip('/')}/{name}", setting)[0]
    raise DataError(f"{setting}: the folder {path!r} holds none of {', '.join(candidates)}.")


def _movies(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Table | None:
    fs, root = filesystem_of(options.events, "data.source.events")
    if options.items:
        return open_layout(con, _located(options.items, MOVIES, "data.source.items"), "data.source.items")
    folder = root if fs.isdir(root) else root.rsplit("/", 1)[0]
    if not any(fs.isfile(f"{folder}/{name}") for name in MOVIES):
        return None
    return open_layout(con, _located(fs.unstrip_protocol(folder), MOVIES, "data.source.events"), "data.source.items")


def _users(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Table | None:
    if not options.users:
        return None
    file, setting = _located(options.users, USERS, "data.source.users"), "data.source.users"
    base = file.rsplit("/", 1)[-1]
    if base == "users.dat":
        return open_table(con, [file], setting, delimiter="::", names=USER_COLUMNS, quote="", encoding="latin-1")
    if base == "u.user":
        names = ("userId", "age", "gender", "occupation", "zip")
        return open_table(con, [file], setting, delimiter="|", names=names, quote="", encoding="latin-1")
    return open_users(con, options, USER_COLUMNS[0])


def _items_query(table: Table, options: SourceOptions) -> str:
    if "genres" in table.types:
        categories = "CASE WHEN genres <> '(no genres listed)' THEN string_split(genres, '|') END"
    else:
        flags = ", ".join(f"CASE WHEN {quoted(genre)} = '1' THEN {literal(genre)} END" for genre in GENRES)
        categories = f"list_filter([{flags}], lambda genre: genre IS NOT NULL)"
    attributes = "".join(f", {term}" for term in item_attributes(table, options))
    return f"SELECT movieId AS id, title AS text, {categories} AS categories{attributes} FROM {table.relation}"
