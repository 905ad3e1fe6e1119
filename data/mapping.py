"""Memory-mapped files that keep no file descriptor, so that a process may map thousands of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def map_file(path: Path, dtype: Any = np.uint8) -> NDArray[Any]:
    """A file's values, read-only; an empty file has none. ValueError for one that does not hold whole values.

    Mapped until the last view of them is gone. np.memmap and mmap hold a descriptor each, of which a process has 1,024
    as a rule.
    """
    with pa.memory_map(str(path)) as source:
        # A buffer of all bytes would have the system read all of them ahead; any buffer hangs on the whole mapping.
        mapping = source.read_buffer(1).parent if source.size() else b""
    return np.frombuffer(mapping, dtype)
