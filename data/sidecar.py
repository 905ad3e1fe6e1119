"""Files that are computed once from a prepared folder and then memory-mapped by every process of every run."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrain.data.errors import DataError

DESCRIPTION = "description.json"  # written last: what it says of the files beside it is true


def default_cache() -> Path:
    """The cache folder of this user on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onetrain"


def sidecar(folders: Sequence[Path], name: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder `name` in the first of `folders` that has it, else built in the first that can be written.

    `build(folder)` writes files and returns their description. Processes may build at the same time: one result stays.
    Raises DataError when none of the folders can be written.
    """
    for folder in folders:
        if (folder / name / DESCRIPTION).is_file():
            return folder / name, json.loads((folder / name / DESCRIPTION).read_text(encoding="utf-8"))
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
            (staging / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")
            staging.chmod(0o755)  # mkdtemp's folder is private
            try:
                os.rename(staging, folder / name)
            except OSError:  # another process was faster
                if not (folder / name / DESCRIPTION).is_file():
                    raise
            return folder / name, description
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    raise DataError(f"An index of the samples can be written nowhere ({'; '.join(problems)}). Set stream.cache.")


def append(path: Path, values: NDArray[Any]) -> None:
    """Add records to a file that `mapped` reads."""
    with path.open("ab") as file:
        np.ascontiguousarray(values).tofile(file)


def mapped(path: Path, dtype: Any) -> NDArray[Any]:
    """All records of a file, memory-mapped; a missing or empty file has none."""
    if not path.exists() or path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
