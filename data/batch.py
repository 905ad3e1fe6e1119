"""Batches: samples with their semantic ids, as padded tensors.

Legend: B samples, N context length, T target slots, L SID levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onetrain.data.options import BatchOptions
from onetrain.data.samples import Sample
from onetrain.data.sids import SidMap

DAY_MS = 86_400_000
GAP_BUCKETS = 32  # of the time between two events


@dataclass(frozen=True)
class Batch:
    """Context events oldest first, padded at the end with zeros; target slots of weight 0 are padding.

    int64 except where said.
    """

    sid_BNL: Tensor
    item_BN: Tensor
    behaviour_BN: Tensor
    scenario_BN: Tensor
    gap_BN: Tensor  # bucket of the time since the user's event before: floor(log2(1 + seconds)), at most 31
    length_B: Tensor
    target_item_BT: Tensor
    target_sid_BTL: Tensor
    end_BT: Tensor  # a target sees the first `end` events of its row
    weight_BT: Tensor  # float32
    new_day_BT: Tensor  # bool: the target lies on a later UTC day than the last event before its request

    @property
    def weight(self) -> float:
        """Sum of target weights."""
        return float(self.weight_BT.sum(dtype=torch.float64))


class BatchBuilder:
    """Samples to `Batch`, padded to the longest of its members."""

    def __init__(self, sids: SidMap, options: BatchOptions, behaviours: Sequence[str]) -> None:
        self.codes_IL = sids.codes_IL
        self.behaviour_weight = np.array(
            [options.behaviour_weights.get(name, 1.0) for name in behaviours], dtype=np.float32
        )

    def build(self, samples: Sequence[Sample]) -> Batch:
        """One row per sample; N and T are the largest of the batch."""
        contexts = [slice(sample.start, sample.end) for sample in samples]
        pairs = list(zip(samples, contexts, strict=True))
        length_B = np.array([sample.end - sample.start for sample in samples], dtype=np.int64)
        item_BN = _pad([sample.user.item[context] for sample, context in pairs])
        targets = [[event for request in sample.requests for event in request.targets] for sample in samples]
        ends = [[request.context_end for request in sample.requests for _ in request.targets] for sample in samples]
        rows = list(zip(samples, targets, strict=True))
        target_item_BT = _pad([sample.user.item[events] for sample, events in rows])
        return Batch(
            sid_BNL=torch.from_numpy(self.codes_IL[item_BN]),
            item_BN=torch.from_numpy(item_BN),
            behaviour_BN=torch.from_numpy(_pad([sample.user.behaviour[context] for sample, context in pairs])),
            scenario_BN=torch.from_numpy(_pad([sample.user.scenario[context] for sample, context in pairs])),
            gap_BN=torch.from_numpy(
                _pad([gap_buckets(sample.user.timestamp_ms, context) for sample, context in pairs])
            ),
            length_B=torch.from_numpy(length_B),
            target_item_BT=torch.from_numpy(target_item_BT),
            target_sid_BTL=torch.from_numpy(self.codes_IL[target_item_BT]),
            end_BT=torch.from_numpy(_pad([np.array(end) - s.start for s, end in zip(samples, ends, strict=True)])),
            weight_BT=torch.from_numpy(
                _pad([self.behaviour_weight[sample.user.behaviour[events]] for sample, events in rows], np.float32)
            ),
            new_day_BT=torch.from_numpy(
                _pad([_new_day(s, events, end) for (s, events), end in zip(rows, ends, strict=True)], np.bool_)
            ),
        )


def gap_buckets(timestamp_ms: NDArray[np.int64], events: slice) -> NDArray[np.int64]:
    """Bucket of the time since the event before, of each event of the slice; the user's first event has bucket 0."""
    first = max(events.start - 1, 0)
    seconds = np.diff(timestamp_ms[first : events.stop], prepend=timestamp_ms[first : first + 1]) // 1000
    buckets = np.floor(np.log2(1 + np.maximum(seconds, 0))).astype(np.int64)
    return np.minimum(buckets, GAP_BUCKETS - 1)[events.start - first :]


def _new_day(sample: Sample, events: list[int], ends: list[int]) -> NDArray[np.bool_]:
    time_ms = sample.user.timestamp_ms  # sliced first: a history can be long, and this runs for every sample
    return time_ms[events] // DAY_MS > time_ms[np.maximum(np.array(ends) - 1, 0)] // DAY_MS


def _pad(rows: Sequence[NDArray], dtype: type = np.int64) -> NDArray:
    out: NDArray = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out
