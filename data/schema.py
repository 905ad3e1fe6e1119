"""The canonical event and item: what every reader delivers and what a prepared shard holds.

An event is one row of a behaviour log: user, item, timestamp, and, where the log has them, behaviour, scenario,
watch time, duration, the log's own sequence position (`order`) and further numeric features.
"""

import difflib
from collections.abc import Iterable

import pyarrow as pa

REQUIRED_EVENT_COLUMNS = ("user", "item", "timestamp")
OPTIONAL_EVENT_COLUMNS = ("behaviour", "scenario", "watch_ms", "duration_ms", "order")
EVENT_COLUMNS = REQUIRED_EVENT_COLUMNS + OPTIONAL_EVENT_COLUMNS
ITEM_COLUMNS = ("id", "text", "categories", "embedding")
UNKNOWN_MS = -1  # watch or duration time that the log does not know

# names of features that every prepared data set has, or may have; attributes need others
REQUEST_FEATURES = ("scenario", "hour", "weekday", "weekend")
BUILT_IN_FEATURES = (
    *("sid", "user", "item", "category", "behaviour", "gap", "age", "watch", "duration", "watched"),
    *REQUEST_FEATURES,
)

BOUNDS = ("train_start", "valid_start", "test_start")  # of each user's events: where each split begins

_LIST_TYPES = {
    "item": pa.int32(),
    "timestamp_ms": pa.int64(),
    "behaviour": pa.int16(),
    "scenario": pa.int16(),
    "watch_ms": pa.int64(),
    "duration_ms": pa.int64(),
}


def extra_column(name: str) -> str:
    """Name of the shard column of an extra feature."""
    return f"x_{name}"


def item_column(name: str) -> str:
    """Name of the item table's column of an item attribute."""
    return f"f_{name}"


def user_column(name: str) -> str:
    """Name of the shard column of a user attribute."""
    return f"u_{name}"


def event_types(extra: Iterable[str]) -> dict[str, pa.DataType]:
    """Per-event columns of a shard and their value types, extra features last."""
    return _LIST_TYPES | {extra_column(name): pa.float32() for name in extra}


def shard_schema(extra: Iterable[str], user_features: Iterable[str] = ()) -> pa.Schema:
    """Arrow schema of a shard: one row per user, one list per event column, one number per user attribute."""
    lists = [pa.field(name, pa.large_list(kind), nullable=False) for name, kind in event_types(extra).items()]
    return pa.schema(
        [
            pa.field("user", pa.string(), nullable=False),
            *(pa.field(name, pa.int32(), nullable=False) for name in BOUNDS),
            *lists,
            *(pa.field(user_column(name), pa.int32(), nullable=False) for name in user_features),
        ]
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the most similar of `names`, or nothing when none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f" Did you mean {close[0]!r}?" if close else ""
