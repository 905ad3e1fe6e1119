"""Histories as Arrow tables, one row a user: what Parquet readers deliver.

Two layouts: `lists`, as logs are kept, one list column a feature (nothing nullable, which halves the work of reading
Parquet); and `packed`, one binary column with all int32 ids of a user, feature after feature, which only a reader that
knows it can use.
"""

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .histories import FEATURES, Block, rows_of

BLOCKS_PER_FILE = 5
LIST = pa.list_(pa.field("element", pa.int32(), nullable=False))
SCHEMAS = {
    "lists": pa.schema([pa.field(name, LIST, nullable=False) for name in FEATURES]),
    "packed": pa.schema([pa.field("events", pa.binary(), nullable=False)]),
}


def table_of(block: Block, layout: str) -> pa.Table:
    """Users as rows."""
    if layout == "packed":
        packed = [ids_FE.tobytes() for ids_FE in rows_of(block)]
        return pa.table([pa.array(packed, pa.binary())], schema=SCHEMAS[layout])
    length_U, ids_FE = block.histories()
    offsets = pa.array(np.concatenate([[0], np.cumsum(length_U)]), pa.int32())
    columns = [pa.ListArray.from_arrays(offsets, pa.array(ids_E), type=LIST) for ids_E in ids_FE]
    return pa.table(columns, schema=SCHEMAS[layout])


def rows_of_table(table: pa.Table) -> list[NDArray[np.int32]]:
    """Every row's ids (F, events), as views of one array."""
    columns = [column.combine_chunks() for column in table.columns]
    if len(columns) == 1:
        _, offsets_buffer, data = columns[0].buffers()
        first = columns[0].offset
        bounds = np.frombuffer(offsets_buffer, np.int32)[first : first + len(columns[0]) + 1] // 4
        ids = np.frombuffer(data, np.int32)
        return [ids[start:stop].reshape(len(FEATURES), -1) for start, stop in pairwise(bounds.tolist())]
    offsets = columns[0].offsets.to_numpy()
    ids_FE = np.stack([column.flatten().to_numpy() for column in columns])
    return [ids_FE[:, start:stop] for start, stop in pairwise((offsets - offsets[0]).tolist())]


def write_parquet(folder: Path, blocks: Iterator[Block], layout: str, **options: Any) -> None:
    """Files of BLOCKS_PER_FILE row groups, one a block of users."""
    folder.mkdir(parents=True)
    for number, first in enumerate(blocks):
        with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", SCHEMAS[layout], **options) as writer:
            for block in (first, *islice(blocks, BLOCKS_PER_FILE - 1)):
                writer.write_table(table_of(block, layout), row_group_size=len(block.length_U))


def write_arrow(folder: Path, blocks: Iterator[Block], layout: str, batch_rows: int) -> None:
    """The same as Arrow streams of record batches."""
    folder.mkdir(parents=True)
    for number, first in enumerate(blocks):
        with pa.ipc.new_stream(str(folder / f"part-{number:05d}.arrow"), SCHEMAS[layout]) as writer:
            for block in (first, *islice(blocks, BLOCKS_PER_FILE - 1)):
                writer.write_table(table_of(block, layout), max_chunksize=batch_rows)
