"""Writes small prepared folders directly, shards and all: milliseconds, where `prepare` takes a second."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from onetrain.data.catalogue import catalogue_fingerprint, write_items
from onetrain.data.manifest import Manifest
from onetrain.data.shard_writer import ShardWriter, UserBlock
from onetrain.data.sids import SidMap
from onetrain.data.store import LocalStore
from onetrain.data.versions import open_version, version_folder

BEHAVIOURS, SCENARIOS = ("buy", "view"), ("feed", "search")
ITEMS = 12
HOUR_MS = 3_600_000


def random_block(rng, lengths, train_start=None, name="u", after_ms=0):
    """Users of these lengths; the last fifth of each one's events validates and tests."""
    lengths = np.asarray(lengths, dtype=np.int64)
    n, starts = int(lengths.sum()), np.cumsum(lengths) - lengths
    steps = rng.integers(0, 3, n) * HOUR_MS
    steps[starts[lengths > 0]] += int(rng.integers(1, 50)) * HOUR_MS
    times = np.cumsum(steps)
    first = np.repeat(times[np.minimum(starts, max(n - 1, 0))] if n else starts, lengths)
    return UserBlock(
        users=pa.array([f"{name}{number}" for number in range(len(lengths))]),
        lengths=lengths,
        train_start=np.zeros_like(lengths) if train_start is None else train_start,
        valid_start=lengths - lengths // 5,
        test_start=lengths,
        columns={
            "item": rng.integers(0, ITEMS, n).astype(np.int32),
            "timestamp_ms": times - first + after_ms + 1_700_000_000_000,
            "behaviour": rng.integers(0, len(BEHAVIOURS), n).astype(np.int16),
            "scenario": rng.integers(0, len(SCENARIOS), n).astype(np.int16),
            "watch_ms": rng.integers(-1, 9000, n),
            "duration_ms": rng.integers(-1, 9000, n),
        },
    )


def write_folder(folder: Path, block: UserBlock, shard_events: int = 50, fingerprint: str = "contents") -> Manifest:
    """A prepared folder of these users, with items and random SIDs."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, (), shard_events)
    for start in range(0, len(block.lengths), 3):
        writer.append(block[start : start + 3])
    writer.close()
    user_table, batch_table = writer.tables()
    names = pa.chunked_array([pa.array([f"i{number}" for number in range(ITEMS)])])
    nulls = pa.chunked_array([pa.nulls(ITEMS, pa.string())])
    lists = pa.chunked_array([pa.nulls(ITEMS, pa.list_(pa.string()))])
    items = pa.table({"item": names, "text": nulls, "categories": lists})
    rng = np.random.default_rng(0)
    catalogue = catalogue_fingerprint(items)
    sids = SidMap(rng.integers(0, 4, (ITEMS, 3)), (4, 4, 4), (), catalogue)
    sids.save(str(folder / "sids"))
    times = block.columns["timestamp_ms"]
    manifest = Manifest(
        shards=tuple(writer.shards),
        items=write_items(folder, items, np.arange(ITEMS)),
        user_table=user_table,
        batch_table=batch_table,
        users=len(block.lengths),
        events=len(times),
        n_train_events=int(block.valid_start.sum()),
        n_valid_events=int((block.test_start - block.valid_start).sum()),
        n_test_events=0,
        behaviours=BEHAVIOURS,
        scenarios=SCENARIOS,
        extra=(),
        time_range_ms=(int(times.min()), int(times.max())),
        split={"kind": "leave_one_out", "valid_from": None, "test_from": None},
        catalogue_fingerprint=catalogue,
        fingerprint=fingerprint,
        sid_fingerprint=sids.fingerprint,
    )
    manifest.save(folder)
    return manifest


def write_version(folder: Path, version: int, block: UserBlock, shard_events: int = 50) -> Manifest:
    """The next version of such a folder; every event from each user's train_start on trains."""
    store = LocalStore(folder)
    before = open_version(store, version - 1)
    name = f"{before.fingerprint} and {version}"
    made = folder.with_name(f"{folder.name}-{version}")
    manifest = replace(write_folder(made, block, shard_events, name), parent=before.fingerprint)
    shutil.rmtree(made / "sids")
    manifest.save(made)
    target = folder / version_folder(version)
    target.parent.mkdir(exist_ok=True)
    made.rename(target)
    return manifest
