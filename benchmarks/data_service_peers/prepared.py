"""The histories as one of onetrain's own prepared folders: raw columns, from which features are computed on reading."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from onetrain.data.catalogue import catalogue_fingerprint, write_items
from onetrain.data.fingerprint import json_fingerprint
from onetrain.data.manifest import Manifest
from onetrain.data.options import DataOptions
from onetrain.data.shard_writer import ShardWriter, UserBlock
from onetrain.data.sids import SidMap

from .histories import BEHAVIOURS, DAY_MS, FIRST_MS, ITEMS, SCENARIOS, Block

SID_SIZES = (256, 256, 256)
LAST_MS = FIRST_MS + 3000 * DAY_MS  # all events lie before it: everything trains


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """Shards, item table, SID map and manifest."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, (), DataOptions.shard_events)
    count_I, first_ms, last_ms = np.zeros(ITEMS, np.int64), LAST_MS, 0
    for block in blocks:
        users = np.arange(block.first_user, block.first_user + len(block.length_U)).astype(str)
        bounds = (block.length_U, block.length_U)  # validation and test begin behind the last event
        writer.append(UserBlock(pa.array(users, pa.string()), block.length_U, *bounds, block.raw))
        count_I += np.bincount(block.raw["item"], minlength=ITEMS)
        time = block.raw["timestamp_ms"]
        first_ms, last_ms = min(first_ms, int(time.min())), max(last_ms, int(time.max()))
    writer.close()
    events = int(count_I.sum())
    items = _items()
    catalogue = catalogue_fingerprint(items)
    codes_IL = np.random.default_rng(0).integers(0, SID_SIZES, (ITEMS, len(SID_SIZES)))
    sids = SidMap(codes_IL, SID_SIZES, (), catalogue)
    sids.save(str(folder / "sids"))
    Manifest(
        shards=tuple(writer.shards),
        items=write_items(folder, items, count_I),
        users=sum(shard.rows for shard in writer.shards),
        events=events,
        n_train_events=events,
        n_valid_events=0,
        n_test_events=0,
        behaviours=BEHAVIOURS,
        scenarios=SCENARIOS,
        extra=(),
        time_range_ms=(first_ms, last_ms),
        split={"kind": "global_time", "valid_from": LAST_MS, "test_from": LAST_MS},
        catalogue_fingerprint=catalogue,
        fingerprint=json_fingerprint([shard.xxh3_128 for shard in writer.shards]),
        sid_fingerprint=sids.fingerprint,
    ).save(folder)


def _items() -> pa.Table:
    fields = [
        pa.field("item", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("categories", pa.list_(pa.string())),
    ]
    columns = [pa.array(np.arange(ITEMS).astype(str), pa.string()), *(pa.nulls(ITEMS, f.type) for f in fields[1:])]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))
