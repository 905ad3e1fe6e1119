"""Random raw events with ties and repeats, and a plain reference of what preparation makes of them."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from onetrain.data.options import DataOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.shards import ShardReader

BEHAVIOURS = ("click", "buy", "view")
SCENARIOS = ("feed", "search")


@dataclass(frozen=True, order=True)
class Event:
    """Field order is the total order within a user."""

    timestamp: int
    order: int
    item: int
    behaviour: str
    scenario: str
    watch_ms: int
    duration_ms: int
    price: float

    @property
    def identity(self):
        return self.item, self.timestamp, self.behaviour


def random_events(seed, users=40, items=12, mean=15):
    """{user: events}, times from a small range, so that ties and repeats abound."""
    rng = np.random.default_rng(seed)
    events = {}
    for user in rng.choice(1000, users, replace=False):
        events[int(user)] = [
            Event(
                int(rng.integers(1000, 1020)) * 1000,
                int(rng.integers(0, 2)),
                int(rng.integers(items)),
                str(rng.choice(BEHAVIOURS)),
                str(rng.choice(SCENARIOS)),
                int(rng.integers(0, 4)),
                int(rng.integers(0, 3)),
                float(np.float32(rng.normal())),
            )
            for _ in range(rng.geometric(1 / mean))
        ]
    return events


def shuffled_rows(events, seed):
    rows = [(user, *vars(event).values()) for user, sequence in events.items() for event in sequence]
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]


def table(rows):
    names = ("user", "timestamp", "order", "item", "behaviour", "scenario", "watch_ms", "duration_ms", "price")
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})


def write_rows(folder, rows, files=1, suffix=".parquet"):
    """Write the rows into so many files of unequal length."""
    folder.mkdir(parents=True, exist_ok=True)
    cuts = np.sort(np.random.default_rng(files).integers(0, len(rows), files - 1))
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
        part, path = table(rows[start:stop]), folder / f"part-{number}{suffix}"
        if suffix == ".parquet":
            pq.write_table(part, path)
        else:
            pyarrow.csv.write_csv(part, path)
    return str(folder)


def options(tmp_path, log, *, name="prepared", source=None, **kwargs):
    return DataOptions(prepared=str(tmp_path / name), source=SourceOptions(events=str(log), **(source or {})), **kwargs)


def prepare_and_open(opts):
    manifest = prepare(opts)
    return manifest, ShardReader(opts.prepared, manifest)


def reference(events, drop=True):
    """Users by number, their events in total order, without repeats of (item, timestamp, behaviour)."""
    result = {}
    for user in sorted(events):
        kept, seen = [], set()
        for event in sorted(events[user]):
            if event.identity not in seen or not drop:
                kept.append(event)
            seen.add(event.identity)
        result[str(user)] = kept
    return result


def count_ties(sequences):
    return sum(
        len(list(group)) - 1 for events in sequences.values() for _, group in groupby(events, lambda e: e.timestamp)
    )
