"""What batches take from items.arrow: training counts, and the categorical features of every item.

Legend: I items.
"""

import os
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from onetrain.data.shards import read_items

CATEGORY = "category"


@dataclass(frozen=True)
class ItemTable:
    """Columns over items (I,). A feature's id 0 means that the item lacks it; `sizes` counts it."""

    train_count_I: NDArray[np.int64]
    features: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ItemTable":
        """Read the item table of a prepared folder; DataError when it is missing or damaged."""
        items = read_items(folder)
        features, sizes = {}, {}
        ids_I, names = last_categories(items.column("categories"))
        if names:
            features[CATEGORY], sizes[CATEGORY] = ids_I, 1 + len(names)
        return cls(items.column("train_count").to_numpy(), features, sizes)

    @cached_property
    def log_share_I(self) -> NDArray[np.float32]:  # noqa: N802
        """Log of each item's share of the training events; items without any count as one event."""
        total = max(int(self.train_count_I.sum()), 1)
        share: NDArray[np.float32] = np.log(np.maximum(self.train_count_I, 1) / total).astype(np.float32)
        return share


def last_categories(lists: pa.ChunkedArray) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Ids (I,) and names of each item's last, most specific category; id = 1 + place among the sorted names."""
    column = lists.combine_chunks()
    length_I = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    last_I = column.offsets.to_numpy()[1:] - 1
    name_I = column.values.take(pa.array(last_I, mask=length_I == 0))
    names = sorted(name for name in pc.unique(name_I).to_pylist() if name)
    found_I = pc.fill_null(pc.index_in(name_I, pa.array(names, pa.string())), -1).to_numpy()
    return found_I.astype(np.int64) + 1, tuple(names)
