"""Copies of remote files on a disk of this machine, shared by all its processes.

files/ holds what stays (tables of users and items, SID maps); shards/ holds shards, the least recently used of which
make room. A copy is named by its contents, so that another version of a file never takes its place.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from onetrain.data.errors import DataError

PART = ".part"  # of a copy that is under way; locked by who makes it
_REMEMBER_S = 10.0  # uses closer together are one


class FileCache:
    """A folder of copies, with at most `gib` of shards, or a single larger one."""

    def __init__(self, folder: Path, gib: float) -> None:
        self.folder, self.gib = folder, gib

    def get(self, name: str, size: int | None, fetch: Callable[[BinaryIO], None], *, stays: bool) -> Path:
        """The copy of this name and size, made by `fetch(file)` where there is none; by one process at a time.

        DataError when the disk has no room for it.
        """
        path = self.folder / ("files" if stays else "shards") / name
        if not _is_there(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(name + PART)
            with _locked(part) as file:
                if not _is_there(path, size):
                    self._make_room(size or 0, stays)
                    fetch(file)
                    file.flush()
                    os.replace(part, path)
        used(path)
        return path

    def _make_room(self, size: int, stays: bool) -> None:
        copies = sorted(self._shards())
        total = sum(bytes_ for _, bytes_, _ in copies) + (0 if stays else size)
        while copies and (total > self.gib * 2**30 or self._free() < size):
            _, bytes_, path = copies.pop(0)
            path.unlink(missing_ok=True)  # who has mapped it keeps it until it looks again
            total -= bytes_
        if self._free() < size:
            raise DataError(
                f"stream.cache: the disk of {self.folder} has {self._free() / 1e6:,.0f} MB free, and a remote file "
                f"needs {size / 1e6:,.0f} MB. Free some space, or name a folder on another disk."
            )

    def _shards(self) -> Iterator[tuple[float, int, Path]]:
        """Last use, bytes and path of every shard."""
        with os.scandir(self.folder / "shards") if (self.folder / "shards").is_dir() else _nothing() as entries:
            for entry in entries:
                if not entry.name.endswith(PART):
                    try:
                        found = entry.stat()
                    except FileNotFoundError:  # another process made room
                        continue
                    yield max(found.st_atime, found.st_mtime), found.st_size, Path(entry.path)

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free


def used(path: Path) -> os.stat_result | None:
    """Note that a copy is in use; None when it is there no more."""
    try:
        found = os.stat(path)
        now = time.time()
        if now - found.st_atime > _REMEMBER_S:
            os.utime(path, ns=(int(now * 1e9), found.st_mtime_ns))
    except OSError:
        return None
    return found


def _is_there(path: Path, size: int | None) -> bool:
    try:
        found = path.stat().st_size
    except OSError:
        return False
    return size is None or found == size


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """An unfinished copy that nobody else writes; removed at the end unless it was renamed."""
    while True:
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _same(file, part):
                continue  # its maker has finished or given up: look again
            try:
                yield file
            finally:
                if _same(file, part):
                    part.unlink()
            return


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _nothing() -> Iterator[tuple[()]]:
    yield ()
