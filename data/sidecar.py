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
from onetrain.data.mapping import map_file

Description = dict[str, Any]
DESCRIPTION = "description.json"  # written last: what it says of the files beside it is true


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
    Raises DataError when none of the folders can be written.
    """
    there = [folder / name for folder in folders]
    there += [path for folder in folders for path in sorted(folder.glob(f"{name}-*"))]
    for path in there:
        if (path / DESCRIPTION).is_file():
            description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
            if path.name == name + variant(description) and usable(description):
                return path, description
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
            path = folder / (name + variant(description))
            try:
                os.rename(staging, path)
            except OSError:  # another process was faster
                if not (path / DESCRIPTION).is_file():
                    raise
            return path, description
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
    return map_file(path, dtype) if path.exists() else np.empty(0, dtype)
