"""Which checkpoints a run keeps: the newest few, and the best by validation.

<run>/checkpoints/step_00000040/ holds one; <run>/best.json names the best one.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from onetrain.launcher.errors import ConfigError
from onetrain.parallel.checkpoint import latest, step_folder


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    step: int
    metric: str
    value: float

    def save(self, run: Path) -> None:
        """Write <run>/best.json, atomically."""
        temporary = run / f".best.json.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        os.replace(temporary, run / "best.json")


def folder_of_checkpoints(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def load_best(run: Path) -> Best | None:
    """The best validation of a run whose checkpoint is still there, or None."""
    path = run / "best.json"
    if not path.exists():
        return None
    best = Best(**json.loads(path.read_text(encoding="utf-8")))
    return best if step_folder(folder_of_checkpoints(run), best.step).exists() else None


def find_checkpoint(run: Path, which: str) -> Path:
    """The folder that "best" (the newest, if no validation was made), "latest" or a path means.

    Raises ConfigError if it is not there.
    """
    folder: Path | None
    if which in ("best", "latest"):
        best = load_best(run) if which == "best" else None
        checkpoints = folder_of_checkpoints(run)
        folder = step_folder(checkpoints, best.step) if best else latest(checkpoints)
        if folder is None:
            raise ConfigError(f"{checkpoints} holds no checkpoint. Run `onetrain train` first, or give a folder.")
        return folder
    folder = Path(which)
    if not (folder / "state.json").exists():
        raise ConfigError(f"{folder} is no checkpoint: it has no state.json. Give best, latest, or a step_... folder.")
    return folder
