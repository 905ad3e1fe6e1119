"""The sources of a stream: one or several prepared folders, each with the versions that were appended to it.

Legend: B samples.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onetrain.data.cursor import Cursor, Update
from onetrain.data.errors import DataError
from onetrain.data.fingerprint import json_fingerprint
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.order import Cycle, GlobalOrder, ShuffledOrder, SourceOrder, TimeOrder, source_updates
from onetrain.data.samples import SampleIndex, SampleRows
from onetrain.data.shards import ShardReader
from onetrain.data.store import open_store
from onetrain.data.stream_options import StreamOptions
from onetrain.data.versions import check_history, newest_version, open_version

Ids = NDArray[np.int64]
VISIBLE_WITHIN_S = 20.0
COMMON = (
    "catalogue_fingerprint",
    "sid_fingerprint",
    "behaviours",
    "scenarios",
    "extra",
    "item_features",
    "user_features",
)


@dataclass
class Source:
    """One prepared folder: the training samples of every version, numbered one version after another."""

    name: str
    folder: str
    indices: list[SampleIndex]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of versions 0 to v together."""
        return tuple(np.cumsum([len(index) for index in self.indices]).tolist())

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the contents up to each version."""
        return tuple(index.fingerprint for index in self.indices)


class Sources:
    """All sources of a run, opened. `extend` opens versions that were appended since.

    Raises DataError for folders that do not share items, SIDs and vocabularies, and for a source without samples.
    """

    def __init__(self, prepared: str, stream: StreamOptions, batch: BatchOptions, seed: int) -> None:
        self._stream, self._batch, self._seed = stream, batch, seed
        self._cache = None if stream.cache is None else Path(stream.cache)
        self._growing = threading.Lock()
        counts = stream.cycle()
        self.cycle = Cycle(tuple(counts.values()))
        folders = (
            {name: stream.mixture[name].prepared or prepared for name in counts} if stream.mixture else {"": prepared}
        )
        self.sources = [Source(name, folder, [self._open(folder, 0)]) for name, folder in folders.items()]
        main = Manifest.load(prepared)  # whose items and SIDs batches get
        for source in self.sources:
            _check_alike(prepared, main, source)
        for source in self.sources:
            if not len(source.indices[0]):
                raise DataError(
                    f"There is no training sample in {source.folder}. Look at batch.target_behaviours, "
                    "batch.min_context and data.split, and at the preparation report."
                )
        self.extend(self.newest())

    @property
    def manifest(self) -> Manifest:
        """Of the first source's first version, which the others agree with."""
        return self.sources[0].indices[0].reader.manifest

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, in order."""
        return tuple(source.name for source in self.sources)

    def newest(self) -> dict[str, int]:
        """The newest version there is of every source; looks at the folders."""
        return {source.name: newest_version(source.folder, len(source.indices) - 1) for source in self.sources}

    @property
    def size(self) -> int:
        """Samples of all versions of all sources."""
        return sum(source.sizes[-1] for source in self.sources)

    def contents(self, versions: dict[str, int]) -> dict[str, list[str]]:
        """What each source holds up to its version: fingerprint and number of samples of every version.

        Raises DataError for a version that is not there.
        """
        self.extend(versions)
        found = {}
        for source in self.sources:
            indices = source.indices[: versions.get(source.name, 0) + 1]
            found[source.name] = [f"{index.fingerprint}, {len(index)} samples" for index in indices]
        return found

    def extend(self, versions: dict[str, int]) -> None:
        """Open every version up to these, in this thread or the one that was first.

        Raises DataError for one that does not follow from the version before.
        """
        with self._growing:
            for source in self.sources:
                for version in range(len(source.indices), versions.get(source.name, 0) + 1):
                    _wait_for(source, version)
                    index = self._open(source.folder, version)
                    _check_follows(source, version, index)
                    source.indices.append(index)
            self._parts = _Parts.of(self.sources)

    def grown(self, cursor: Cursor, versions: dict[str, int]) -> Cursor:
        """The cursor, from which on the sources hold these versions, with fingerprints of all that they hold."""
        return cursor.updated(versions, {name: self._contents(name, v) for name, v in versions.items()})

    def _contents(self, name: str, version: int) -> str:
        return json_fingerprint(self.contents({name: version})[name])

    def _check(self, updates: Sequence[Update]) -> None:
        """Raises DataError where this process does not find what the cursor was made with."""
        for update in updates:
            if update.contents and (found := self._contents(update.source, update.version)) != update.contents:
                raise DataError(
                    f"{update.source or 'data.prepared'} up to version {update.version} has the contents {found} here, "
                    f"and {update.contents} where this run took it up: it was prepared again, a copy of it is older, "
                    "or other shards are damaged (stream.damaged: skip). Restore it, or start another run."
                )

    def order(self, updates: Sequence[Update]) -> GlobalOrder:
        """The order that a cursor's updates describe."""
        self.extend({update.source: update.version for update in updates})
        self._check(updates)
        orders: list[SourceOrder] = []
        for number, source in enumerate(self.sources):
            own = source_updates(updates, source.name, self.cycle, number)
            if self._stream.order == "time":
                orders.append(TimeOrder(tuple(index.by_time for index in source.indices[: own[-1][1] + 1])))
            else:
                window = self._stream.shuffle_window
                orders.append(ShuffledOrder(source.sizes, source.fingerprints, self._seed, own, window))
        return GlobalOrder(orders, self.cycle)

    def rows(self, source_B: Ids, id_B: Ids) -> SampleRows:
        """Samples by source and number."""
        parts, reader_B = self._parts, np.empty_like(source_B)
        columns = [np.empty_like(id_B) for _ in range(5)]
        for source in np.unique(source_B).tolist():
            begun, first = parts.begun[source], parts.first[source]
            version_B = np.searchsorted(begun, id_B, side="right") - 1
            for version in np.unique(version_B[source_B == source]).tolist():
                here = np.flatnonzero((source_B == source) & (version_B == version))
                found = self.sources[source].indices[version].rows(id_B[here] - begun[version])
                reader_B[here] = first + version
                own = (found.row_B, found.start_B, found.first_B, found.stop_B, found.end_B)
                for column, values in zip(columns, own, strict=True):
                    column[here] = values
        return SampleRows(parts.readers, reader_B, *columns)

    def any_readable(self) -> SampleRows:
        """One sample of a shard that nothing is known to be wrong with. DataError when there is none."""
        for source in self.sources:
            for index in source.indices:
                rows = index.any_readable()
                if rows is not None:
                    return rows
        raise DataError(
            f"Every shard with samples in {', '.join(source.folder for source in self.sources)} is damaged or missing. "
            "Copy the folder again or run `onetrain prepare` again."
        )

    def _open(self, folder: str, version: int) -> SampleIndex:
        store = open_store(folder, self._stream)
        manifest = open_version(store, version)
        check_history(store.name, manifest, self._batch)
        return SampleIndex(
            ShardReader(store.of_version(version), manifest),
            "train",
            self._batch,
            by_time=self._stream.order == "time",
            skip_damaged=self._stream.damaged == "skip",
            cache=self._cache,
        )


