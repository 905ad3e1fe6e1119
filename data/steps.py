"""From a cursor to the micro batches of one rank: the one code for the in-process stream and for the service's actors.

Legend: G samples of the global batch, B of a micro batch.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from onetrain.data.batch import Batch, BatchBuilder
from onetrain.data.cursor import Cursor
from onetrain.data.errors import DamagedShardError, DataError
from onetrain.data.features import FeatureNames
from onetrain.data.item_table import ItemTable
from onetrain.data.options import BatchOptions
from onetrain.data.order import GlobalOrder
from onetrain.data.samples import SampleRows
from onetrain.data.sharing import share_out
from onetrain.data.sids import SidMap
from onetrain.data.sources import Sources
from onetrain.data.stream_options import StreamOptions


@dataclass(frozen=True)
class Cost:
    """What a sample of some length costs to compute, in any unit: fixed + linear * N + square * N ** 2."""

    fixed: float = 1.0
    linear: float = 1.0
    square: float = 0.0

    def __call__(self, length: NDArray[np.int64]) -> NDArray[np.float64]:
        """Cost of each of these lengths."""
        n = length.astype(np.float64)
        return self.fixed + (self.linear + self.square * n) * n


@dataclass(frozen=True)
class StreamSpec:
    """All that a process needs to build any batch of a run."""

    prepared: str
    stream: StreamOptions
    batch: BatchOptions
    features: FeatureNames
    seed: int
    global_batch_size: int
    micro_batches: int  # of each data rank and step
    ranks: int  # data ranks
    cost: Cost = Cost()
    sid_fingerprint: str | None = None  # of the SID map that this run was started with; None = whatever is there


@dataclass(frozen=True)
class BuildStats:
    """What was built for one rank and step."""

    samples: int
    events: int
    bytes: int
    seconds: float
    padding: float  # share of context positions that are padding
    cost: float  # of the micro batches as they are padded, in the unit of StreamSpec.cost
    skipped: int  # samples of damaged shards that were left out
    sources: dict[str, int] = field(default_factory=dict)  # samples of each source


@dataclass(frozen=True)
class BuiltStep:
    """What one rank trains on in one optimizer step."""

    micro_batches: list[Batch]
    stats: BuildStats


class StepBuilder:
    """Builds any step of any rank. Raises DataError for data that cannot be used."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.sources = Sources(spec.prepared, spec.stream, spec.batch, spec.seed)
        sids = SidMap.load(f"{spec.prepared}/sids", spec.stream)
        sids.check_against(self.sources.manifest)
        if spec.sid_fingerprint not in (None, sids.fingerprint):
            raise DataError(
                f"{spec.prepared}/sids is the SID map {sids.fingerprint} now, and this run was started with "
                f"{spec.sid_fingerprint}: codes would mean other items. Restore that map, or start another run."
            )
        self.builder = BatchBuilder(
            sids, self.sources.manifest, ItemTable.load(spec.prepared, spec.stream), spec.batch, spec.features
        )
        self._order = lru_cache(maxsize=4)(self.sources.order)

    def order(self, cursor: Cursor) -> GlobalOrder:
        """The order that the cursor belongs to."""
        return self._order(cursor.updates)

    def steps_left(self, cursor: Cursor) -> int | None:
        """Steps until the order ends; None = it does not."""
        length = self.order(cursor).length
        return None if length is None else -(-(length - cursor.position) // self.spec.global_batch_size)

    def after(self, cursor: Cursor) -> Cursor:
        """The cursor once the step that begins here is done."""
        length, position = self.order(cursor).length, cursor.position + self.spec.global_batch_size
        return cursor.at(position if length is None else min(position, length))

    def starts(self, cursor: Cursor, count: int) -> Iterator[Cursor]:
        """The beginnings of the next `count` steps from the cursor on, or of fewer where the order ends."""
        left, size = self.steps_left(cursor), self.spec.global_batch_size
        count = count if left is None else min(count, left)
        return (cursor.at(cursor.position + number * size) for number in range(count))

    def rows(self, cursor: Cursor) -> tuple[NDArray[np.int64], SampleRows]:
        """Source number and place of every sample of the global batch that begins at the cursor, in order."""
        source_G, id_G = self.order(cursor).sample_ids(cursor.position, self.spec.global_batch_size)
        return source_G, self.sources.rows(source_G, id_G)

    def build(self, cursor: Cursor, rank: int) -> BuiltStep:
        """The micro batches of a data rank, of the global batch that begins at the cursor."""
        started = time.perf_counter()
        source_G, rows = self.rows(cursor)
        spec = self.spec
        reach_G = rows.reach(spec.batch)
        shares = share_out(reach_G, spec.cost, spec.ranks, spec.micro_batches)[rank]
        built = [self._build(rows, places) for places in shares]
        batches, kept = [batch for batch, count in built if count], sum(count for _, count in built)
        own = np.bincount(source_G[np.concatenate(shares)], minlength=len(self.sources.names)).tolist()
        stats = BuildStats(
            samples=kept,
            events=sum(sum(batch.n_events.values()) for batch in batches),
            bytes=sum(batch.n_bytes for batch in batches),
            seconds=time.perf_counter() - started,
            padding=padding(batches),
            cost=sum(len(places) * float(spec.cost(reach_G[places].max())) for places in shares if len(places)),
            skipped=sum(map(len, shares)) - kept,
            sources=dict(zip(self.sources.names, own, strict=True)) if spec.stream.mixture else {},
        )
        return BuiltStep([batch for batch, _ in built], stats)

    def _build(self, rows: SampleRows, places: NDArray[np.int64]) -> tuple[Batch, int]:
        """A micro batch of the samples at these places, and how many of them it holds."""
        while True:
            kept = places if self.spec.stream.damaged == "error" else places[rows[places].readable()]
            try:
                return (self.builder.build(rows[kept]) if len(kept) else self._placeholder(rows)), len(kept)
            except DamagedShardError:  # vanished just now
                if self.spec.stream.damaged == "error":
                    raise

    def _placeholder(self, rows: SampleRows) -> Batch:
        """A micro batch that counts for nothing: every rank computes as many."""
        readable = rows if self.spec.stream.damaged == "error" else rows[rows.readable()]
        spare = readable[np.argsort(readable.reach(self.spec.batch), kind="stable")[:1]]  # the shortest
        batch = self.builder.build(spare if len(spare) else self.sources.any_readable())
        return replace(batch, weight_BT=torch.zeros_like(batch.weight_BT))


def padding(batches: list[Batch]) -> float:
    """Share of the batches' context positions that are padding."""
    positions = sum(columns.index_BN.numel() for batch in batches for columns in batch.sequences.values())
    events = sum(sum(batch.n_events.values()) for batch in batches)
    return 1 - events / positions if positions else 0.0
