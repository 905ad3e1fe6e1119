"""Chosen events of every sample of a batch, flat: each row is a range of its user's history, or some events of one.

Legend: B samples, R events of the ranges, E of them chosen, one row after another.
"""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrain.data.shards import Histories

Ids = NDArray[np.int64]


class EventRows:
    """Events [start, stop) of each sample's user; with `chosen_R`, those of them for which it is True."""

    def __init__(
        self, histories: Histories, start_B: Ids, stop_B: Ids, chosen_R: NDArray[np.bool_] | None = None
    ) -> None:
        self._histories, self._start_B, self._stop_B, self._chosen_R = histories, start_B, stop_B, chosen_R
        self._range_B = stop_B - start_B
        self._ranges: dict[str, NDArray[Any]] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self.length_B: Ids = self._range_B
        self.first_B: Ids | None = start_B if chosen_R is None else None  # of events that follow one another
        if chosen_R is not None:
            self.length_B = row_sums(chosen_R, self._range_B)

    @cached_property
    def place_E(self) -> Ids:  # noqa: N802
        """Number of each event within its user's history."""
        return self._kept(ramp(self._range_B) + np.repeat(self._start_B, self._range_B))

    def column(self, name: str) -> NDArray[Any]:
        """(E,) values of an event column."""
        if name not in self._columns:
            self._columns[name] = self._kept(self._range(name))
        return self._columns[name]

    def of_row(self, values_B: NDArray[Any]) -> NDArray[Any]:
        """(E,) one value per sample, repeated for each of its events."""
        return np.repeat(values_B, self.length_B)

    def gaps(self) -> Ids:
        """(E,) milliseconds since the user's event before, whether or not that one is chosen; 0 for the first."""
        time_R = self._range("timestamp_ms")
        gap_R = np.empty_like(time_R)
        np.subtract(time_R[1:], time_R[:-1], out=gap_R[1:])
        begin_B, some = np.cumsum(self._range_B) - self._range_B, self._range_B > 0
        before_B = np.maximum(self._start_B - 1, 0)  # the first event has itself before it
        time_before_B = self._histories.events("timestamp_ms", before_B, before_B + some)
        gap_R[begin_B[some]] = time_R[begin_B[some]] - time_before_B
        return self._kept(gap_R)

    def _range(self, name: str) -> NDArray[Any]:
        """(R,) values of an event column, of chosen events and others."""
        if name not in self._ranges:
            self._ranges[name] = self._histories.events(name, self._start_B, self._stop_B)
        return self._ranges[name]

    def _kept(self, values_R: NDArray[Any]) -> NDArray[Any]:
        return values_R if self._chosen_R is None else values_R[self._chosen_R]


def row_sums(values_R: NDArray[np.bool_], length_B: Ids) -> Ids:
    """(B,) how many of each row's values are True."""
    total, ends = np.concatenate([[0], np.cumsum(values_R)]), np.cumsum(length_B)
    return total[ends] - total[ends - length_B]


def ramp(length_B: Ids) -> Ids:
    """0, 1, ... length - 1 of every row, one row after another."""
    ends = np.cumsum(length_B)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - length_B, length_B)
