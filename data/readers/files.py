"""Finds the files of a log (local or through fsspec) and opens them as one DuckDB relation.

Text files are read as text, column by column as their header says: nothing is guessed from values, so that an id 007
stays 007 and a broken line is an error instead of a skipped one.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import duckdb
import fsspec

from onetrain.data.errors import DataError
from onetrain.data.schema import nearest

FILE = "onetrain_file"  # column that names the file of a row
FLOATS = ("FLOAT", "DOUBLE")  # types of DuckDB
DELIMITERS = ("\t", ",", ";", "|")
PARQUET_SUFFIXES = (".parquet", ".pq")
TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")


@dataclass(frozen=True)
class Table:
    """Files of the same kind as one relation: `FROM <relation>` has the columns of `types` and FILE."""

    relation: str
    types: dict[str, str]  # column -> DuckDB type; VARCHAR for all of a text file
    files: tuple[str, ...]
    n_bytes: int
    setting: str  # the option that named the files, for messages

    def require(self, column: str, setting: str) -> str:
        """The column, quoted for SQL. Raises DataError with the columns that exist; `setting` is what to change."""
        if column not in self.types:
            raise DataError(
                f"{self.setting}: {self.files[0]} has no column {column!r}; its columns are "
                f"{', '.join(self.types)}.{nearest(column, self.types)} Correct {setting} or the file."
            )
        return quoted(column)

    def text(self, column: str, setting: str) -> str:
        """The column's values as text, for SQL; NULL where empty. DataError when it is missing or holds lists."""
        self.require(column, setting)
        if self.types[column].endswith("]") or self.types[column].startswith(("STRUCT", "MAP")):
            raise DataError(
                f"{self.setting}: column {column!r} of {self.files[0]} holds lists or records ({self.types[column]}). "
                f"{setting} needs single values."
            )
        return as_text(column, self.types[column])


def quoted(name: str) -> str:
    """A column name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string for SQL."""
    return "'" + text.replace("'", "''") + "'"


def known(column: str, kind: str) -> str:
    """SQL of a raw value; a float's NaN is how many writers say null."""
    return f"(CASE WHEN NOT isnan({quoted(column)}) THEN {quoted(column)} END)" if kind in FLOATS else quoted(column)


def as_text(column: str, kind: str) -> str:
    """SQL of an id or name as text, NULL when empty; a whole float (12.0, integers that had nulls) without its .0."""
    value = known(column, kind)
    if kind in FLOATS:
        whole = f"CASE WHEN {value} = trunc({value}) THEN CAST(TRY(CAST({value} AS BIGINT)) AS VARCHAR) END"
        return f"coalesce({whole}, CAST({value} AS VARCHAR))"
    return f"nullif(CAST({value} AS VARCHAR), '')"


def unreadable(error: duckdb.Error, default: str) -> str:
    """The file that a query failed on (`default` if DuckDB does not name it), and why."""
    lines = [line.strip() for line in str(error).splitlines()]
    file = next((line.removeprefix("file = ") for line in lines if line.startswith("file = ")), default)
    return f"{file}: {'; '.join(lines[:3])}"


