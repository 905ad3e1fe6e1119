"""Categorical values as ids: 0 = unknown, else 1 + the place among the sorted names."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def index_values(values: pa.Array) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Ids of text values, and the names. Null and empty values are unknown."""
    names = sorted(name for name in pc.unique(values).to_pylist() if name)
    places = pc.fill_null(pc.index_in(values, pa.array(names, values.type)), -1).to_numpy(zero_copy_only=False)
    return places.astype(np.int64) + 1, tuple(names)


def last_categories(lists: pa.ChunkedArray) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Ids and names of the last, most specific category of each list."""
    column = lists.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    last = np.asarray(column.offsets)[1:] - 1
    return index_values(column.values.take(pa.array(last, mask=lengths == 0)))
