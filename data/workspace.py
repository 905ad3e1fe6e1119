"""A working folder beside the result, which replaces the old result only when everything is done."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.manifest import FILE_NAME

SPACE_FACTOR = 2  # the staged log, its sorted copy and the shards need at least this many times the input
_NO_SPACE = ("max_temp_directory_size", "No space left", "disk full")


@dataclass(frozen=True)
class Workspace:
    """`result` becomes the prepared folder; `scratch` holds the database and what it spills."""

    result: Path
    scratch: Path


@contextmanager
def workspace(prepared: Path) -> Iterator[Workspace]:
    """Temporary folders beside `prepared`; on success `result` takes its place, otherwise nothing is left or changed.

    Raises DataError when `prepared` is something else than a prepared folder, and for a full disk.
    """
    _check_replaceable(prepared)
    temporary = None
    try:
        prepared.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{prepared.name}.preparing-", dir=prepared.parent))
        work = Workspace(temporary / "result", temporary / "scratch")
        work.result.mkdir()
        work.scratch.mkdir()
        yield work
        _replace(work.result, prepared, temporary / "old")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(_disk_full(prepared)) from error
        raise DataError(f"data.prepared: cannot write {prepared}: {error}") from error
    except RuntimeError as error:  # DuckDB's answer to Ctrl-C during a query
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        if any(sign.lower() in str(error).lower() for sign in _NO_SPACE):
            raise DataError(f"{_disk_full(prepared)} ({reason})") from error
        if isinstance(error, duckdb.OutOfMemoryException):
            raise DataError(f"data.memory_limit_mb is too small for this log: {reason}. Raise it.") from error
        raise DataError(f"Preparing {prepared} failed in DuckDB: {reason}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_space(folder: Path, input_bytes: int) -> None:
    """Raises DataError when the disk of `folder` has less free space than preparing the input takes at least."""
    free, needed = shutil.disk_usage(folder).free, SPACE_FACTOR * input_bytes
    if free < needed:
        raise DataError(
            f"data.prepared: the disk of {folder} has {_megabytes(free)} free, and preparing {_megabytes(input_bytes)} "
            f"of input needs at least {_megabytes(needed)}. Free some space or prepare on another disk."
        )


def _check_replaceable(prepared: Path) -> None:
    if prepared.exists() and not prepared.is_dir():
        raise DataError(f"data.prepared: {prepared} is a file. Name a folder.")
    if prepared.exists() and any(prepared.iterdir()) and not (prepared / FILE_NAME).is_file():
        raise DataError(
            f"data.prepared: {prepared} holds other files and no {FILE_NAME}, so it is not replaced. Name a new folder."
        )


def _replace(result: Path, prepared: Path, old: Path) -> None:
    if prepared.exists():
        os.replace(prepared, old)
    try:
        os.replace(result, prepared)
    except BaseException:
        if old.exists():
            os.replace(old, prepared)
        raise


def _disk_full(prepared: Path) -> str:
    free = shutil.disk_usage(prepared.parent).free
    return (
        f"data.prepared: no space left on the disk of {prepared.parent} ({_megabytes(free)} free beside the "
        "unfinished result, which is removed). Free some space or prepare on another disk."
    )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