def filesystem_of(path: str, setting: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path without protocol. Raises DataError for an empty path or an unknown protocol."""
    if not path:
        raise DataError(f"{setting} is empty. Set it to a file, folder or glob.")
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"{setting}: cannot open {path!r}: {error}") from error
    return fs, root


def find_files(path: str, setting: str, suffixes: Sequence[str] = PARQUET_SUFFIXES + TEXT_SUFFIXES) -> list[str]:
    """Files that `path` (file, folder or glob) names, sorted; of a folder, all with one of the suffixes.

    Raises DataError when there is none.
    """
    fs, root = filesystem_of(path, setting)
    if fs.isfile(root):
        found = [root]
    elif fs.isdir(root):
        names = {name: name.rsplit("/", 1)[-1] for name in fs.find(root)}
        found = [name for name, base in names.items() if base.endswith(tuple(suffixes)) and base[0] not in "._"]
    else:
        found = [name for name in fs.glob(root) if fs.isfile(name)]
    if not found:
        raise DataError(
            f"{setting}: no file matches {path!r}. Give a file, a glob, or a folder of {', '.join(suffixes)}."
        )
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    return sorted(name if local else fs.unstrip_protocol(name) for name in found)


def open_table(
    con: duckdb.DuckDBPyConnection,
    files: Sequence[str],
    setting: str,
    *,
    delimiter: str | None = None,
    names: Sequence[str] | None = None,
    quote: Literal['"', ""] = '"',
    encoding: Literal["utf-8", "latin-1"] = "utf-8",
) -> Table:
    """Open files, all Parquet or all text (gzip too), as one relation; columns are matched by name.

    Text: `names` are the columns of files without a header, `delimiter` is found in the header when None.
    Raises DataError for files that cannot be opened, or that mix Parquet and text.
    """
    fs, _ = filesystem_of(files[0], setting)
    if "://" in files[0]:
        con.register_filesystem(fs)
    parquet = [name for name in files if name.endswith(PARQUET_SUFFIXES)]
    if parquet and len(parquet) != len(files):
        other = next(name for name in files if name not in parquet)
        raise DataError(f"{setting}: Parquet and text are mixed ({parquet[0]}, {other}). Name one kind by a glob.")
    try:
        if parquet:
            listed = ", ".join(map(literal, files))
            relation = f"read_parquet([{listed}], union_by_name=true, filename={literal(FILE)})"
        else:
            relation = _text_relation(fs, files, setting, delimiter, names, quote, encoding)
        described = con.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        n_bytes = sum(fs.size(name) for name in files)
    except (duckdb.Error, OSError, UnicodeError) as error:
        raise DataError(f"{setting}: cannot read {files[0]}: {str(error).splitlines()[0]}") from error
    types = {name: kind for name, kind, *_ in described if name != FILE}
    return Table(relation, types, tuple(files), n_bytes, setting)


def _text_relation(
    fs: fsspec.AbstractFileSystem,
    files: Sequence[str],
    setting: str,
    delimiter: str | None,
    names: Sequence[str] | None,
    quote: str,
    encoding: str,
) -> str:
    """One read_csv for each distinct header, united by column name."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name in files:
        if names is None:
            groups[_header(fs, name, setting, delimiter, encoding)].append(name)
        else:
            groups[delimiter or "\t", tuple(names)].append(name)
    options = f"auto_detect=false, quote={literal(quote)}, escape={literal(quote)}, encoding={literal(encoding)}"
    options += f", header={'true' if names is None else 'false'}, filename={literal(FILE)}"
    parts = []
    for (mark, columns), members in groups.items():
        listed = ", ".join(map(literal, members))
        typed = ", ".join(f"{literal(column)}: 'VARCHAR'" for column in columns)
        parts.append(f"SELECT * FROM read_csv([{listed}], delim={literal(mark)}, columns={{{typed}}}, {options})")
    return f"({' UNION ALL BY NAME '.join(parts)})"


def _header(
    fs: fsspec.AbstractFileSystem, name: str, setting: str, delimiter: str | None, encoding: str
) -> tuple[str, tuple[str, ...]]:
    with fs.open(name, "rb", compression="infer") as raw:
        line = io.TextIOWrapper(raw, encoding="utf-8-sig" if encoding == "utf-8" else encoding).readline().strip("\r\n")
    if not line:
        raise DataError(f"{setting}: {name} has no header line. Its first line must name the columns.")
    mark = delimiter or max(DELIMITERS, key=line.count)
    columns = tuple(next(csv.reader([line], delimiter=mark)))
    if len(set(columns)) != len(columns):
        raise DataError(f"{setting}: {name} names a column twice: {', '.join(columns)}. Rename one.")
    return mark, columns
