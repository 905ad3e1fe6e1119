"""Where checkpoints are kept: a local or shared folder, or any storage that fsspec reaches (s3://, hdfs://, ...).

A checkpoint is there once its state.json is. In a folder it is written beside its place and renamed. In other storage
the data files go first and state.json last, a deletion begins with state.json, and reading goes through a copy on this
machine, made once for all its processes and held against the checksums.
"""

import contextlib
import fcntl
import json
import os
import posixpath
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import xxhash

from onetrain.parallel.checkpoint_header import STATE, damage, parse_header, read_header, sync
from onetrain.parallel.errors import DamagedCheckpointError, ParallelError, StorageError

DAMAGED = ".damaged"
WRITING, OLD, REMOVED = ".writing", ".old", ".removed"  # of hidden folders
STEP = "step_"
PAUSES_S = (0.5, 2.0, 8.0)  # before each further try of remote storage
FORGET_S = 3600.0  # copies older than this make room for the next
T = TypeVar("T")


def step_name(step: int) -> str:
    """What the checkpoint after `step` optimizer steps is called; names sort as steps do."""
    return f"{STEP}{step:08d}"


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removeprefix(STEP))


def open_store(place: str | os.PathLike[str], cache: str | None = None) -> "CheckpointStore":
    """The store of a folder or URL; `cache` is the folder for copies (~/.cache/onetrain unless told)."""
    text = os.fspath(place)
    if "://" not in text:
        return FolderStore(Path(text))
    return RemoteStore(text, Path(cache) if cache else Path.home() / ".cache" / "onetrain")


def open_checkpoint(place: str | os.PathLike[str], cache: str | None = None) -> tuple["CheckpointStore", str]:
    """The store and the name of one checkpoint, given its folder or URL."""
    text = os.fspath(place).rstrip("/")
    if "://" not in text:
        path = Path(text)
        return FolderStore(path.parent), path.name
    parent, _, name = text.rpartition("/")
    return open_store(parent, cache), name


class CheckpointStore(ABC):
    """Checkpoints by name."""

    @abstractmethod
    def where(self, name: str) -> str:
        """Path or URL of a checkpoint, for people."""

    @abstractmethod
    def names(self) -> list[str]:
        """Step checkpoints that are there, oldest first."""

    def candidates(self) -> list[str]:
        """Those, and what looks as if it had been one."""
        return self.names()

    @abstractmethod
    def damaged(self) -> list[str]:
        """What `set_aside` has put aside."""

    @abstractmethod
    def header(self, name: str) -> dict[str, Any]:
        """The content of state.json. DamagedCheckpointError where it cannot be read."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """A local folder with the checkpoint, which stays for an hour at least."""

    @abstractmethod
    def staging(self, name: str) -> Path:
        """An empty local folder to write the checkpoint in."""

    @abstractmethod
    def commit(self, name: str) -> None:
        """Makes what is in the staging folder the checkpoint of that name, at once."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Removes the staging folder."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Deletes a checkpoint."""

    @abstractmethod
    def taken(self, name: str) -> bool:
        """Whether anything but an empty folder is in a checkpoint's place."""

    @abstractmethod
    def recover(self) -> None:
        """Brings back a checkpoint that a crash has left under another name."""

    @abstractmethod
    def sweep(self) -> None:
        """Deletes what crashes have left half-written or half-deleted. Nobody may be writing."""

    @abstractmethod
    def set_aside(self, name: str) -> str:
        """Renames a damaged checkpoint, so that it is none any more; what it is called now."""

    @abstractmethod
    def problem(self, name: str) -> str | None:
        """What is wrong with the sizes of a checkpoint's files; quick."""

    def exists(self, name: str) -> bool:
        """Whether there is such a checkpoint."""
        return name in self.names()

    def latest(self) -> str | None:
        """The checkpoint with the most steps."""
        return max(self.names(), default=None)

    def prune(self, keep_last: int, keep: Iterable[str] = (), keep_every: int = 0) -> list[str]:
        """Deletes all but the `keep_last` newest, every `keep_every`-th step and `keep`; returns the deleted."""
        names = self.names()
        kept = {*keep, *names[max(0, len(names) - keep_last) :]}
        deleted = [n for n in names if n not in kept and not (keep_every and step_of(n) % keep_every == 0)]
        for name in deleted:
            self.remove(name)
        return deleted


