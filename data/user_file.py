"""The user file: attributes of the log's users, as ids."""

import duckdb
import pyarrow as pa

from onetrain.data.errors import DataError
from onetrain.data.options import DataOptions
from onetrain.data.readers import Source
from onetrain.data.readers.files import quoted, unreadable
from onetrain.data.report import Report
from onetrain.data.schema import nearest, user_column


def index_users(
    con: duckdb.DuckDBPyConnection, source: Source, options: DataOptions, report: Report
) -> dict[str, tuple[str, ...]]:
    """Create table `user_index` (id, u_<name> of every attribute); return each attribute's names, sorted.

    Ids: 0 = unknown, else 1 + place of the name among those that users of the log have. Of rows with one id, the first
    by its attributes is kept; users of the log that the file lacks get no row. Raises DataError for a file that cannot
    be read, and for rows without an id unless bad_rows is "drop".
    """
    names: dict[str, tuple[str, ...]] = {}
    columns = {name: quoted(user_column(name)) for name in options.source.user_features}
    if source.users is None or not columns:
        return names
    _stage_users(con, source, options, report)
    listed = ", ".join(columns.values())
    con.execute(
        f"""CREATE TABLE user_file AS SELECT * FROM user_rows SEMI JOIN log_users USING (id) WHERE id IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY id ORDER BY {listed}) = 1"""
    )
    query = "SELECT (SELECT count(*) FROM log_users) - (SELECT count(*) FROM user_file)"
    ((report.users_not_in_file,),) = con.execute(query).fetchall()
    ids = ["id"]
    for name, column in columns.items():
        found = con.execute(f"SELECT DISTINCT {column} FROM user_file WHERE {column} IS NOT NULL ORDER BY 1").fetchall()
        names[name] = tuple(value for (value,) in found)
        ids.append(
            f"CASE WHEN {column} IS NULL THEN 0 ELSE dense_rank() OVER (ORDER BY {column} NULLS LAST) END AS {column}"
        )
    con.execute(f"CREATE TABLE user_index AS SELECT {', '.join(ids)} FROM user_file")
    con.execute("DROP TABLE user_file; DROP TABLE user_rows; DROP TABLE log_users")
    return names


def index_known_users(
    con: duckdb.DuckDBPyConnection,
    source: Source,
    options: DataOptions,
    report: Report,
    names: dict[str, tuple[str, ...]],
) -> None:
    """Create table `user_index` as `index_users` does, with the ids of names that are known. DataError for others."""
    columns = {name: quoted(user_column(name)) for name in names}
    if not columns:
        return
    if source.users is None or not options.source.user_features:
        con.execute(f"CREATE TABLE user_index (id VARCHAR, {', '.join(f'{c} BIGINT' for c in columns.values())})")
        return
    _stage_users(con, source, options, report)
    ids = ["id"]
    for name, column in columns.items():
        numbered = {"name": pa.array(names[name], pa.string()), "number": range(1, len(names[name]) + 1)}
        con.register("chunk", pa.table(numbered))
        con.execute(f"CREATE TABLE {quoted('ids_' + name)} AS FROM chunk")
        con.unregister("chunk")
        query = f"""SELECT DISTINCT {column} FROM user_rows SEMI JOIN log_users USING (id)
            ANTI JOIN {quoted("ids_" + name)} ON {column} = name WHERE {column} IS NOT NULL ORDER BY 1 LIMIT 5"""
        unknown = [value for (value,) in con.execute(query).fetchall()]
        if unknown:
            raise DataError(
                f"data.source.users: attribute {name} has the value {', '.join(map(repr, unknown))}, which the folder "
                f"{options.prepared} lacks.{nearest(unknown[0], names[name])} Correct the user file, or prepare anew."
            )
        ids.append(
            f"coalesce((SELECT number FROM {quoted('ids_' + name)} n WHERE n.name = user_rows.{column}), 0) AS {column}"
        )
    listed = ", ".join(f"user_rows.{column}" for column in columns.values())
    con.execute(
        f"""CREATE TABLE user_index AS SELECT {", ".join(ids)} FROM user_rows SEMI JOIN log_users USING (id)
        WHERE id IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY id ORDER BY {listed}) = 1"""
    )
    query = "SELECT (SELECT count(*) FROM log_users) - (SELECT count(*) FROM user_index)"
    ((report.users_not_in_file,),) = con.execute(query).fetchall()
    con.execute("DROP TABLE user_rows; DROP TABLE log_users")


def _stage_users(con: duckdb.DuckDBPyConnection, source: Source, options: DataOptions, report: Report) -> None:
    """Create tables `user_rows` and `log_users`; count rows without id and repeated ids."""
    try:
        con.execute(f"CREATE TABLE user_rows AS {source.users}")
    except (duckdb.InvalidInputException, duckdb.ConversionException) as error:
        found = unreadable(error, "the user file")
        raise DataError(f"data.source.users: cannot read {found}. Repair the file.") from error
    query = "SELECT count(*), count(id), count(DISTINCT id) FROM user_rows"
    ((n_rows, n_ids, n_users),) = con.execute(query).fetchall()
    if n_ids < n_rows and options.bad_rows == "error":
        raise DataError(
            f"data.source.users: {n_rows - n_ids} of {n_rows} rows have no id. Repair the user file, or set "
            'data.bad_rows to "drop" to leave such rows out.'
        )
    report.bad_users_dropped, report.duplicate_users_dropped = n_rows - n_ids, n_ids - n_users
    con.execute("""CREATE TABLE log_users AS SELECT DISTINCT "user" AS id FROM log WHERE bad_column IS NULL""")
