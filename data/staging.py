"""Stages a raw log: one pass over the files into a typed table of the working database, bad rows marked.

Table `log`: "user", item (VARCHAR), timestamp_ms (BIGINT), behaviour, scenario (VARCHAR), watch_ms, duration_ms
(BIGINT, NULL = unknown), "order" (BIGINT), x_<extra> (FLOAT, NaN = unknown), and bad_column, bad_value, bad_file of
rows that cannot be events. Its rowid is the place of the row in the files.
"""

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.options import DataOptions
from onetrain.data.readers import Source
from onetrain.data.readers.files import as_text, known, literal, quoted, unreadable
from onetrain.data.report import Report
from onetrain.data.schema import extra_column

INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")  # all within BIGINT
_MILLISECONDS = {"s": "* 1000", "ms": "", "us": "/ 1000"}


def stage_log(con: duckdb.DuckDBPyConnection, source: Source, options: DataOptions, report: Report) -> None:
    """Create table `log` and count its rows, bad rows and odd times.

    Raises DataError for a log without rows, lines that cannot be parsed, and bad rows unless bad_rows is "drop".
    """
    try:
        con.execute(f"CREATE TABLE log AS {_staging_query(con, source, options)}")
    except (duckdb.InvalidInputException, duckdb.ConversionException) as error:
        found = unreadable(error, source.files[0])
        raise DataError(f"data.source.events: cannot read {found}. Repair the file.") from error
    query = """SELECT count(*), count(bad_column), count(*) FILTER (bad_column IS NULL AND duration_ms = 0),
        count(*) FILTER (bad_column IS NULL AND (duration_ms < 0 OR watch_ms < 0)) FROM log"""
    ((report.rows_read, n_bad, report.zero_duration, report.negative_times),) = con.execute(query).fetchall()
    if not report.rows_read:
        raise DataError(f"data.source.events: the log has no rows ({source.files[0]}).")
    if n_bad and options.bad_rows == "error":
        raise DataError(_bad_rows_message(con, source, report.rows_read))
    report.bad_rows_dropped = n_bad
    if n_bad == report.rows_read:
        raise DataError(f"No row of the log can be used. {_bad_rows_message(con, source, report.rows_read)}")


def _staging_query(con: duckdb.DuckDBPyConnection, source: Source, options: DataOptions) -> str:
    described = con.execute(f"DESCRIBE {source.events}").fetchall()
    types = {name: kind for name, kind, *_ in described}
    numbers = {"watch_ms": "BIGINT", "duration_ms": "BIGINT", "order": "BIGINT"}
    numbers |= {extra_column(name): "FLOAT" for name in options.source.extra}
    clean = {"user": as_text("user", types["user"]), "item": as_text("item", types["item"])}
    clean["timestamp_ms"] = _timestamp(types["timestamp"], source.timestamp_unit)
    for name, default in (
        ("behaviour", options.source.default_behaviour),
        ("scenario", options.source.default_scenario),
    ):
        clean[name] = (
            f"coalesce({as_text(name, types[name])}, {literal(default)})" if name in types else literal(default)
        )
    clean["behaviour"] = _renamed(clean["behaviour"], options.source.behaviours)
    for name, kind in numbers.items():
        clean[name] = _number(name, types[name], kind) if name in types else f"CAST(NULL AS {kind})"

    bad = {"user": "clean_user IS NULL", "item": "clean_item IS NULL", "timestamp": "clean_timestamp_ms IS NULL"}
    for name in numbers:
        if name in types:
            bad[name] = f"{known(name, types[name])} IS NOT NULL AND {quoted(f'clean_{name}')} IS NULL"
    which = " ".join(f"WHEN {condition} THEN {literal(name)}" for name, condition in bad.items())
    value = " ".join(f"WHEN {condition} THEN CAST({quoted(name)} AS VARCHAR)" for name, condition in bad.items())
    absent = {"order": "0"} | {extra_column(name): "CAST('nan' AS FLOAT)" for name in options.source.extra}
    columns = [
        f"coalesce({quoted(f'clean_{name}')}, {absent[name]}) AS {quoted(name)}"
        if name in absent
        else f"{quoted(f'clean_{name}')} AS {quoted(name)}"
        for name in clean
    ]
    inner = ", ".join(f"{expression} AS {quoted(f'clean_{name}')}" for name, expression in clean.items())
    return f"""
        SELECT {", ".join(columns)}, CASE {which} END AS bad_column, CASE {value} END AS bad_value,
            CASE WHEN bad_column IS NOT NULL THEN file END AS bad_file
        FROM (SELECT *, {inner} FROM ({source.events}))"""


def _timestamp(kind: str, unit: str) -> str:
    if kind.startswith(("TIMESTAMP", "DATE")):
        return "epoch_ms(timestamp)"
    if unit == "iso":
        return "epoch_ms(TRY_CAST(timestamp AS TIMESTAMPTZ))"  # the connection's zone, UTC, where it names none
    if unit == "ms" and kind in INTEGERS:
        return "CAST(timestamp AS BIGINT)"
    rounding = "floor" if unit == "us" else "round"
    return f"TRY(CAST({rounding}(CAST(timestamp AS DOUBLE) {_MILLISECONDS[unit]}) AS BIGINT))"


def _number(name: str, kind: str, wanted: str) -> str:
    """A number, NULL when unreadable or infinite; NaN stays only in text of a float feature."""
    if kind in INTEGERS:
        return f"CAST({quoted(name)} AS {wanted})"
    value = f"TRY_CAST({known(name, kind)} AS DOUBLE)"
    if wanted == "BIGINT":
        return f"TRY(CAST(round({value}) AS BIGINT))"
    return f"CASE WHEN NOT isinf({value}) THEN TRY_CAST({value} AS FLOAT) END"


def _renamed(column: str, behaviours: dict[str, str]) -> str:
    if not behaviours:
        return column
    branches = " ".join(f"WHEN {literal(value)} THEN {literal(name)}" for value, name in behaviours.items())
    return f"CASE {column} {branches} ELSE {column} END"


def _bad_rows_message(con: duckdb.DuckDBPyConnection, source: Source, n_rows: int) -> str:
    rows = con.execute(
        """SELECT bad_column, count(*), arg_min(bad_file, rowid), arg_min(bad_value, rowid) FROM log
        WHERE bad_column IS NOT NULL GROUP BY bad_column ORDER BY min(rowid)"""
    ).fetchall()
    unit = f" as data.source.timestamp_unit {source.timestamp_unit!r}"
    found = []
    for column, count, file, example in rows:
        named = source.names.get(column, column)
        what = "empty" if example is None else f"unreadable{unit if column == 'timestamp' else ''}, such as {example!r}"
        found.append(f"{count} of {n_rows} rows have column {named!r} ({column}) {what}, the first in {file}")
    advice = 'Repair the log, or set data.bad_rows to "drop" to leave such rows out.'
    return f"data.source.events: {'; '.join(found)}. {advice}"
