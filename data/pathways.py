"""Pathways: which events of a user's history before a request each behaviour sequence holds."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest
from onetrain.data.options import PathwayOptions
from onetrain.data.samples import Sample
from onetrain.data.schema import nearest
from onetrain.data.shards import UserSequence


class Pathway:
    """One entry of batch.pathways. Raises DataError for a behaviour or scenario that the data do not have."""

    def __init__(self, name: str, options: PathwayOptions, max_context: int, manifest: Manifest) -> None:
        self.length = max_context if options.length is None else options.length
        self.is_window = options == PathwayOptions()
        self.skip, self.align = options.skip, options.align or 1
        self.min_watched = options.min_watched
        self.behaviours = _passing(options.behaviours, manifest.behaviours, f"batch.pathways.{name}.behaviours")
        self.scenarios = _passing(options.scenarios, manifest.scenarios, f"batch.pathways.{name}.scenarios")

    def events(self, sample: Sample) -> NDArray[np.int64]:
        """Numbers of the chosen events within the user's whole history before the request, oldest first."""
        if self.is_window:  # with a shared context it may begin later than max_context events before its end
            return np.arange(sample.start, sample.end)
        end = sample.end
        if self.behaviours is None and self.scenarios is None and self.min_watched is None:
            count = max(0, end - self.skip)
            return np.arange(self._first(count), count)
        passing = np.flatnonzero(self._passes(sample.user, end))
        count = max(0, len(passing) - self.skip)
        return passing[self._first(count) : count]

    def _first(self, count: int) -> int:
        """Number of the oldest event that is kept of `count`."""
        return -(-max(0, count - self.length) // self.align) * self.align

    def _passes(self, user: UserSequence, end: int) -> NDArray[np.bool_]:
        passes = np.ones(end, dtype=bool)
        if self.behaviours is not None:
            passes &= self.behaviours[user.behaviour[:end]]
        if self.scenarios is not None:
            passes &= self.scenarios[user.scenario[:end]]
        if self.min_watched is not None:
            watch, duration = user.watch_ms[:end], user.duration_ms[:end]
            passes &= (watch >= 0) & (duration > 0) & (watch / np.maximum(duration, 1) >= self.min_watched)
        return passes


def _passing(wanted: Sequence[str], known: Sequence[str], setting: str) -> NDArray[np.bool_] | None:
    """For each known name whether it is wanted; None when all are."""
    for name in wanted:
        if name not in known:
            raise DataError(
                f"{setting} names {name!r}; the prepared data have {', '.join(known)}.{nearest(name, known)}"
            )
    return np.isin(known, wanted) if wanted else None
