"""Folders on other storage (s3://, hdfs://, memory:// ...), read through fsspec, patiently."""

import errno
import os
import posixpath
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import xxhash

from onetrain.data.errors import DataError

PAUSES_S = (0.5, 2.0, 8.0)  # before each further try
_CHUNK_BYTES = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_remote(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has to be copied before it can be memory-mapped."""
    text = os.fspath(folder)
    return "://" in text and not text.startswith("file://")


def file_exists(folder: str, name: str) -> bool:
    """Whether a local or remote folder has a file now."""
    if is_remote(folder):
        return RemoteFolder(folder).exists(name)
    return (Path(folder.removeprefix("file://")) / name).is_file()


class RemoteFolder:
    """Files below a URL. FileNotFoundError for what is not there; DataError for storage that does not answer."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __reduce__(self) -> tuple[type["RemoteFolder"], tuple[str]]:
        return RemoteFolder, (self.url,)

    def where(self, name: str) -> str:
        """URL of a file, for messages."""
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file is there now."""

        def look() -> bool:
            system, root = self._opened
            system.invalidate_cache()  # listings that were kept would hide what is new
            return bool(system.exists(posixpath.normpath(posixpath.join(root, name))))

        return bool(self._patiently(name, look))

    def read(self, name: str) -> bytes:
        """All of a small file."""

        def read() -> bytes:
            with self._open(name) as source:
                return bytes(source.read())

        return bytes(self._patiently(name, read))

    def download(self, name: str, target: BinaryIO) -> tuple[int, str]:
        """Copy a file into `target`, from its beginning. Size and xxh3_128 of what was copied."""

        def copy() -> tuple[int, str]:
            target.seek(0)
            target.truncate()
            size, digest = 0, xxhash.xxh3_128()
            with self._open(name) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            target.flush()
            return size, str(digest.hexdigest())

        size, found = self._patiently(name, copy)
        return int(size), str(found)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            system, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{self.url} cannot be opened: {error}. Install what fsspec needs for it (for s3:// "
                "`pip install onetrain[s3]`), or correct data.prepared."
            ) from error
        return system, str(root)

    def _open(self, name: str) -> Any:
        system, root = self._opened
        return system.open(posixpath.normpath(posixpath.join(root, name)), "rb")

    def _patiently(self, name: str, action: Callable[[], Any]) -> Any:
        for pause in (*PAUSES_S, None):
            try:
                return action()
            except (FileNotFoundError, DataError):
                raise
            except Exception as error:  # every storage library has exceptions of its own
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise
                if pause is None or isinstance(error, PermissionError):
                    raise DataError(
                        f"{self.where(name)} cannot be read ({type(error).__name__}: {error}). Look at the network, "
                        "the storage and this machine's credentials for it."
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")
