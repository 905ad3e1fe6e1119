"""Ranks the items of a split for every request by constrained beam search, shared out over ranks.

Legend: B requests, T target slots, S seen events.
"""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onetrain.data.batch import Batch
from onetrain.data.errors import DamagedShardError, DataError
from onetrain.data.permutation import key_of, permute
from onetrain.data.samples import Sample, SampleIndex, Split
from onetrain.launcher.job import PreparedData, model_inputs
from onetrain.launcher.options import RunConfig
from onetrain.model.beam_search import beam_search
from onetrain.model.decoder import SidDecoder
from onetrain.model.loss import cross_entropies
from onetrain.model.ranking import beam_faults, distinct_targets, item_ranks, ranking_metrics
from onetrain.model.trie import SidTrie
from onetrain.parallel.process_group import Ranks, all_reduce_sum

SUBSETS = ("all", "last gap > 0 days")
Progress = Callable[[str, int, int | None], None]
Ranker = Callable[[Sequence[Sample], Batch], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class SubsetMetrics:
    """Means over the requests of one subset."""

    requests: int
    means: dict[str, float]


class Evaluator:
    """The requests of one split of a job.

    The subset "last gap > 0 days" holds requests on a later day than the event before: in some data sets the order
    within a day is an artefact. Raises DataError if the split has no request.
    """

    def __init__(self, data: PreparedData, config: RunConfig, split: Split) -> None:
        self.data, self.config = data, config
        self.index = SampleIndex(
            data.reader,
            split,
            dataclasses.replace(config.batch, share_context="request"),
            skip_damaged=config.stream.damaged == "skip",
            cache=None if config.stream.cache is None else Path(config.stream.cache),
        )
        if len(self.index) == 0:
            raise DataError(
                f"The {self.index.split} split has no request to evaluate; look at data.split, batch.min_context and "
                "batch.target_behaviours."
            )
        self.builder = data.builder(config)
        codes_IL = torch.from_numpy(data.sids.codes_IL)
        self.trie = SidTrie(codes_IL, data.sids.sizes, torch.from_numpy(data.train_count_I.astype(np.float64)))

    def run(
        self, ranker: Ranker, ranks: Ranks, max_requests: int | None = None, progress: Progress | None = None
    ) -> dict[str, SubsetMetrics]:
        """Means of the ranker's per-request metrics by subset, equal on all ranks; every rank takes part.

        With `max_requests`, the first requests of a fixed shuffle.
        """
        count = len(self.index)
        ids = np.arange(count if max_requests is None else min(max_requests, count))
        if len(ids) < count:
            ids = permute(ids, count, key_of(self.data.manifest.fingerprint, "0/0"))
        mine = ids[ranks.rank :: ranks.world_size].tolist()
        sums: dict[str, dict[str, float]] = {subset: defaultdict(float) for subset in SUBSETS}
        size = self.config.evaluation.batch_size
        for start in range(0, max(len(mine), 1), size):
            chosen = self._readable(mine[start : start + size])
            counted = bool(chosen)
            if not chosen:  # the metrics' names are needed all the same
                chosen = next(found for sample_id in ids.tolist() if (found := self._readable([sample_id])))
            samples, batch = [self.index[n] for n in chosen], self.builder.build(self.index.rows(chosen))
            metrics = ranker(samples, batch)
            everyone_B = torch.full((len(samples),), counted)
            masks = {SUBSETS[0]: everyone_B, SUBSETS[1]: everyone_B & batch.new_day_BT[:, 0]}
            for subset, mask_B in masks.items():
                sums[subset]["requests"] += int(mask_B.sum())
                for name, value_B in metrics.items():
                    sums[subset][name] += float(value_B.cpu()[mask_B].sum())
            if progress is not None:
                progress("evaluate", min(start + size, len(mine)), len(mine))
        return {subset: _reduce(total, ranks) for subset, total in sums.items()}

    def _readable(self, ids: list[int]) -> list[int]:
        """The samples whose shards are not damaged, with stream.damaged: skip; else all of them."""
        while self.config.stream.damaged == "skip":
            rows = self.index.rows(ids)
            ids = np.array(ids, dtype=np.int64)[rows.readable()].tolist()
            with contextlib.suppress(DamagedShardError):
                self.index.rows(ids).histories()
                break
        return ids

    def model_ranker(self, model: SidDecoder, device: torch.device) -> Ranker:
        """Metrics of a model's beams, its loss per request, and the shares of invalid and duplicate beams."""
        options = self.config.evaluation
        trie = self.trie.to(device)
        beam_size = options.beam_size or trie.n_leaves

        @torch.no_grad()
        def rank(samples: Sequence[Sample], batch: Batch) -> dict[str, Tensor]:
            context, targets = model_inputs(batch, device)
            request = {
                name: ids_BT[:, 0] for name, ids_BT in targets.request.items()
            }  # one moment, and one scenario where the model reads it
            beams = beam_search(model, context, trie, beam_size, request)
            seen_BS = _seen(samples).to(device) if options.mask_seen else None
            real_BT = targets.weight_BT > 0
            item_BT = batch.target_item_BT.to(device)
            rank_BT = item_ranks(beams, trie, item_BT, real_BT, seen_BS)
            metrics = ranking_metrics(rank_BT, distinct_targets(item_BT, real_BT), options.ks)
            predictions = model(context, targets)
            loss_BT = real_BT.double()
            loss_BT[real_BT] = cross_entropies(predictions)[0].mean(0).double()
            return {**metrics, **beam_faults(beams), "loss": loss_BT.sum(1) / real_BT.sum(1)}

        return rank


def _seen(samples: Sequence[Sample]) -> Tensor:
    """(B, S) items of each user's whole history before the request, -1 padded."""
    histories = [sample.user.item[: sample.end] for sample in samples]
    seen_BS = np.full((len(samples), max(map(len, histories))), -1, dtype=np.int64)
    for row, history in zip(seen_BS, histories, strict=True):
        row[: len(history)] = history
    return torch.from_numpy(seen_BS)


def _reduce(total: dict[str, float], ranks: Ranks) -> SubsetMetrics:
    if ranks.world_size > 1:
        total = dict(zip(sorted(total), all_reduce_sum([total[name] for name in sorted(total)], ranks), strict=True))
    requests = total["requests"]
    means = {name: value / max(requests, 1) for name, value in total.items() if name != "requests"}
    return SubsetMetrics(int(requests), means)
