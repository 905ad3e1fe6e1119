"""Hugging Face datasets, streaming: Arrow tables out of a shuffled IterableDataset, in a stateful DataLoader."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from .histories import BATCH, Batch, Block, Padded, as_batch, pad
from .tables import rows_of_table, write_arrow, write_parquet

RESUME = "state_dict of IterableDataset, through torchdata's StatefulDataLoader"
SETTINGS = {
    "format": "arrow",
    "layout": "packed",
    "batch_rows": 2048,
    "workers": 2,
    "prefetch_factor": 4,
    "buffer_size": 8192,
}
VARIANTS = [
    {"workers": 0},
    {"workers": 1},
    {"prefetch_factor": 16},
    {"layout": "lists"},
    {"format": "parquet"},
    {"format": "parquet", "workers": 0},
    {"batch_rows": 512},
    {"buffer_size": 4096},
    {"buffer_size": 16384},
]


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """Files of one kind of table."""
    if SETTINGS["format"] == "arrow":
        write_arrow(folder, blocks, SETTINGS["layout"], SETTINGS["batch_rows"])
    else:
        write_parquet(folder, blocks, SETTINGS["layout"], compression="none", use_dictionary=False)


class Tables(IterableDataset):
    """Batches of one epoch: every worker iterates over its share of the files."""

    def __init__(self, folder: Path) -> None:
        kind = SETTINGS["format"]
        files = sorted(map(str, folder.glob(f"*.{kind}")))
        stream = load_dataset(kind, data_files=files, split="train", streaming=True)
        self._stream = stream.shuffle(seed=0, buffer_size=SETTINGS["buffer_size"]).with_format("arrow")
        self._state: Any = None

    def __iter__(self) -> Iterator[Padded]:
        worker = get_worker_info()
        if worker:
            self._stream = self._stream.shard(worker.num_workers, worker.id)
        if self._state is not None:
            self._stream.load_state_dict(self._state)
        for table in self._stream.iter(BATCH):
            yield pad(rows_of_table(table))

    def state_dict(self) -> Any:
        """Of this worker's stream."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Taken up when iteration begins."""
        self._state = state


class Loader:
    """Batches of one epoch, from the state on if there is one."""

    def __init__(self, folder: Path, state: Any = None) -> None:
        workers = SETTINGS["workers"]
        self._loader = StatefulDataLoader(
            Tables(folder),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=SETTINGS["prefetch_factor"] if workers else None,
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        return map(as_batch, self._loader)

    def state(self) -> Any:
        """Where the epoch stands after the batches that were delivered."""
        return self._loader.state_dict()
