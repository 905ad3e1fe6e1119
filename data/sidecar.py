"""Files that are computed once from a prepared folder and then memory-mapped by every process of every run."""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.fingerprint import file_checksum, json_fingerprint
from onetrain.data.mapping import map_file

Description = dict[str, Any]
DESCRIPTION = "description.json"  # written last, with size and checksum of every file beside it and its own
_log = logging.getLogger(__name__)


def default_cache() -> Path:
    """The cache folder of this user on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onetrain"


def sidecar(
    folders: Sequence[Path],
    name: str,
    build: Callable[[Path], Description],
    variant: Callable[[Description], str] = lambda description: "",
    usable: Callable[[Description], bool] = lambda description: True,
) -> tuple[Path, Description]:
    """The folder `name`, or else a variant of it, in the first of `folders` that has one that is `usable`; else built
    in the first that can be written, and named `name` + `variant(description)`.

    `build(folder)` writes files and returns their description. Processes may build at the same time: one result stays.
    Files are held against their sizes and checksums; a folder in which one is not what was written is removed.
    Raises DataError when none of the folders can be written.
    """
    there = [folder / name for folder in folders]
    there += [path for folder in folders for path in sorted(folder.glob(f"{name}-*"))]
    for path in there:
        found = _read(path) or _read_again(path)
        if found is not None and path.name == name + variant(found) and usable(found):
            return path, found
    problems = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
            continue
        try:
            description = build(staging)
            _write(staging, description)
            staging.chmod(0o755)  # mkdtemp's folder is private
            path = folder / (name + variant(description))
            try:
                os.rename(staging, path)
            except OSError:  # another process was faster
                if _read(path) is None:
                    raise
            _sync(folder)
            return path, description
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    raise DataError(f"An index of the samples can be written nowhere ({'; '.join(problems)}). Set stream.cache.")


def _write(folder: Path, description: Description) -> None:
    """Describe what lies in the folder, and have all of it on the disk."""
    paths = sorted(folder.iterdir())
    files = {path.name: [path.stat().st_size, file_checksum(path)] for path in paths}
    content = {"description": description, "files": files}
    text = json.dumps(content | {"xxh3_128": json_fingerprint(content)})
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    for path in (*paths, folder / DESCRIPTION, folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems refuse folders
            raise
    finally:
        os.close(descriptor)


def _read(folder: Path) -> Description | None:
    """The description of a folder that holds what was written; else None."""
    try:
        content = json.loads((folder / DESCRIPTION).read_bytes())
        own = content.pop("xxh3_128")
        sound = own == json_fingerprint(content) and all(
            (folder / name).stat().st_size == size and file_checksum(folder / name) == checksum
            for name, (size, checksum) in content["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    description: Description = content["description"]
    return description if sound else None


def _read_again(folder: Path) -> Description | None:
    """Remove a folder that is not what was written, if it is there, unless another process has done it meanwhile."""
    if not folder.exists():
        return None
    try:
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else a process that looked before could remove what was made since
            found = _read(folder)
            if found is None and folder.exists():
                _log.warning("%s is damaged, or of an older format, and is made again.", folder)
                away = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
                os.rename(folder, away)
                shutil.rmtree(away, ignore_errors=True)
            return found
    except OSError as error:
        _log.warning("%s is damaged, or of an older format, and cannot be removed (%s).", folder, error.strerror)
        return None


def append(path: Path, values: NDArray[Any]) -> None:
    """Add records to a file that `mapped` reads."""
    with path.open("ab") as file:
        np.ascontiguousarray(values).tofile(file)


def mapped(path: Path, dtype: Any) -> NDArray[Any]:
    """All records of a file, memory-mapped; a missing or empty file has none."""
    return map_file(path, dtype) if path.exists() else np.empty(0, dtype)
