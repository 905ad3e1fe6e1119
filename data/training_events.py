"""Training events of a prepared folder, for what counts them: block after block of whole users."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from onetrain.data.shards import ShardReader

MOST_USERS = 1 << 16  # of a block

Ids = NDArray[np.int64]


def training_blocks(reader: ShardReader, events: int) -> Iterator[tuple[Ids, Ids]]:
    """Items and user rows of the events before validation, users in order, in blocks of at most about `events`; a user
    who has more is a block alone."""
    begin = 0
    while begin < reader.n_users:
        lengths = reader.table.users["valid_start"][begin : begin + MOST_USERS].astype(np.int64)
        fitting = int(np.searchsorted(np.cumsum(lengths), events, side="right"))
        rows = np.arange(begin, begin + max(fitting, 1))
        lengths = lengths[: len(rows)]
        pieces = reader.pieces("item", reader.locate(rows), np.zeros_like(lengths), lengths)
        yield np.concatenate(pieces).astype(np.int64), np.repeat(rows, lengths)
        begin += len(rows)
