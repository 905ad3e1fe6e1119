"""A torch DataLoader over Parquet: an IterableDataset whose workers read whole row groups into flat arrays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .histories import BATCH, Batch, Block, Padded, as_batch, pad
from .tables import rows_of_table, write_parquet

RESUME = "counts batches, skips whole row groups by their row counts"
SETTINGS = {
    "layout": "lists",
    "compression": "none",
    "use_dictionary": True,
    "workers": 2,
    "prefetch_factor": 4,
    "groups_per_buffer": 4,
}
VARIANTS = [
    {"workers": 0},
    {"workers": 1},
    {"prefetch_factor": 16},
    {"use_dictionary": False},
    {"compression": "snappy"},
    {"compression": "zstd"},
    {"groups_per_buffer": 2},
    {"groups_per_buffer": 8},
]


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """List columns; one row group a block of users."""
    write_parquet(folder, blocks, **{name: SETTINGS[name] for name in ("layout", "compression", "use_dictionary")})


class RowGroups(IterableDataset):
    """Batches of shuffled rows: row groups in random order, rows within a buffer of several.

    Rows that do not fill a batch go first in the next buffer, so a worker's batches are one stream of its rows, and
    `consumed` batches (over all workers, which take turns) are skipped by counting rows.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], seed: int, consumed: int) -> None:
        self.files = sorted(map(str, folder.glob("*.parquet")))
        metadata = [pq.read_metadata(file) for file in self.files]
        self.groups = [
            (file, group, of.row_group(group).num_rows)
            for file, of in enumerate(metadata)
            for group in range(of.num_row_groups)
        ]
        self.settings, self.seed, self.consumed = settings, seed, consumed

    def __iter__(self) -> Iterator[Padded]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        order = np.random.default_rng(self.seed).permutation(len(self.groups))[number::workers]
        rng = np.random.default_rng([self.seed, number])
        skip = BATCH * (self.consumed // workers + (number < self.consumed % workers))
        open_files: dict[int, pq.ParquetFile] = {}
        waiting: list[NDArray[np.int32]] = []
        size = self.settings["groups_per_buffer"]
        for start in range(0, len(order), size):
            chosen = [self.groups[group] for group in order[start : start + size]]
            shuffled = rng.permutation(sum(rows for *_, rows in chosen))
            if skip >= len(shuffled):
                skip -= len(shuffled)
                continue
            rows: list[NDArray[np.int32]] = []
            for file, group, _ in chosen:
                if file not in open_files:
                    open_files[file] = pq.ParquetFile(self.files[file], memory_map=True)
                rows += rows_of_table(open_files[file].read_row_group(group, use_threads=False))
            waiting += [rows[place] for place in shuffled[skip:]]
            skip, whole = 0, len(waiting) // BATCH * BATCH
            for first in range(0, whole, BATCH):
                yield pad(waiting[first : first + BATCH])
            waiting = waiting[whole:]
        if waiting:
            yield pad(waiting)


class Loader:
    """Batches of one epoch, from the state on if there is one."""

    settings = SETTINGS

    def __init__(self, folder: Path, state: Any = None) -> None:
        workers = self.settings["workers"]
        self._delivered = state or 0
        self._loader = DataLoader(
            RowGroups(folder, self.settings, 0, self._delivered),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.settings["prefetch_factor"] if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        for padded in self._loader:
            self._delivered += 1
            yield as_batch(padded)

    def state(self) -> Any:
        """Batches delivered."""
        return self._delivered