class FolderStore(CheckpointStore):
    """A folder that every rank sees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def where(self, name: str) -> str:
        """Path or URL of a checkpoint."""
        return str(self.folder / name)

    def names(self) -> list[str]:
        """Step checkpoints, oldest first."""
        found = (path.parent.name for path in self.folder.glob(f"{STEP}*/{STATE}"))
        return sorted(name for name in found if _is_step(name))

    def candidates(self) -> list[str]:
        """All folders named like one."""
        return sorted(path.name for path in self.folder.glob(f"{STEP}*") if _is_step(path.name) and path.is_dir())

    def damaged(self) -> list[str]:
        """What was set aside."""
        return sorted(path.name for path in self.folder.glob(f"{STEP}*{DAMAGED}*"))

    def exists(self, name: str) -> bool:
        """Whether state.json is there."""
        return (self.folder / name / STATE).exists()

    def header(self, name: str) -> dict[str, Any]:
        """The content of state.json."""
        return read_header(self.folder / name)

    def problem(self, name: str) -> str | None:
        """By the sizes of the files."""
        return damage(self.folder / name, self.header(name), contents=False)

    def fetch(self, name: str) -> Path:
        """A local folder with the checkpoint."""
        return self.folder / name

    def staging(self, name: str) -> Path:
        """An empty local folder."""
        temporary = self._temporary(name)
        self._recover(name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, name: str) -> None:
        """What was staged takes its place; only a checkpoint of that name is replaced."""
        folder, old = self.folder / name, self._old(name)
        if self.taken(name) and not self.exists(name):
            raise ParallelError(f"{folder} is there already and is no checkpoint (it has no {STATE}): move it away.")
        sync(self._temporary(name))
        if folder.exists():
            os.rename(folder, old)
        os.rename(self._temporary(name), folder)
        sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self, name: str) -> None:
        """Removes the staging folder."""
        shutil.rmtree(self._temporary(name), ignore_errors=True)

    def remove(self, name: str) -> None:
        """Deletes a checkpoint, which is none from the first moment on."""
        removed = self.folder / f".{name}{REMOVED}"
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(self.folder / name, removed)
        sync(self.folder)
        shutil.rmtree(removed)

    def taken(self, name: str) -> bool:
        """Whether there is a file, or a folder that is not empty."""
        path = self.folder / name
        return any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink()

    def recover(self) -> None:
        """After a crash between the two renames of `commit`."""
        for path in self.folder.glob(f".{STEP}*{OLD}"):
            self._recover(path.name[1 : -len(OLD)])

    def sweep(self) -> None:
        """Deletes hidden folders of steps."""
        for suffix in (WRITING, REMOVED):
            for path in self.folder.glob(f".{STEP}*{suffix}"):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, name: str) -> str:
        """Renames a damaged checkpoint."""
        aside = _free(name, lambda other: (self.folder / other).exists())
        os.rename(self.folder / name, self.folder / aside)
        return self.where(aside)

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}{WRITING}"

    def _old(self, name: str) -> Path:
        return self.folder / f".{name}{OLD}"

    def _recover(self, name: str) -> None:
        old = self._old(name)
        if old.exists() and not self.taken(name):
            os.rename(old, self.folder / name)
        shutil.rmtree(old, ignore_errors=True)


class RemoteStore(CheckpointStore):
    """Storage behind a URL, with a folder of this machine for copies and for what is being written."""

    def __init__(self, url: str, cache: Path) -> None:
        self.url = url.rstrip("/")
        self.cache = cache / "checkpoints" / xxhash.xxh3_64_hexdigest(self.url.encode())
        try:
            self.system, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ParallelError(
                f"{self.url} cannot be opened: {error}. Install what fsspec needs for it (for s3:// "
                "`pip install onetrain[s3]`), or correct train.checkpoint_path."
            ) from error
        self.root = str(root).rstrip("/")

    def where(self, name: str) -> str:
        """Path or URL of a checkpoint."""
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        """Step checkpoints, oldest first."""
        return [name for name in self._folders() if _is_step(name) and self.exists(name)]

    def damaged(self) -> list[str]:
        """What was set aside."""
        found = [name for name in self._folders() if _is_step(name)]
        return [name for name in found if not self.exists(name) and self._there(f"{name}/{STATE}{DAMAGED}")]

    def exists(self, name: str) -> bool:
        """Whether state.json is there."""
        return self._there(f"{name}/{STATE}")

    def header(self, name: str) -> dict[str, Any]:
        """The content of state.json."""

        def read() -> bytes:
            return bytes(self.system.cat_file(self._at(f"{name}/{STATE}")))

        return parse_header(self._patiently("read", f"{name}/{STATE}", read), self.where(name))

    def problem(self, name: str) -> str | None:
        """By the sizes of the files."""
        for file, check in self.header(name)["files"].items():
            size = self._size(f"{name}/{file}") if self._there(f"{name}/{file}") else 0
            if size != check["bytes"]:
                return f"{file} has {size} bytes instead of {check['bytes']}"
        return None

    def fetch(self, name: str) -> Path:
        """A local folder with the checkpoint. StorageError where this machine has no room for it."""
        try:
            return self._copy(name)
        except OSError as error:
            raise StorageError(
                f"Checkpoint {self.where(name)} cannot be copied to {self.cache}: {error}. Free space there, or set "
                "stream.cache to another folder."
            ) from error

    def _copy(self, name: str) -> Path:
        header, copy = self.header(name), self.cache / "copies" / name
        with _locked(self.cache / "copies.lock"):
            if copy.exists() and _same_header(copy, header) and not damage(copy, header, contents=False):
                return copy
            self._forget_old_copies()
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir(parents=True)
            try:
                for file in header["files"]:
                    self._download(f"{name}/{file}", copy / file)
                if problem := damage(copy, header):
                    raise DamagedCheckpointError(f"Checkpoint {self.where(name)} is damaged: {problem}.")
                (copy / STATE).write_text(json.dumps(header))
            except BaseException:
                shutil.rmtree(copy, ignore_errors=True)
                raise
        return copy

    def staging(self, name: str) -> Path:
        """An empty local folder."""
        temporary = self._temporary(name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, name: str) -> None:
        """What was staged takes its place."""
        if self.exists(name):
            self._delete(f"{name}/{STATE}")
        files = sorted(path.name for path in self._temporary(name).iterdir() if path.name != STATE)
        with contextlib.suppress(Exception):  # stores of objects have no folders
            self.system.makedirs(self._at(name), exist_ok=True)
        for file in [*files, STATE]:
            source, target = self._temporary(name) / file, f"{name}/{file}"
            self._patiently("written", target, partial(self.system.put_file, str(source), self._at(target)))
            size = self._patiently("read", target, partial(self._size, target))
            if size != source.stat().st_size:
                raise ParallelError(f"{self.url}/{target} has {size} bytes instead of {source.stat().st_size}.")
        self.discard(name)

    def discard(self, name: str) -> None:
        """Removes the staging folder."""
        shutil.rmtree(self._temporary(name), ignore_errors=True)

    def remove(self, name: str) -> None:
        """Deletes a checkpoint, state.json first."""
        self._delete(f"{name}/{STATE}")
        self._patiently("deleted", name, lambda: self.system.rm(self._at(name), recursive=True))

    def set_aside(self, name: str) -> str:
        """Renames a damaged checkpoint."""
        source, target = self._at(f"{name}/{STATE}"), self._at(f"{name}/{STATE}{DAMAGED}")
        self._patiently("renamed", f"{name}/{STATE}", lambda: self.system.mv(source, target))
        return f"{self.where(name)}/{STATE}{DAMAGED}"

    def taken(self, name: str) -> bool:
        """Whether anything lies below that name."""

        def look() -> bool:
            self.system.invalidate_cache()
            try:
                found = self.system.ls(self._at(name), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return bool(self.system.exists(self._at(name)))
            return any(str(path).rstrip("/") for path in found)

        return self._patiently("listed", name, look)

    def recover(self) -> None:
        """Nothing is renamed here."""

    def sweep(self) -> None:
        """Deletes what processes of this machine that are no more have left to be uploaded."""
        for path in (self.cache / "staging").glob(f"{STEP}*.*"):
            pid = path.name.rpartition(".")[2]
            if pid.isdigit() and not Path("/proc", pid).exists() and time.time() - path.stat().st_mtime > FORGET_S:
                shutil.rmtree(path, ignore_errors=True)

    def _forget_old_copies(self) -> None:
        for copy in (self.cache / "copies").glob("*"):
            if time.time() - copy.stat().st_mtime > FORGET_S:
                shutil.rmtree(copy, ignore_errors=True)

    def _at(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def _temporary(self, name: str) -> Path:
        return self.cache / "staging" / f"{name}.{os.getpid()}"

    def _folders(self) -> list[str]:
        def look() -> list[str]:
            self.system.invalidate_cache()  # listings that were kept would hide what is new
            try:
                found = self.system.ls(self.root, detail=False)
            except FileNotFoundError:
                return []
            return sorted({posixpath.basename(str(path).rstrip("/")) for path in found})

        return self._patiently("listed", "", look)

    def _there(self, name: str) -> bool:
        def look() -> bool:
            self.system.invalidate_cache()
            return bool(self.system.exists(self._at(name)))

        return self._patiently("read", name, look)

    def _size(self, name: str) -> int:
        self.system.invalidate_cache()
        return int(self.system.size(self._at(name)))

    def _delete(self, name: str) -> None:
        self._patiently("deleted", name, lambda: self.system.rm_file(self._at(name)))

    def _download(self, name: str, target: Path) -> None:
        def copy() -> None:
            try:
                self.system.get_file(self._at(name), str(target))
            except FileNotFoundError as error:
                raise DamagedCheckpointError(f"{self.url}/{name} is missing. Use another checkpoint.") from error

        self._patiently("read", name, copy)

    def _patiently(self, verb: str, name: str, action: Callable[[], T]) -> T:
        for pause in (*PAUSES_S, None):
            try:
                return action()
            except (ParallelError, FileNotFoundError):
                raise
            except Exception as error:  # every storage library has exceptions of its own
                if pause is None or isinstance(error, PermissionError):
                    kind = ParallelError if isinstance(error, PermissionError) else StorageError
                    raise kind(
                        f"{self.url}/{name} cannot be {verb} ({type(error).__name__}: {error}). Look at the "
                        "network, the storage and this machine's credentials for it."
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _is_step(name: str) -> bool:
    return name.startswith(STEP) and name.removeprefix(STEP).isdigit()


def _free(name: str, taken: Callable[[str], bool]) -> str:
    candidates = [f"{name}{DAMAGED}", *(f"{name}{DAMAGED}{number}" for number in range(2, 100))]
    return next(other for other in candidates if not taken(other))


def _same_header(folder: Path, header: dict[str, Any]) -> bool:
    try:
        return bool(read_header(folder) == header)
    except ParallelError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
