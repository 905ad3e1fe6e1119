"""Pathways: which events of a user's history before a request each behaviour sequence holds.

Legend: B samples, R events of the ranges that are looked at, one row after another.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.event_rows import EventRows, row_sums
from onetrain.data.manifest import Manifest
from onetrain.data.options import PathwayOptions
from onetrain.data.samples import SampleRows
from onetrain.data.schema import nearest
from onetrain.data.shards import Histories

Ids = NDArray[np.int64]
FIRST_LOOK = 4  # times the events that are wanted, back from the request; as much again and more while they are too few


class Pathway:
    """One entry of batch.pathways. Raises DataError for a behaviour or scenario that the data do not have."""

    def __init__(self, name: str, options: PathwayOptions, max_context: int, manifest: Manifest) -> None:
        self.length = max_context if options.length is None else options.length
        self.is_window = options == PathwayOptions()
        self.skip, self.align = options.skip, options.align or 1
        self.min_watched = options.min_watched
        self.behaviours = _passing(options.behaviours, manifest.behaviours, f"batch.pathways.{name}.behaviours")
        self.scenarios = _passing(options.scenarios, manifest.scenarios, f"batch.pathways.{name}.scenarios")
        self.is_filtered = not (self.behaviours is None and self.scenarios is None and self.min_watched is None)

    def events(self, rows: SampleRows, histories: Histories) -> EventRows:
        """The chosen events of each sample, oldest first."""
        if self.is_window:  # with a shared context it may begin later than max_context events before its end
            return EventRows(histories, rows.start_B, rows.end_B)
        if self.is_filtered:
            return self._filtered(rows, histories)
        count_B = np.maximum(rows.end_B - self.skip, 0)
        return EventRows(histories, self._first(count_B), count_B)

    def _first(self, count_B: Ids) -> Ids:
        """Number of the oldest event that is kept of `count`."""
        return -(-np.maximum(count_B - self.length, 0) // self.align) * self.align

    def _filtered(self, rows: SampleRows, histories: Histories) -> EventRows:
        begin_B = self._far_enough_back(rows.end_B, histories)
        passes_R = self._passes(histories, begin_B, rows.end_B)
        found_B = row_sums(passes_R, rows.end_B - begin_B)
        number_R = np.cumsum(passes_R) - 1 - np.repeat(np.cumsum(found_B) - found_B, rows.end_B - begin_B)
        count_B = np.maximum(found_B - self.skip, 0)
        within = rows.end_B - begin_B
        kept_R = (
            passes_R & (number_R >= np.repeat(self._first(count_B), within)) & (number_R < np.repeat(count_B, within))
        )
        return EventRows(histories, begin_B, rows.end_B, kept_R)

    def _far_enough_back(self, end_B: Ids, histories: Histories) -> Ids:
        """Where to begin looking so that enough events pass; the number of an event counts from the very first one."""
        begin_B = np.zeros_like(end_B)
        wanted = self.length + self.skip
        if self.align > 1:
            return begin_B
        look = FIRST_LOOK * wanted
        unsure = end_B > look
        while unsure.any():
            begin_B[unsure] = np.maximum(end_B[unsure] - look, 0)
            tried_B = np.where(unsure, begin_B, end_B)  # nothing of the other rows
            found_B = row_sums(self._passes(histories, tried_B, end_B), end_B - tried_B)
            look *= FIRST_LOOK
            unsure &= (found_B < wanted) & (begin_B > 0)
        return begin_B

    def _passes(self, histories: Histories, begin_B: Ids, end_B: Ids) -> NDArray[np.bool_]:
        passes_R = np.ones(int((end_B - begin_B).sum()), dtype=bool)
        if self.behaviours is not None:
            passes_R &= self.behaviours[histories.events("behaviour", begin_B, end_B)]
        if self.scenarios is not None:
            passes_R &= self.scenarios[histories.events("scenario", begin_B, end_B)]
        if self.min_watched is not None:
            watch_R, duration_R = (histories.events(name, begin_B, end_B) for name in ("watch_ms", "duration_ms"))
            known_R = (watch_R >= 0) & (duration_R > 0)
            passes_R &= known_R & (watch_R / np.maximum(duration_R, 1) >= self.min_watched)
        return passes_R


def _passing(wanted: Sequence[str], known: Sequence[str], setting: str) -> NDArray[np.bool_] | None:
    """For each known name whether it is wanted; None when all are."""
    for name in wanted:
        if name not in known:
            raise DataError(
                f"{setting} names {name!r}; the prepared data have {', '.join(known)}.{nearest(name, known)}"
            )
    return np.isin(known, wanted) if wanted else None
