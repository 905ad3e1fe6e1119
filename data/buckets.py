"""Ids of times and numbers, for arrays of any shape: the arithmetic of features, compiled by numba."""

import math

import numpy as np
from numba import njit

from onetrain.data.compiled import elementwise

GAP_BUCKETS = 32  # of the time between two events
NUMBER_BUCKETS = 64  # of any number
WATCHED_BUCKETS = 12
SECOND_MS, HOUR_MS, DAY_MS = 1000, 3_600_000, 86_400_000
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday
_MIDDLE = NUMBER_BUCKETS // 2
_LAST_EDGE = 2.0 ** (NUMBER_BUCKETS // 4)  # beyond the beginning of the last number bucket


@njit(inline="always")
def _floor_log2(size):  # type: ignore[no-untyped-def]
    """Of a float of at least 1: its exponent, which is exact where a logarithm would round."""
    return (np.float64(size).view(np.int64) >> 52) - 1023


@njit(inline="always")
def _whole(milliseconds, unit):  # type: ignore[no-untyped-def]
    """How many whole units; exact up to 2 ** 49 ms, and several times as fast as a division of integers."""
    return np.int32(math.floor(milliseconds / unit))


@elementwise("uint8(int64)")
def gap_buckets(milliseconds):  # type: ignore[no-untyped-def]
    """floor(log2(1 + whole seconds)), at most 31; negative times count as 0."""
    seconds = (SECOND_MS + max(milliseconds, 0)) / SECOND_MS  # 1 more; its exponent is that of the whole seconds
    return np.uint8(min(_floor_log2(seconds), GAP_BUCKETS - 1))


@elementwise("uint8(float32)", "uint8(float64)")
def number_buckets(value):  # type: ignore[no-untyped-def]
    """64 buckets of any number: 0 = NaN; 32 = about zero; from there floor(2 log2(1 + |x|)) up or down, at most 31."""
    number = np.float64(value)
    size = 1.0 + min(abs(number), _LAST_EDGE)
    steps = min(_floor_log2(size * size), _MIDDLE - 1)
    return np.uint8(0 if number != number else _MIDDLE - steps if number < 0 else _MIDDLE + steps)


@elementwise("uint8(int64)")
def duration_buckets(milliseconds):  # type: ignore[no-untyped-def]
    """`number_buckets` of the seconds; a negative time is unknown."""
    size = 1.0 + min(max(milliseconds, 0) / SECOND_MS, _LAST_EDGE)
    return np.uint8(0 if milliseconds < 0 else _MIDDLE + min(_floor_log2(size * size), _MIDDLE - 1))


@elementwise("uint8(int64, int64)")
def watched_buckets(watch_ms, duration_ms):  # type: ignore[no-untyped-def]
    """Share of the duration that was watched: 0 = unknown, else 1 + whole tenths, at most 11."""
    tenths = 10.0 * watch_ms / max(duration_ms, 1)  # below an integer where the true quotient is, up to 2 ** 49 ms
    return np.uint8(0 if watch_ms < 0 or duration_ms <= 0 else 1 + min(tenths, WATCHED_BUCKETS - 2.0))


@elementwise("uint8(int64)")
def hours(local_ms):  # type: ignore[no-untyped-def]
    """Hour of the day, 0 to 23."""
    return np.uint8(_whole(local_ms, HOUR_MS) % 24)


@elementwise("uint8(int64)")
def weekdays(local_ms):  # type: ignore[no-untyped-def]
    """Day of the week, Monday 0."""
    return np.uint8((_whole(local_ms, DAY_MS) + EPOCH_WEEKDAY) % 7)
