"""Where the files of a prepared folder are read from: a local folder, whose files are checked for their size."""

import os
from pathlib import Path
from typing import Protocol

from onetrain.data.errors import DamagedShardError, DataError
from onetrain.data.manifest import StoredFile
from onetrain.data.stream_options import StreamOptions
from onetrain.data.versions import version_folder


class Store(Protocol):
    """Hands out local paths of a prepared folder's files."""

    name: str  # of the folder, for messages
    index_folders: tuple[Path, ...]  # beside the files, where what is computed from them may be kept

    def path(self, stored: StoredFile) -> Path:
        """A local file of these contents. Raises DamagedShardError when there is none of this size."""


class LocalStore:
    """A folder on a local or shared disk."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = local_folder(folder)
        self.name = str(self.folder)
        self.index_folders = (self.folder / "index",)

    def of_version(self, version: int) -> "LocalStore":
        """The store of one version's files."""
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


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder` as a local path. Raises DataError for a remote one."""
    text = os.fspath(folder).removeprefix("file://")
    if "://" in text:
        raise DataError(f"{text} is not on a local disk. Copy the folder to each machine, and name the copy.")
    return Path(text)


def open_store(folder: str, options: StreamOptions) -> LocalStore:
    """The store of a prepared folder."""
    return LocalStore(folder)
