"""Ranks and metrics against lists spelled out item by item."""

import math

import numpy as np
import pytest
import torch

from onetrain.model.beam_search import Beams
from onetrain.model.ranking import NOT_FOUND, beam_faults, distinct_targets, item_ranks, ranking_metrics
from onetrain.model.trie import SidTrie

KS = (1, 3, 10)


def random_case(seed, rows=4, slots=3, items=30):
    """A catalogue with shared SIDs, beams over part of it, and requests with repeated targets and histories."""
    rng = np.random.default_rng(seed)
    codes_IL = rng.integers(0, (3, 2, 3), (items, 3))
    priority_I = rng.integers(0, 4, items)
    trie = SidTrie(torch.from_numpy(codes_IL), (3, 2, 3), torch.from_numpy(priority_I))
    beams_per_row = int(rng.integers(1, trie.n_leaves + 4))
    leaf_BK = np.full((rows, beams_per_row), -1)
    for row in range(rows):
        found = rng.permutation(trie.n_leaves)[: rng.integers(0, beams_per_row + 1)]
        leaf_BK[row, : len(found)] = found
    score_BK = np.where(leaf_BK >= 0, -np.arange(beams_per_row), -np.inf)
    beams = Beams(torch.zeros(rows, beams_per_row, 3, dtype=torch.int64), *map(torch.from_numpy, (score_BK, leaf_BK)))
    item_BT = rng.integers(0, items, (rows, slots))
    item_BT[0, -1] = item_BT[0, 0]  # one item under two behaviours
    real_BT = rng.random((rows, slots)) < 0.7
    real_BT[:, 0] = True
    item_BT[~real_BT] = 0  # padding is a valid index, of an item that may well be in the history
    seen_BS = rng.integers(-1, items, (rows, 12))
    seen_BS[1, :6] = 0
    return codes_IL, priority_I, trie, beams, item_BT, real_BT, seen_BS


def spelled_list(codes_IL, priority_I, leaves, left_out):
    """The recommended items of one request, best first."""
    sids = sorted({tuple(sid) for sid in codes_IL.tolist()})
    listed = []
    for leaf in leaves:
        if leaf >= 0:
            members = [i for i in range(len(codes_IL)) if tuple(codes_IL[i].tolist()) == sids[leaf]]
            listed += sorted(members, key=lambda i: (-priority_I[i], i))
    return [item for item in listed if item not in left_out]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_ranks_and_metrics_of_spelled_out_lists(seed, masked):
    codes_IL, priority_I, trie, beams, item_BT, real_BT, seen_BS = random_case(seed)
    items, real, seen = map(torch.from_numpy, (item_BT, real_BT, seen_BS))
    rank_BT = item_ranks(beams, trie, items, real, seen if masked else None)
    counted_BT = distinct_targets(items, real)
    metrics = ranking_metrics(rank_BT, counted_BT, KS)
    for row in range(len(item_BT)):
        targets = item_BT[row][real_BT[row]].tolist()
        left_out = set(seen_BS[row].tolist()) - set(targets) if masked else set()
        listed = spelled_list(codes_IL, priority_I, beams.leaf_BK[row].tolist(), left_out)
        for slot in range(item_BT.shape[1]):
            item = item_BT[row, slot]
            found = real_BT[row, slot] and item in listed
            assert int(rank_BT[row, slot]) == (listed.index(item) if found else NOT_FOUND)
        wanted = set(targets)
        assert int(counted_BT[row].sum()) == len(wanted)
        assert {int(item) for item in item_BT[row][counted_BT[row].numpy()]} == wanted
        for k in KS:
            hits = [place for place, item in enumerate(listed[:k]) if item in wanted]
            dcg = sum(1 / math.log2(place + 2) for place in hits)
            ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
            expected = {
                "recall": len(hits) / len(wanted),
                "hr": float(bool(hits)),
                "ndcg": dcg / ideal,
                "mrr": 1 / (hits[0] + 1) if hits else 0.0,
            }
            for name, value in expected.items():
                assert float(metrics[f"{name}@{k}"][row]) == pytest.approx(value, abs=1e-9), f"{name}@{k}"


def test_an_item_seen_twice_frees_one_place():
    codes_IL = torch.tensor([[0], [1], [2]])
    trie = SidTrie(codes_IL, (3,))
    beams = Beams(codes_IL[None], torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[0, 1, 2]]))
    target, real = torch.tensor([[2]]), torch.tensor([[True]])
    assert item_ranks(beams, trie, target, real).tolist() == [[2]]
    assert item_ranks(beams, trie, target, real, torch.tensor([[0, 0, 0]])).tolist() == [[1]]
    assert item_ranks(beams, trie, target, real, torch.tensor([[0, 2, 1]])).tolist() == [[0]]


def test_fractional_ranks_count_against_the_same_borders():
    metrics = ranking_metrics(torch.tensor([[0.5], [4.5], [5.0]]), torch.ones(3, 1, dtype=torch.bool), (5,))
    assert metrics["recall@5"].tolist() == [1, 1, 0]
    assert metrics["mrr@5"].tolist() == pytest.approx([1 / 1.5, 1 / 5.5, 0])
    assert metrics["ndcg@5"].tolist() == pytest.approx([1 / math.log2(2.5), 1 / math.log2(6.5), 0])


def test_beam_faults_count_invalid_and_repeated_beams():
    leaf_BK = torch.tensor([[3, 1, 2, 0], [1, 1, 1, -1], [-1, -1, -1, -1]])
    faults = beam_faults(Beams(torch.zeros(3, 4, 3, dtype=torch.int64), torch.zeros(3, 4), leaf_BK))
    assert faults["invalid_beams"].tolist() == [0, 0.25, 1]
    assert faults["duplicate_beams"].tolist() == [0, 0.5, 0]
