"""Floors: what counting alone achieves, to stand beside every model.

Popularity ranks items by their training count. Last-item transitions rank by how often an item followed the last one in
training, plus half of how often it came right before it, then by popularity. Seen items are masked, ties count half.
Both reproduce published untrained floors of the Amazon benchmarks.

Legend: B requests, T target slots, I items.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from onetrain.data.samples import Sample
from onetrain.data.shards import ShardReader
from onetrain.data.training_events import training_blocks

FLOORS = ("popularity", "last-item transitions")
REVERSE_WEIGHT = 0.5
EVENTS_PER_BLOCK = 1_000_000


class Floors:
    """Training counts of a prepared data set; reads every training event once."""

    def __init__(self, reader: ShardReader, items: int) -> None:
        self.popularity_I = np.zeros(items)
        follows = sparse.csr_matrix((items, items))
        for item, user in training_blocks(reader, EVENTS_PER_BLOCK):
            self.popularity_I += np.bincount(item, minlength=items)
            pair = np.flatnonzero(user[1:] == user[:-1])
            counted = (np.ones(len(pair)), (item[pair], item[pair + 1]))
            follows += sparse.coo_matrix(counted, shape=(items, items)).tocsr()
        self.transitions = (follows + REVERSE_WEIGHT * follows.T).tocsr()
        self._tie_break_I = self.popularity_I * (REVERSE_WEIGHT / 2 / (self.popularity_I.max() + 1))

    def ranks(self, floor: str, samples: Sequence[Sample], target_item_BT: NDArray[np.int64]) -> NDArray[np.float64]:
        """0-based rank (B, T) of each target item; of tied items, half count as ahead.

        Row b holds the targets of sample b, which is one request; ranks of padding slots mean nothing.
        """
        if floor == "popularity":
            score_BI = np.repeat(self.popularity_I[None], len(samples), axis=0)
        else:
            last = [sample.user.item[sample.end - 1] for sample in samples]
            score_BI = self.transitions[last].toarray() + self._tie_break_I
        target_BT = np.take_along_axis(score_BI, target_item_BT, axis=1)
        for score_I, sample in zip(score_BI, samples, strict=True):
            item = sample.user.item
            targets = [item[event] for request in sample.requests for event in request.targets]
            score_I[np.setdiff1d(item[: sample.end], targets)] = -np.inf  # a target is never masked
        ahead_BT = (score_BI[:, None] > target_BT[..., None]).sum(-1)
        tied_BT = (score_BI[:, None] == target_BT[..., None]).sum(-1) - 1
        return ahead_BT + tied_BT / 2
