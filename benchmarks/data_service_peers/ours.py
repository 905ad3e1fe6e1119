"""onetrain's own stream, in process: features are computed from raw columns while batches are built."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from onetrain.data import batch as batches
from onetrain.data.cursor import Cursor
from onetrain.data.features import FeatureNames
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.steps import StepBuilder, StreamSpec
from onetrain.data.stream import LocalStream, Step
from onetrain.data.stream_options import StreamOptions

from . import prepared
from .histories import BATCH, BEHAVIOURS, FEATURES, REQUEST, WINDOW, Batch, Block

RESUME = "the cursor of a checkpoint"
SETTINGS = {
    "builder_threads": 2,
    "prefetch_steps": 4,
}
VARIANTS = [
    {"builder_threads": 1},
    {"builder_threads": 3},
    {"prefetch_steps": 8},
]


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """A prepared folder."""
    prepared.write(folder, blocks)


def spec(folder: Path) -> StreamSpec:
    """One sample a user: the history before its request."""
    return StreamSpec(
        prepared=str(folder),
        stream=StreamOptions(cache=str(folder.with_name(f"{folder.name}.cache")), **SETTINGS),
        batch=BatchOptions(max_context=WINDOW, target_behaviours=(BEHAVIOURS[REQUEST],)),
        features=FeatureNames(events=FEATURES),
        seed=0,
        global_batch_size=BATCH,
        micro_batches=1,
        ranks=1,
    )


def as_batch(step: Step) -> Batch:
    """The tensors that all systems deliver, out of all that a step holds."""
    (built,) = step.micro_batches
    (events,) = built.sequences.values()
    return {**{name: _padded(events, name) for name in FEATURES}, "length": events.length_B}


def _padded(events: batches.EventColumns, name: str) -> Any:
    """(B, WINDOW): a batch without any long history is narrower."""
    ids_BN = events.features[name]
    return ids_BN if ids_BN.shape[1] == WINDOW else F.pad(ids_BN, (0, WINDOW - ids_BN.shape[1]))


class Loader:
    """Whole batches of one epoch, from the state on if there is one."""

    def __init__(self, folder: Path, state: Any = None) -> None:
        steps = StepBuilder(spec(folder))
        self._stream = LocalStream(steps, 0)
        self._cursor = Cursor.from_json(state) if state else Cursor().updated(steps.sources.newest())
        self._steps = Manifest.load(folder).users // BATCH - self._cursor.position // BATCH

    def __iter__(self) -> Iterator[Batch]:
        for step in self._stream.steps(self._steps, self._cursor):
            self._cursor = step.cursor
            yield as_batch(step)

    def state(self) -> Any:
        """Where the epoch stands after the batches that were delivered."""
        return self._cursor.as_json()
