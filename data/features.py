"""Features: what can be told of an event, of a request's moment, of a user and of a target item, each as one id.

Legend: B samples, E events of a batch one after another, I items.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrain.data.errors import DataError
from onetrain.data.event_rows import EventRows
from onetrain.data.item_table import ItemTable
from onetrain.data.manifest import Manifest
from onetrain.data.schema import REQUEST_FEATURES, extra_column, nearest, user_column
from onetrain.data.shards import Histories

SID = "sid"  # in lists of features, but never among a batch's ids: the codes come by themselves
USER = "user"
AGE = "age"
GAP_BUCKETS = 32  # of the time between two events
NUMBER_BUCKETS = 64  # of any number
WATCHED_BUCKETS = 12
FIXED_SIZES = {  # number of ids of the features that are the same for all data
    "gap": GAP_BUCKETS,
    AGE: GAP_BUCKETS,
    "hour": 24,
    "weekday": 7,
    "weekend": 2,
    "watch": NUMBER_BUCKETS,
    "duration": NUMBER_BUCKETS,
    "watched": WATCHED_BUCKETS,
}
SECOND_MS, HOUR_MS, DAY_MS = 1000, 3_600_000, 86_400_000
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday
_LAST_EDGE = 2.0 ** (NUMBER_BUCKETS // 4)  # beyond the beginning of the last number bucket
_BIAS = 1023  # of the exponents of 64-bit floating-point numbers
_GAP_OF_EXPONENT = np.repeat(np.arange(GAP_BUCKETS, dtype=np.uint8), [_BIAS + 1, *[1] * (GAP_BUCKETS - 1)])
_DURATION_OF_EXPONENT = np.repeat(
    np.array([0, *range(NUMBER_BUCKETS // 2, NUMBER_BUCKETS)], dtype=np.uint8), [_BIAS, *[1] * (NUMBER_BUCKETS // 2)]
)

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class FeatureNames:
    """Which features a batch carries; `sid` may stand in any of the lists and needs no ids."""

    events: tuple[str, ...] = ()
    user: tuple[str, ...] = ()
    request: tuple[str, ...] = ()  # of each target's moment
    items: tuple[str, ...] = ()  # of each target item


class FeatureBuilder:
    """Computes features of the given data by name."""

    def __init__(self, manifest: Manifest, items: ItemTable, utc_offset_hours: float) -> None:
        self.items = items
        self._offset_ms = round(utc_offset_hours * HOUR_MS)
        self._of_event: dict[str, Callable[[EventRows], NDArray]] = {
            "item": lambda rows: rows.column("item"),
            "behaviour": lambda rows: rows.column("behaviour"),
            "scenario": lambda rows: rows.column("scenario"),
            "gap": lambda rows: gap_buckets(rows.gaps()),
            "hour": lambda rows: hours(rows.column("timestamp_ms") + self._offset_ms),
            "weekday": lambda rows: weekdays(rows.column("timestamp_ms") + self._offset_ms),
            "weekend": lambda rows: weekdays(rows.column("timestamp_ms") + self._offset_ms) >= 5,
            "watch": lambda rows: duration_buckets(rows.column("watch_ms")),
            "duration": lambda rows: duration_buckets(rows.column("duration_ms")),
            "watched": lambda rows: watched_buckets(rows.column("watch_ms"), rows.column("duration_ms")),
        }
        for name in manifest.extra:
            self._of_event[extra_column(name)] = partial(_extra, name)

    def of_events(self, name: str, rows: EventRows, moment_B: Ids | None = None) -> NDArray[Any]:
        """(E,) ids of an event feature, of any integer type. `age` needs each sample's moment of request, in ms."""
        if name == AGE:
            assert moment_B is not None
            return gap_buckets(rows.of_row(moment_B) - rows.column("timestamp_ms"))
        if name in self.items.features:
            return self.of_items(name, rows.column("item"))
        return self._of_event[name](rows)

    def of_items(self, name: str, item: NDArray) -> NDArray[Any]:
        """Ids of an item feature, in the shape of `item`."""
        return item if name == "item" else self.items.features[name].take(item)

    def of_users(self, name: str, histories: Histories) -> Ids:
        """(B,) ids of a user feature."""
        return histories.users("id" if name == USER else user_column(name))


def feature_sizes(manifest: Manifest, items: ItemTable) -> dict[str, int | None]:
    """Number of ids of every feature of events, items and requests; one name means the same ids everywhere."""
    return {
        "item": manifest.items.rows,
        "behaviour": len(manifest.behaviours),
        "scenario": len(manifest.scenarios),
        **FIXED_SIZES,
        **{extra_column(name): NUMBER_BUCKETS for name in manifest.extra},
        **items.sizes,
    }


