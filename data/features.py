"""Features: what can be told of an event, of a request's moment, of a user and of a target item, each as one id.

Legend: B samples, E events of a batch one after another, I items.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrain.data.buckets import (
    GAP_BUCKETS,
    HOUR_MS,
    NUMBER_BUCKETS,
    WATCHED_BUCKETS,
    duration_buckets,
    gap_buckets,
    hours,
    number_buckets,
    watched_buckets,
    weekdays,
)
from onetrain.data.errors import DataError
from onetrain.data.event_rows import EventRows
from onetrain.data.item_table import ItemTable
from onetrain.data.manifest import Manifest
from onetrain.data.schema import REQUEST_FEATURES, extra_column, nearest, user_column
from onetrain.data.shards import Histories

SID = "sid"  # in lists of features, but never among a batch's ids: the codes come by themselves
USER = "user"
AGE = "age"
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
        with np.errstate(all="ignore"):  # compiled loops compute what they do not take, as of NaN
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


def _extra(name: str, rows: EventRows) -> NDArray[np.uint8]:
    ids: NDArray[np.uint8] = number_buckets(rows.column(extra_column(name)))
    return ids
