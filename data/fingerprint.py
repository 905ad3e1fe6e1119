"""Fingerprints of contents: xxh3_128 over values, never over paths, dates or file layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

_CHUNK_BYTES = 1 << 24


def file_checksum(path: Path) -> str:
    """xxh3_128 of a file's bytes, as hex."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return str(state.hexdigest())


def json_fingerprint(value: Any) -> str:
    """xxh3_128 of a JSON value in its canonical form (sorted keys, no spaces), as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


class ContentHash:
    """One running hash per column, so that the way rows are cut into pieces does not matter."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}

    def update(self, column: str, values: np.ndarray) -> None:
        """Add the bytes of a numeric array."""
        self._states.setdefault(column, xxhash.xxh3_128()).update(np.ascontiguousarray(values).data.cast("B"))

    def update_text(self, column: str, values: pa.Array) -> None:
        """Add a string array: which are null, how long each is in bytes, and all their bytes."""
        self.update(f"{column}.valid", pc.is_valid(values).to_numpy(zero_copy_only=False))
        filled = pc.fill_null(values.cast(pa.large_string()), "")
        self.update(f"{column}.length", pc.binary_length(filled).to_numpy(zero_copy_only=False).astype(np.int64))
        offsets = np.frombuffer(filled.buffers()[1], np.int64)[filled.offset : filled.offset + len(filled) + 1]
        data = np.frombuffer(filled.buffers()[2] or b"", np.uint8)
        self.update(column, data[offsets[0] : offsets[-1]])

    def digests(self) -> dict[str, str]:
        """Hex digest of every column."""
        return {column: str(state.hexdigest()) for column, state in sorted(self._states.items())}
