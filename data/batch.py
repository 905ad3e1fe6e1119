"""Batches: samples with their semantic ids and features, as padded tensors.

Legend: B samples, N events of a pathway, T target slots, L SID levels, I items, E real events of a batch, flat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onetrain.data.errors import DataError
from onetrain.data.features import AGE, DAY_MS, EventRows, FeatureBuilder, FeatureNames, check_features
from onetrain.data.item_table import ItemTable
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.pathways import Pathway
from onetrain.data.samples import Sample
from onetrain.data.sids import SidMap


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
        self.codes_IL = sids.codes_IL
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
        self.behaviour_weight = np.array(
            [options.behaviour_weights.get(name, 1.0) for name in manifest.behaviours], dtype=np.float32
        )

    def build(self, samples: Sequence[Sample]) -> Batch:
        """One row per sample; N and T are the largest of the batch."""
        events = [[event for request in sample.requests for event in request.targets] for sample in samples]
        ends = [[request.context_end for request in sample.requests for _ in request.targets] for sample in samples]
        targets = EventRows(samples, [np.array(row) for row in events])
        before = EventRows(samples, [np.maximum(np.array(row) - 1, 0) for row in ends])
        start_B = np.array([sample.start for sample in samples], dtype=np.int64)
        item, pad = targets.column("item"), _Padding(targets.length_B)
        day, day_before = (rows.column("timestamp_ms") // DAY_MS for rows in (targets, before))
        return Batch(
            sequences={
                name: self._sequence(EventRows(samples, [pathway.events(sample) for sample in samples]), start_B)
                for name, pathway in self.pathways.items()
            },
            user={name: torch.from_numpy(self.features.of_users(name, samples)) for name in self.names.user},
            target_item_BT=pad(item.astype(np.int64)),
            target_sid_BTL=pad(self.codes_IL[item]),
            end_BT=pad(np.concatenate(ends) - targets.of_row(start_B)),
            weight_BT=pad(self.behaviour_weight[targets.column("behaviour")]),
            new_day_BT=pad(day > day_before),
            request={name: pad(self.features.of_events(name, targets)) for name in self.names.request},
            target_features={name: pad(self.features.of_items(name, item)) for name in self.names.items},
            log_q_BT=pad(self.log_share_I[item]),
        )

    def _sequence(self, rows: EventRows, start_B: NDArray[np.int64]) -> EventColumns:
        pad = _Padding(rows.length_B)
        return EventColumns(
            sid_BNL=pad(self.codes_IL[rows.column("item")]),
            index_BN=pad(np.concatenate(rows.events) - rows.of_row(start_B)),
            length_B=torch.from_numpy(rows.length_B),
            features={name: pad(self.features.of_events(name, rows)) for name in self.names.events},
        )


class _Padding:
    """Puts flat values (E, ...) into rows (B, N, ...) of these lengths, zeros behind."""

    def __init__(self, length_B: NDArray[np.int64]) -> None:
        self.real_BN = np.arange(max(1, length_B.max(initial=0))) < length_B[:, None]

    def __call__(self, values: NDArray) -> Tensor:
        out = np.zeros(self.real_BN.shape + values.shape[1:], dtype=values.dtype)
        out[self.real_BN] = values
        return torch.from_numpy(out)
