"""What batches take from items.arrow: training counts, and the categorical features of every item.

Legend: I items.
"""

import os
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onetrain.data.categorical import last_categories
from onetrain.data.manifest import Manifest
from onetrain.data.schema import item_column
from onetrain.data.shards import read_items
from onetrain.data.stream_options import StreamOptions

CATEGORY = "category"


@dataclass(frozen=True)
class ItemTable:
    """Columns over items (I,). A feature's id 0 means that the item lacks it; `sizes` counts it."""

    train_count_I: NDArray[np.int64]
    features: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], options: StreamOptions | None = None) -> "ItemTable":
        """Read the item table of a prepared folder; DataError when it is missing or damaged."""
        items, attributes = read_items(folder, options), Manifest.load(folder).item_features
        features = {name: items.column(item_column(name)).to_numpy().astype(np.int64) for name in attributes}
        sizes = {name: 1 + len(names) for name, names in attributes.items()}
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