def user_feature_sizes(manifest: Manifest) -> dict[str, int | None]:
    """Number of ids of every user feature; None = no bound: the model must hash them."""
    return {USER: None, **{name: 1 + len(names) for name, names in manifest.user_features.items()}}


def check_features(wanted: FeatureNames, manifest: Manifest, items: ItemTable) -> FeatureNames:
    """The wanted features without `sid`. Raises DataError, naming what there is, for one that these data lack."""
    known = {
        "events": tuple(feature_sizes(manifest, items)),
        "user": tuple(user_feature_sizes(manifest)),
        "request": REQUEST_FEATURES,
        "items": ("item", *items.sizes),
    }
    kept = {}
    for field in fields(FeatureNames):
        kept[field.name] = tuple(name for name in getattr(wanted, field.name) if name != SID)
        for name in kept[field.name]:
            if name not in known[field.name]:
                kind = {"events": "an event", "user": "a user", "request": "a request", "items": "an item"}[field.name]
                raise DataError(
                    f"{name!r} is no feature of {kind} in these data; they have {', '.join(known[field.name])}."
                    f"{nearest(name, known[field.name])}"
                )
    return FeatureNames(**kept)


def gap_buckets(milliseconds: NDArray[np.int64]) -> NDArray[np.uint8]:
    """floor(log2(1 + whole seconds)), at most 31; negative times count as 0."""
    return _GAP_OF_EXPONENT.take(_exponents(_seconds_and_one(milliseconds)), mode="clip")


def duration_buckets(milliseconds: NDArray[np.int64]) -> NDArray[np.uint8]:
    """`number_buckets` of the seconds; a negative time is unknown."""
    size = _seconds_and_one(milliseconds)
    size *= np.abs(size)  # a negative time stays below 1
    return _DURATION_OF_EXPONENT.take(_exponents(size), mode="clip")


def number_buckets(values: NDArray) -> NDArray[np.uint8]:
    """64 buckets of any number: 0 = NaN; 32 = about zero; from there floor(2 log2(1 + |x|)) up or down, at most 31."""
    size = 1.0 + np.minimum(np.abs(values), _LAST_EDGE, dtype=np.float64)
    steps = np.minimum(np.frexp(size * size)[1] - 1, NUMBER_BUCKETS // 2 - 1)
    return np.where(np.isnan(values), 0, NUMBER_BUCKETS // 2 + np.where(values < 0, -steps, steps)).astype(np.uint8)


def watched_buckets(watch_ms: NDArray[np.int64], duration_ms: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Share of the duration that was watched: 0 = unknown, else 1 + whole tenths, at most 11."""
    known = watch_ms >= 0
    known &= duration_ms > 0
    with np.errstate(all="ignore"):  # what is unknown may come to anything, and counts as 0 in the end
        tenths = 10.0 * watch_ms
        tenths /= duration_ms  # below an integer where the true quotient is, up to 2 ** 49 ms
        np.minimum(tenths, WATCHED_BUCKETS - 2, out=tenths)
        buckets = tenths.astype(np.uint8)
    buckets += 1
    buckets *= known
    return buckets


def hours(local_ms: NDArray[np.int64]) -> NDArray[np.int32]:
    """Hour of the day, 0 to 23."""
    return _remainder(local_ms // HOUR_MS, 24)


def weekdays(local_ms: NDArray[np.int64]) -> NDArray[np.int32]:
    """Day of the week, Monday 0."""
    return _remainder(local_ms // DAY_MS + EPOCH_WEEKDAY, 7)


def _seconds_and_one(milliseconds: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 + seconds, exact where that is a power of two."""
    size = milliseconds.astype(np.float64)
    size += SECOND_MS
    size *= 1 / SECOND_MS
    return size


def _exponents(size: NDArray[np.float64]) -> Ids:
    """The 12 bits of sign and exponent: floor(log2(size)) + _BIAS of positive numbers, below 0 of negative ones."""
    exponent = size.view(np.int64)
    exponent >>= 52
    return exponent


def _remainder(values: Ids, divisor: int) -> NDArray[np.int32]:
    """values % divisor, never negative; several times as fast as numpy's."""
    small = values.astype(np.int32)
    small -= small // divisor * divisor
    return small


def _extra(name: str, rows: EventRows) -> NDArray[np.uint8]:
    return number_buckets(rows.column(extra_column(name)))
