"""Where the files of a prepared folder are read from: a local folder, or copies of a remote one.

What is read is a local file in either case, checked for its size. A copy's contents are checked when it is made, those
of shards' record batches when they are first read (data/shards.py).
"""

import os
import posixpath
from pathlib import Path
from typing import BinaryIO, Protocol

from onetrain.data.errors import DamagedShardError, DataError
from onetrain.data.file_cache import FileCache, used
from onetrain.data.fingerprint import file_checksum
from onetrain.data.manifest import StoredFile
from onetrain.data.remote import RemoteFolder, is_remote
from onetrain.data.sidecar import default_cache
from onetrain.data.stream_options import StreamOptions
from onetrain.data.versions import version_folder

Stamp = tuple[int, int, int]  # inode, bytes and time of change of a file: another stamp, other contents
CACHE_GIB = StreamOptions().cache_gib
_DOWNLOADS = 2  # a copy whose checksum is wrong is made again


class Store(Protocol):
    """Hands out local paths of a prepared folder's files."""

    name: str  # of the folder, for messages and for opening it again
    index_folders: tuple[Path, ...]  # beside the files, where what is computed from them may be kept

    def of_version(self, version: int) -> "Store":
        """The store of one version's files."""

    def path(self, stored: StoredFile) -> Path:
        """A local file of this size. Raises DamagedShardError when there is none."""

    def stamp(self, path: Path) -> Stamp | None:
        """What tells that a file is still the one that was opened, and that it is in use; None when it is gone."""

    def mend(self, stored: StoredFile) -> bool:
        """Whether `path` has something better to give for a file that was found to be damaged."""


class LocalStore:
    """A folder on a local or shared disk."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = local_folder(folder)
        self.name = str(self.folder)
        self.index_folders: tuple[Path, ...] = (self.folder / "index",)

    def of_version(self, version: int) -> "LocalStore":
        """See Store."""
        return LocalStore(self.folder / version_folder(version))

    def path(self, stored: StoredFile) -> Path:
        """The file itself."""
        path = self.folder / stored.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DamagedShardError(
                f"{path} cannot be read ({error.strerror}), but the manifest lists it. Copy it here again or run "
                "`onetrain prepare` again.",
                stored.file,
            ) from error
        if size != stored.bytes:
            raise DamagedShardError(
                f"{path} has {size} bytes, the manifest says {stored.bytes}: it is truncated or was replaced. Copy it "
                "again or run `onetrain prepare` again.",
                stored.file,
            )
        return path

    def stamp(self, path: Path) -> Stamp | None:
        """See Store."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def mend(self, stored: StoredFile) -> bool:
        """There is but the one file."""
        return False


class RemoteStore:
    """A folder that fsspec opens. Files are copied into the cache of this machine when they are first asked for."""

    index_folders: tuple[Path, ...] = ()

    def __init__(self, url: str, cache: Path, cache_gib: float = CACHE_GIB) -> None:
        self.name = url.rstrip("/")
        self.remote, self.cache = RemoteFolder(url), FileCache(cache / "copies", cache_gib)
        self._cache, self._gib = cache, cache_gib

    def of_version(self, version: int) -> "RemoteStore":
        """See Store."""
        within = version_folder(version)
        return RemoteStore(f"{self.name}/{within}" if within else self.name, self._cache, self._gib)

    def path(self, stored: StoredFile) -> Path:
        """A copy, whose size and checksum were those of the manifest when it was made."""

        def fetch(file: BinaryIO) -> None:
            for _ in range(_DOWNLOADS):
                try:
                    size, digest = self.remote.download(stored.file, file)
                except FileNotFoundError as error:
                    raise DamagedShardError(
                        f"{self.remote.where(stored.file)} is not there, but the manifest lists it. Copy it there "
                        "again or run `onetrain prepare` again.",
                        stored.file,
                    ) from error
                if (size, digest) == (stored.bytes, stored.xxh3_128):
                    return
            raise DamagedShardError(
                f"{self.remote.where(stored.file)} is damaged: it has {size} bytes with checksum {digest}, the "
                f"manifest says {stored.bytes} and {stored.xxh3_128}. Copy it there again or run `onetrain prepare` "
                "again.",
                stored.file,
            )

        name = posixpath.basename(stored.file)
        return self.cache.get(f"{stored.xxh3_128}-{name}", stored.bytes, fetch, stays=not name.startswith("shard-"))

    def stamp(self, path: Path) -> Stamp | None:
        """See Store. Keeps the copy from making room for others."""
        found = used(path)
        return None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns)

    def mend(self, stored: StoredFile) -> bool:
        """Removes a copy that is damaged itself, so that the next one is made from the folder."""
        path = self.path(stored)  # not what was mapped, where that was removed meanwhile
        if file_checksum(path) == stored.xxh3_128:
            return False
        path.unlink(missing_ok=True)
        return True

    def read(self, name: str) -> bytes:
        """All of a small file. FileNotFoundError when it is not there."""
        return self.remote.read(name)

    def copy(self, name: str, key: str) -> Path:
        """A copy of a file that no manifest lists; `key` names its contents. FileNotFoundError when it is not there."""

        def fetch(file: BinaryIO) -> None:
            self.remote.download(name, file)

        return self.cache.get(f"{key}-{posixpath.basename(name)}", None, fetch, stays=True)


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder` as a local path. Raises DataError for a remote one."""
    if is_remote(folder):
        raise DataError(
            f"{os.fspath(folder)} is not on a local disk. Training reads such a folder, but `onetrain prepare`, "
            "`tokenize` and `append` write in place: name a local folder, and copy it there when it is finished "
            "(manifest.json last)."
        )
    return Path(os.fspath(folder).removeprefix("file://"))


def open_store(folder: str | os.PathLike[str], options: StreamOptions | None = None) -> LocalStore | RemoteStore:
    """The store of a prepared folder. Of `options`, the cache matters, for remote folders."""
    options = options or StreamOptions()
    if not is_remote(folder):
        return LocalStore(folder)
    cache = default_cache() if options.cache is None else Path(options.cache)
    return RemoteStore(os.fspath(folder), cache, options.cache_gib)
