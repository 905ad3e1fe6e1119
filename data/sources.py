"""The sources of a stream: one or several prepared folders, each with the versions that were appended to it.

Legend: B samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onetrain.data.cursor import Update
from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.order import Cycle, GlobalOrder, ShuffledOrder, SourceOrder, TimeOrder, source_updates
from onetrain.data.samples import SampleIndex, SampleRows
from onetrain.data.shards import ShardReader
from onetrain.data.store import open_store
from onetrain.data.stream_options import StreamOptions
from onetrain.data.versions import check_history, newest_version, open_version

Ids = NDArray[np.int64]
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
        counts = stream.cycle()
        self.cycle = Cycle(tuple(counts.values()))
        folders = (
            {name: stream.mixture[name].prepared or prepared for name in counts} if stream.mixture else {"": prepared}
        )
        self.sources = [Source(name, folder, [self._open(folder, 0)]) for name, folder in folders.items()]
        for source in self.sources[1:]:
            _check_alike(self.sources[0], source)
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
        """Open every version up to these. DataError for one that does not follow from the version before."""
        for source in self.sources:
            for version in range(len(source.indices), versions.get(source.name, 0) + 1):
                source.indices.append(self._open(source.folder, version))
                self.__dict__.pop("_parts", None)

    def order(self, updates: Sequence[Update]) -> GlobalOrder:
        """The order that a cursor's updates describe."""
        self.extend({update.source: update.version for update in updates})
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
        readers, reader_B = self._parts.readers, np.empty_like(source_B)
        columns = [np.empty_like(id_B) for _ in range(5)]
        for source in np.unique(source_B).tolist():
            begun, first = self._parts.begun[source], self._parts.first[source]
            version_B = np.searchsorted(begun, id_B, side="right") - 1
            for version in np.unique(version_B[source_B == source]).tolist():
                here = np.flatnonzero((source_B == source) & (version_B == version))
                found = self.sources[source].indices[version].rows(id_B[here] - begun[version])
                reader_B[here] = first + version
                own = (found.row_B, found.start_B, found.first_B, found.stop_B, found.end_B)
                for column, values in zip(columns, own, strict=True):
                    column[here] = values
        return SampleRows(readers, reader_B, *columns)

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

    @cached_property
    def _parts(self) -> "_Parts":
        readers = [index.reader for source in self.sources for index in source.indices]
        firsts = np.cumsum([0, *(len(source.indices) for source in self.sources)]).tolist()
        return _Parts(tuple(readers), firsts, [np.array([0, *source.sizes[:-1]]) for source in self.sources])

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


def _check_alike(one: Source, other: Source) -> None:
    a, b = (source.indices[0].reader.manifest for source in (one, other))
    for name in COMMON:
        if getattr(a, name) != getattr(b, name):
            raise DataError(
                f"stream.mixture: {one.folder} and {other.folder} differ in {name} ({getattr(a, name)} and "
                f"{getattr(b, name)}). Sources of one mixture share items, semantic ids and vocabularies: prepare them "
                "with one item file and the same names."
            )
