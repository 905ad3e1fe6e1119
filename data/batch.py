"""Batches: samples with their semantic ids and features, as padded tensors.

Legend: B samples, N events of a pathway, T target slots, L SID levels, I items, E real events of a batch, flat.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onetrain.data.buckets import DAY_MS
from onetrain.data.errors import DataError
from onetrain.data.event_rows import EventRows
from onetrain.data.features import AGE, FeatureBuilder, FeatureNames, check_features
from onetrain.data.item_table import ItemTable
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.padding import Padding
from onetrain.data.pathways import Pathway
from onetrain.data.samples import SampleRows
from onetrain.data.shards import Histories
from onetrain.data.sids import SidMap

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class EventColumns:
    """One pathway: events oldest first, padded at the end with zeros; int64. N is at least 1, rows may be empty."""

    sid_BNL: Tensor
    index_BN: Tensor  # the event's place in the row's window: a target sees the events of an index below its `end`
    length_B: Tensor
    features: dict[str, Tensor]  # ids (B, N)


@dataclass(frozen=True)
class Batch:
    """Contexts, and targets whose slots of weight 0 are padding. int64 except where said."""

    sequences: dict[str, EventColumns]  # by pathway, in the order of batch.pathways
    user: dict[str, Tensor]  # (B,) features of the user
    target_item_BT: Tensor
    target_sid_BTL: Tensor
    end_BT: Tensor
    weight_BT: Tensor  # float32
    new_day_BT: Tensor  # bool: the target lies on a later UTC day than the last event before its request
    request: dict[str, Tensor]  # (B, T) features of each target's moment
    target_features: dict[str, Tensor]  # (B, T) features of each target item
    log_q_BT: Tensor  # float32: log of the item's share of the training events

    @property
    def weight(self) -> float:
        """Sum of target weights."""
        return float(self.weight_BT.sum(dtype=torch.float64))

    @property
    def rows(self) -> int:
        """Number of samples."""
        return len(self.weight_BT)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        groups = [self.user, self.request, self.target_features]
        tensors = [tensor for group in groups for tensor in group.values()]
        tensors += [
            self.target_item_BT,
            self.target_sid_BTL,
            self.end_BT,
            self.weight_BT,
            self.new_day_BT,
            self.log_q_BT,
        ]
        for events in self.sequences.values():
            tensors += [events.sid_BNL, events.index_BN, events.length_B, *events.features.values()]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def n_events(self) -> dict[str, int]:
        """Real events of each pathway."""
        return {name: int(events.length_B.sum()) for name, events in self.sequences.items()}


class BatchBuilder:
    """Samples to `Batch`, padded to the longest of its members.

    Raises DataError if `features` or a filter of options.pathways names what the data do not have.
    """

    def __init__(
        self, sids: SidMap, manifest: Manifest, items: ItemTable, options: BatchOptions, features: FeatureNames
    ) -> None:
        self.options = options
        smallest = np.min_scalar_type(
            max(sids.sizes) - 1
        )  # of the largest code: the table stays in a processor's cache
        self.codes_IL, self.levels = sids.codes_IL.astype(smallest), sids.codes_IL.shape[1]
        self.log_share_I = items.log_share_I
        self.names = check_features(features, manifest, items)
        if AGE in self.names.events and options.share_context == "user":
            raise DataError(
                f"The event feature {AGE!r} differs between the requests that share a context. Take it out, or set "
                "batch.share_context to request."
            )
        self.features = FeatureBuilder(manifest, items, options.utc_offset_hours)
        self.pathways = {
            name: Pathway(name, pathway, options.max_context, manifest) for name, pathway in options.pathways.items()
        }
        targets = options.target_behaviours
        self.is_target = np.isin(manifest.behaviours, targets) if targets else None
        self.behaviour_weight = np.array(
            [options.behaviour_weights.get(name, 1.0) for name in manifest.behaviours], dtype=np.float32
        )

    def build(self, rows: SampleRows) -> Batch:
        """One row per sample, at least one sample; N and T are the largest of the batch."""
        histories = rows.histories()
        targets, end_E = self._targets(rows, histories)
        item, names = targets.column("item"), self.names
        pad = Padding(targets.length_B, 2 + self.levels + len(names.request) + len(names.items))
        day, day_before = (
            targets.column("timestamp_ms") // DAY_MS,
            self._before(rows, histories, targets, end_E) // DAY_MS,
        )
        return Batch(
            sequences={name: self._sequence(pathway, rows, histories) for name, pathway in self.pathways.items()},
            user={name: torch.from_numpy(self.features.of_users(name, histories)) for name in names.user},
            target_item_BT=pad.ids(item),
            target_sid_BTL=pad.entries(self.codes_IL, item),
            end_BT=pad.ids(end_E - targets.of_row(rows.start_B)),
            weight_BT=pad(self.behaviour_weight[targets.column("behaviour")]),
            new_day_BT=pad(day > day_before),
            request={name: pad.ids(self.features.of_events(name, targets)) for name in names.request},
            target_features={name: pad.ids(self.features.of_items(name, item)) for name in names.items},
            log_q_BT=pad(self.log_share_I[item]),
        )

    def _targets(self, rows: SampleRows, histories: Histories) -> tuple[EventRows, Ids]:
        """Targets of every sample, and the end of each one's context."""
        chosen_R = None
        if self.is_target is not None:
            chosen_R = self.is_target[histories.events("behaviour", rows.first_B, rows.stop_B)]
        targets = EventRows(histories, rows.first_B, rows.stop_B, chosen_R)
        if self.options.share_context == "request":
            return targets, targets.of_row(rows.end_B)
        if self.options.request_by == "event":
            return targets, targets.place_E
        moments = EventRows(histories, rows.start_B, rows.stop_B)  # a request's context ends where its moment begins
        time_E, place_E = moments.column("timestamp_ms"), moments.place_E
        new_E = (np.diff(time_E, prepend=0) != 0) | (place_E == moments.of_row(rows.start_B))
        begins_E = place_E[np.maximum.accumulate(np.where(new_E, np.arange(len(new_E)), 0))]
        return targets, begins_E[_find(moments, targets.place_E - targets.of_row(rows.start_B), targets)]

    def _before(self, rows: SampleRows, histories: Histories, targets: EventRows, end_E: Ids) -> Ids:
        """Times of the last event before each target's request, or of the first event where there is none."""
        if self.options.share_context == "request":
            last_B = np.maximum(rows.end_B - 1, 0)
            return targets.of_row(histories.events("timestamp_ms", last_B, last_B + 1))
        begin_B = np.maximum(rows.start_B - 1, 0)
        window = EventRows(histories, begin_B, rows.stop_B)
        offset_E = np.maximum(end_E - 1, 0) - targets.of_row(begin_B)
        return window.column("timestamp_ms")[_find(window, offset_E, targets)]

    def _sequence(self, pathway: Pathway, rows: SampleRows, histories: Histories) -> EventColumns:
        moment_B = (
            histories.events("timestamp_ms", rows.first_B, rows.first_B + 1) if AGE in self.names.events else None
        )
        events = pathway.events(rows, histories)
        pad = Padding(events.length_B, 1 + self.levels + len(self.names.events))
        return EventColumns(
            sid_BNL=pad.entries(self.codes_IL, events.column("item")),
            index_BN=_index(events, rows, pad),
            length_B=torch.from_numpy(events.length_B),
            features={name: pad.ids(self.features.of_events(name, events, moment_B)) for name in self.names.events},
        )


def _index(events: EventRows, rows: SampleRows, pad: Padding) -> Tensor:
    """(B, N) place of each event in its row's window."""
    if events.first_B is not None:
        return pad.counted(events.first_B - rows.start_B)
    return pad.ids(events.place_E - events.of_row(rows.start_B))


def _find(rows: EventRows, offset_E: Ids, targets: EventRows) -> Ids:
    """Places in the flat `rows` of the events that lie so far behind the beginning of their target's row."""
    return offset_E + targets.of_row(np.cumsum(rows.length_B) - rows.length_B)
