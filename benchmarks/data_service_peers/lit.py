"""litdata: optimized chunks through StreamingDataset and StreamingDataLoader."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.writer import BinaryWriter

from .histories import BATCH, Batch, Block, as_batch, pad, rows_of

RESUME = "state_dict of StreamingDataLoader"
SETTINGS = {
    "chunk_bytes": 1 << 26,
    "workers": 2,
    "prefetch_factor": 4,
    "batch_decode": "auto",
    "item_shuffle_window": "auto",
}
VARIANTS = [
    {"workers": 0},
    {"workers": 1},
    {"prefetch_factor": 16},
    {"chunk_bytes": 16_777_216},
    {"batch_decode": 0},
    {"batch_decode": 0, "workers": 0},
    {"batch_decode": 0, "item_shuffle_window": "full"},
    {"batch_decode": 1024, "item_shuffle_window": 1024},
]


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """One item a user: its ids (F, events), int32. The writer of `litdata.optimize`, without its worker processes."""
    folder.mkdir(parents=True)
    writer, number = BinaryWriter(str(folder), chunk_bytes=SETTINGS["chunk_bytes"]), 0
    for block in blocks:
        for ids_FE in rows_of(block):
            writer.add_item(number, ids_FE.copy())
            number += 1
    writer.done()
    writer.merge()


class Loader:
    """Batches of one epoch, from the state on if there is one."""

    def __init__(self, folder: Path, state: Any = None) -> None:
        dataset = StreamingDataset(
            str(folder),
            shuffle=True,
            drop_last=False,
            batch_decode=SETTINGS["batch_decode"],
            item_shuffle_window=SETTINGS["item_shuffle_window"],
        )
        workers = SETTINGS["workers"]
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=workers,
            prefetch_factor=SETTINGS["prefetch_factor"] if workers else None,
            collate_fn=pad,
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        return map(as_batch, self._loader)

    def state(self) -> Any:
        """Where the epoch stands after the batches that were delivered."""
        return self._loader.state_dict()
