"""Writes blocks of users into shards, and keeps what a manifest says of them: counts, time range, fingerprint."""

from pathlib import Path
from typing import Any

import numpy as np

from onetrain.data.fingerprint import ContentHash
from onetrain.data.schema import user_column
from onetrain.data.shard_writer import ShardWriter, UserBlock


class ContentsWriter:
    """Shards, user table and totals of one preparation. `bounds`: what of the splits the fingerprint covers."""

    def __init__(
        self,
        folder: Path,
        extra: tuple[str, ...],
        shard_events: int,
        user_features: tuple[str, ...],
        items: int,
        bounds: tuple[str, ...] = ("valid_start", "test_start"),
    ) -> None:
        self.content = ContentHash()
        self.train_count = np.zeros(items, np.int64)
        self.events = 0
        self._writer = ShardWriter(folder, extra, shard_events, user_features)
        self._bounds = bounds
        self._split = np.zeros(3, np.int64)  # events that train, validate, test
        self._first_ms, self._last_ms = np.iinfo(np.int64).max, np.iinfo(np.int64).min

    def append(self, block: UserBlock) -> None:
        """Add whole users, which come after all users before."""
        timestamps = block.columns["timestamp_ms"]
        place = np.arange(len(timestamps)) - np.repeat(np.cumsum(block.lengths) - block.lengths, block.lengths)
        train = (place >= np.repeat(block.train_start, block.lengths)) & (
            place < np.repeat(block.valid_start, block.lengths)
        )
        self.train_count += np.bincount(block.columns["item"][train], minlength=len(self.train_count))
        starts = (block.train_start, block.valid_start, block.test_start, block.lengths)
        self._split += np.diff([int(start.sum()) for start in starts])
        self._first_ms = min(self._first_ms, int(timestamps.min()))
        self._last_ms = max(self._last_ms, int(timestamps.max()))
        self._hash(block)
        self._writer.append(block)
        self.events += len(timestamps)

    def close(self) -> None:
        """Finish the files."""
        self._writer.close()

    def abort(self) -> None:
        """Close the files without finishing them."""
        self._writer.abort()

    def totals(self) -> dict[str, Any]:
        """Fields of the manifest, once closed."""
        user_table, batch_table = self._writer.tables()
        train, valid, test = self._split.tolist()
        return {
            "shards": tuple(self._writer.shards),
            "user_table": user_table,
            "batch_table": batch_table,
            "users": sum(shard.rows for shard in self._writer.shards),
            "events": self.events,
            "n_train_events": train,
            "n_valid_events": valid,
            "n_test_events": test,
            "time_range_ms": (self._first_ms, self._last_ms),
        }

    def _hash(self, block: UserBlock) -> None:
        self.content.update_text("user", block.users)
        self.content.update("length", block.lengths.astype(np.int64))
        for name in self._bounds:
            self.content.update(name, getattr(block, name).astype(np.int64))
        for name in self._writer.event_columns:
            self.content.update(name, block.columns[name])
        for name, ids in block.attributes.items():
            self.content.update(user_column(name), ids.astype(np.int32))
