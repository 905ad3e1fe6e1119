"""Where a run's checkpoints are, and which of them is the best by validation.

<run>/checkpoints/step_00000040/ holds one, unless train.checkpoint_path names another place; <run>/best.json names the
best one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from onetrain.cluster.atomic import write_atomically
from onetrain.launcher.config import run_folder
from onetrain.launcher.console import print_warning
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.parallel.checkpoint_header import sync
from onetrain.parallel.checkpoint_store import CheckpointStore, FolderStore, open_checkpoint, open_store, step_name

BEST = "best.json"


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    step: int
    metric: str
    value: float

    def save(self, run: Path) -> None:
        """Write <run>/best.json, atomically."""
        write_atomically(run / BEST, json.dumps(asdict(self)) + "\n", durable=True)
        sync(run)


def run_store(config: RunConfig) -> CheckpointStore:
    """Where a run keeps its checkpoints."""
    place = config.train.checkpoint_path
    return FolderStore(run_folder(config) / "checkpoints") if place is None else open_store(place, config.stream.cache)


def load_best(run: Path, store: CheckpointStore | None = None) -> Best | None:
    """The best validation of a run whose checkpoint is still there, or None."""
    path = run / BEST
    try:
        best = Best(**json.loads(path.read_text(encoding="utf-8")))
        name = step_name(best.step)
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        print_warning(f"{path} cannot be read ({type(error).__name__}: {error}): no checkpoint counts as the best")
        return None
    store = store or FolderStore(run / "checkpoints")
    return best if store.exists(name) else None


def find_checkpoint(run: Path, which: str, store: CheckpointStore | None = None) -> Path:
    """The local folder of what "best" (the newest, if no validation was made), "latest", a path or a URL means.

    `store` is where the run keeps its checkpoints, <run>/checkpoints unless told; what lies elsewhere is copied here.
    Raises ConfigError if it is not there.
    """
    store = store or FolderStore(run / "checkpoints")
    if which in ("best", "latest"):
        best = load_best(run, store) if which == "best" else None
        name = step_name(best.step) if best else store.latest()
        if name is None:
            place = store.where("").rstrip("/")
            raise ConfigError(f"{place} holds no checkpoint. Run `onetrain train` first, or give a folder.")
        return store.fetch(name)
    store, name = open_checkpoint(which)
    if not store.exists(name):
        raise ConfigError(f"{which} is no checkpoint: it has no state.json. Give best, latest, or a step_... folder.")
    return store.fetch(name)
