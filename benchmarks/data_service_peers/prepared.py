"""The histories as one of onetrain's own prepared folders: raw columns, from which features are computed on reading."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from onetrain.data.catalogue import catalogue_fingerprint, write_items
from onetrain.data.contents import ContentsWriter
from onetrain.data.fingerprint import json_fingerprint
from onetrain.data.manifest import Manifest
from onetrain.data.options import DataOptions
from onetrain.data.shard_writer import UserBlock
from onetrain.data.sids import SidMap

from .histories import BEHAVIOURS, DAY_MS, FIRST_MS, ITEMS, SCENARIOS, Block

SID_SIZES = (256, 256, 256)
LAST_MS = FIRST_MS + 3000 * DAY_MS  # all events lie before it: everything trains


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """Shards, user table, item table, SID map and manifest."""
    folder.mkdir(parents=True)
    writer = ContentsWriter(folder, (), DataOptions.shard_events, (), ITEMS)
    for block in blocks:
        users = np.arange(block.first_user, block.first_user + len(block.length_U)).astype(str)
        bounds = (np.zeros_like(block.length_U), block.length_U, block.length_U)  # no event validates or tests
        writer.append(UserBlock(pa.array(users, pa.string()), block.length_U, *bounds, block.raw))
    writer.close()
    items = _items()
    catalogue = catalogue_fingerprint(items)
    codes_IL = np.random.default_rng(0).integers(0, SID_SIZES, (ITEMS, len(SID_SIZES)))
    sids = SidMap(codes_IL, SID_SIZES, (), catalogue)
    sids.save(str(folder / "sids"))
    Manifest(
        items=write_items(folder, items, writer.train_count),
        behaviours=BEHAVIOURS,
        scenarios=SCENARIOS,
        extra=(),
        split={"kind": "global_time", "valid_from": LAST_MS, "test_from": LAST_MS},
        catalogue_fingerprint=catalogue,
        fingerprint=json_fingerprint(writer.content.digests()),
        sid_fingerprint=sids.fingerprint,
        **writer.totals(),
    ).save(folder)


def _items() -> pa.Table:
    fields = [
        pa.field("item", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("categories", pa.list_(pa.string())),
    ]
    columns = [pa.array(np.arange(ITEMS).astype(str), pa.string()), *(pa.nulls(ITEMS, f.type) for f in fields[1:])]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))