@dataclass(frozen=True)
class _Parts:
    """Every version of every source in one row."""

    readers: tuple[ShardReader, ...]
    first: list[int]  # of each source: number of its version 0 among the readers
    begun: list[Ids]  # of each source: samples before each version

    @classmethod
    def of(cls, sources: Sequence[Source]) -> "_Parts":
        """Those of these sources."""
        readers = [index.reader for source in sources for index in source.indices]
        firsts = np.cumsum([0, *(len(source.indices) for source in sources)]).tolist()
        return cls(tuple(readers), firsts, [np.array([0, *source.sizes[:-1]]) for source in sources])


def _check_alike(prepared: str, main: Manifest, source: Source) -> None:
    found = source.indices[0].reader.manifest
    for name in COMMON:
        if getattr(main, name) != getattr(found, name):
            raise DataError(
                f"stream.mixture: {prepared} and {source.folder} differ in {name} ({getattr(main, name)} and "
                f"{getattr(found, name)}). Sources of one mixture share items, semantic ids and vocabularies with "
                "data.prepared: prepare them with one item file and the same names."
            )


def _wait_for(source: Source, version: int) -> None:
    """Another machine may see a new version some seconds earlier, where a folder is shared."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while newest_version(source.folder, version - 1) < version and time.monotonic() < deadline:
        time.sleep(0.2)


def _check_follows(source: Source, version: int, index: SampleIndex) -> None:
    """The folder may have been prepared again since its older versions were opened."""
    before, manifest = source.indices[version - 1].reader.manifest, index.reader.manifest
    if (manifest.parent, manifest.catalogue_fingerprint) != (before.fingerprint, before.catalogue_fingerprint):
        raise DataError(
            f"version {version} of {source.folder} does not follow from the version {version - 1} that this run "
            f"reads (fingerprint {before.fingerprint}): the folder was prepared again meanwhile. Start another run."
        )
