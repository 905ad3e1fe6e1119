"""onetrain's data service: the same stream, built by Ray actors of this machine. Start and resume include Ray's own."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.options import ClusterOptions
from onetrain.data.cursor import Cursor
from onetrain.data.manifest import Manifest
from onetrain.data.service.client import ServiceStream
from onetrain.data.service.start import data_service
from onetrain.data.steps import StepBuilder
from onetrain.data.stream_options import ServiceOptions

from . import ours, prepared
from .histories import BATCH, Batch, Block

RESUME = "the cursor of a checkpoint"
SETTINGS = {"actors": 2, "builder_threads": 1, "prefetch_steps": 6}
VARIANTS = [{"actors": 1, "builder_threads": 2}, {"prefetch_steps": 4}, {"prefetch_steps": 12}]


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """A prepared folder."""
    prepared.write(folder, blocks)


class Loader:
    """Whole batches of one epoch, from the state on if there is one."""

    def __init__(self, folder: Path, state: Any = None) -> None:
        service = ServiceOptions(actors=SETTINGS["actors"], memory_gib=2.0)
        given = {name: value for name, value in SETTINGS.items() if name != "actors"}
        spec = ours.spec(folder)
        spec = replace(spec, stream=replace(spec.stream, **given, service=service))
        self._open = contextlib.ExitStack()
        self._open.enter_context(ray_session(ClusterOptions(workers=1), service.actors, service.memory_gib))
        self._open.enter_context(data_service("benchmark", spec.stream, lambda line: None))
        steps = StepBuilder(spec)
        self._stream = ServiceStream(steps, 0, "benchmark")
        self._cursor = Cursor.from_json(state) if state else Cursor().updated(steps.sources.newest())
        self._steps = Manifest.load(folder).users // BATCH - self._cursor.position // BATCH

    def __iter__(self) -> Iterator[Batch]:
        for step in self._stream.steps(self._steps, self._cursor):
            self._cursor = step.cursor
            yield ours.as_batch(step)
        self.close()

    def state(self) -> Any:
        """Where the epoch stands after the batches that were delivered."""
        return self._cursor.as_json()

    def close(self) -> None:
        """End the actors and Ray."""
        self._open.close()

    def __del__(self) -> None:
        self.close()
