"""Which of a user's events train, validate and test; see SplitOptions for the two protocols."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onetrain.data.errors import DataError
from onetrain.data.options import SplitOptions

_SIGN = np.uint64(1 << 63)  # flips int64 into uint64 of the same order
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Split:
    """A decided split. `valid_from` and `test_from` are epoch milliseconds, None for leave_one_out."""

    kind: str
    valid_from: int | None = None
    test_from: int | None = None

    def starts(self, lengths: np.ndarray, timestamps_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """valid_start and test_start of users of these lengths, whose events lie one after another, oldest first."""
        if self.valid_from is None or self.test_from is None:
            held_out = lengths >= 3
            return np.where(held_out, lengths - 2, lengths), np.where(held_out, lengths - 1, lengths)
        first = np.cumsum(lengths) - lengths
        before_valid = np.add.reduceat(timestamps_ms < self.valid_from, first, dtype=np.int64)
        before_test = np.add.reduceat(timestamps_ms < self.test_from, first, dtype=np.int64)
        return before_valid, before_test


def check_split(options: SplitOptions) -> None:
    """Raises DataError for fractions outside (0, 1] or time points in the wrong order."""
    train, valid = options.train_fraction, options.valid_fraction
    if not (0 < train <= 1 and 0 <= valid <= 1 and train + valid <= 1 + 1e-9):
        raise DataError(
            f"data.split: train_fraction {train} and valid_fraction {valid} must be fractions whose sum is at most 1."
        )
    if options.valid_from is not None and options.test_from is not None and options.valid_from > options.test_from:
        raise DataError(
            f"data.split: valid_from {options.valid_from} is after test_from {options.test_from}. Swap them."
        )


def needs_time_points(options: SplitOptions) -> bool:
    """Whether a time point has to be found in the events."""
    return options.kind == "global_time" and (options.valid_from is None or options.test_from is None)


def decide_split(options: SplitOptions, timestamps: Path | None) -> Split:
    """The split, with missing time points found in `timestamps` (see `append_timestamps`)."""
    if options.kind == "leave_one_out":
        return Split("leave_one_out")
    valid_from, test_from = options.valid_from, options.test_from
    if timestamps is not None:
        if valid_from is None:
            valid_from = time_point(timestamps, options.train_fraction)
        if test_from is None:
            test_from = time_point(timestamps, options.train_fraction + options.valid_fraction)
        if valid_from > test_from:
            raise DataError(
                f"data.split: validation would start at {valid_from}, after the test's start at {test_from}. Give "
                "both valid_from and test_from, or change the fractions."
            )
    return Split("global_time", valid_from, test_from)


def append_timestamps(path: Path, timestamps_ms: np.ndarray) -> None:
    """Add timestamps to a file that `time_point` can read."""
    with path.open("ab") as file:
        (timestamps_ms.astype(np.int64).view(np.uint64) ^ _SIGN).tofile(file)


def time_point(path: Path, fraction: float) -> int:
    """The time point below which `fraction` of the timestamps lie (fewer where several are equal to it).

    Radix selection, 16 bits a pass over the file, so that memory does not grow with the number of events.
    """
    n = path.stat().st_size // 8
    rank = round(fraction * n)
    if rank >= n:
        return max(int(chunk.max()) for chunk in _chunks(path)) - int(_SIGN) + 1
    prefix = 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for chunk in _chunks(path):
            if shift < 48:
                chunk = chunk[chunk >> np.uint64(shift + 16) == np.uint64(prefix)]
            digits = (chunk >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        upto = np.cumsum(counts)
        digit = int(np.searchsorted(upto, rank, side="right"))
        rank -= int(upto[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return prefix - int(_SIGN)


def _chunks(path: Path) -> Iterator[np.ndarray[Any, np.dtype[np.uint64]]]:
    with path.open("rb") as file:
        while (chunk := np.fromfile(file, np.uint64, _CHUNK)).size:
            yield chunk
