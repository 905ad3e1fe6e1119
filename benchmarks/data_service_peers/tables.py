"""Histories as Arrow tables, one row a user and one list column a feature: what Parquet readers deliver."""

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .histories import FEATURES, Block

BLOCKS_PER_FILE = 5
SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in FEATURES])


def table_of(block: Block) -> pa.Table:
    """Users as rows."""
    length_U, ids_FE = block.histories()
    offsets = pa.array(np.concatenate([[0], np.cumsum(length_U)]), pa.int32())
    return pa.table([pa.ListArray.from_arrays(offsets, pa.array(ids_E)) for ids_E in ids_FE], schema=SCHEMA)


def rows_of_table(table: pa.Table) -> list[NDArray[np.int32]]:
    """Every row's ids (F, events), as views of one array."""
    columns = [table.column(name).combine_chunks() for name in FEATURES]
    offsets = columns[0].offsets.to_numpy()
    ids_FE = np.stack([column.flatten().to_numpy() for column in columns])
    bounds = (offsets - offsets[0]).tolist()
    return [ids_FE[:, start:stop] for start, stop in pairwise(bounds)]


def write_parquet(folder: Path, blocks: Iterator[Block], **options: Any) -> None:
    """Files of BLOCKS_PER_FILE row groups, one a block of users."""
    folder.mkdir(parents=True)
    for number, first in enumerate(blocks):
        with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", SCHEMA, **options) as writer:
            for block in (first, *islice(blocks, BLOCKS_PER_FILE - 1)):
                writer.write_table(table_of(block), row_group_size=len(block.length_U))


def write_arrow(folder: Path, blocks: Iterator[Block], batch_rows: int) -> None:
    """The same as Arrow streams of record batches."""
    folder.mkdir(parents=True)
    for number, first in enumerate(blocks):
        with pa.ipc.new_stream(str(folder / f"part-{number:05d}.arrow"), SCHEMA) as writer:
            for block in (first, *islice(blocks, BLOCKS_PER_FILE - 1)):
                writer.write_table(table_of(block), max_chunksize=batch_rows)
