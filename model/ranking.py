"""Where the targets stand among the recommended items, and the metrics of it.

Items that share a SID stand in the trie's order: higher training count first, then lower item index.

Legend: B requests, T target slots, K beams, S seen items, L SID levels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from onetrain.model.beam_search import Beams
from onetrain.model.trie import SidTrie

NOT_FOUND = 1 << 40  # rank of an item that no beam holds


def distinct_targets(item_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Slots (B, T), bool, that count in a ranking: of a request's equal targets only the first.

    A request may hold one item under several behaviours, a list holds it once.
    """
    equal_BTT = (item_BT[:, :, None] == item_BT[:, None]) & real_BT[:, None]
    return real_BT & ~equal_BTT.tril(-1).any(-1)


def item_ranks(beams: Beams, trie: SidTrie, item_BT: Tensor, real_BT: Tensor, seen_BS: Tensor | None = None) -> Tensor:
    """0-based rank (B, T) of each target in the list that the beams spell out, NOT_FOUND where it is not in it.

    `real_BT` is false in slots that hold no target; their rank is NOT_FOUND. `seen_BS` holds item indices to leave out
    of the list (-1 = padding, repeats allowed); a target is never left out.
    """
    size_BK = torch.where(beams.leaf_BK >= 0, trie.leaf_size_U[beams.leaf_BK.clamp_min(0)], 0)
    before_BK = size_BK.cumsum(1) - size_BK

    def listed(item_BX: Tensor) -> Tensor:
        hit_BXK = trie.leaf_I[item_BX][..., None] == beams.leaf_BK[:, None]
        rank_BX = (hit_BXK * before_BK[:, None]).sum(-1) + trie.rank_in_leaf_I[item_BX]
        return torch.where(hit_BXK.any(-1), rank_BX, NOT_FOUND)

    rank_BT = torch.where(real_BT, listed(item_BT), NOT_FOUND)
    if seen_BS is None:
        return rank_BT
    seen_BS = seen_BS.sort(1).values
    first_BS = F.pad(seen_BS[:, 1:] != seen_BS[:, :-1], (1, 0), value=True)  # an item seen twice holds one place
    target_BS = ((seen_BS[:, :, None] == item_BT[:, None]) & real_BT[:, None]).any(-1)
    left_out_BS = torch.where((seen_BS >= 0) & first_BS & ~target_BS, listed(seen_BS.clamp_min(0)), NOT_FOUND)
    ahead_BT = (left_out_BS[:, None] < rank_BT[:, :, None]).sum(-1)
    return torch.where(rank_BT == NOT_FOUND, rank_BT, rank_BT - ahead_BT)


def ranking_metrics(rank_BT: Tensor, real_BT: Tensor, ks: tuple[int, ...]) -> dict[str, Tensor]:
    """Metrics (B,) of each request at each k; requests have one or more real targets, all different items.

    recall: share of the targets in the first k. hr: whether any is. mrr: 1 / (1 + rank of the first), 0 beyond k. ndcg:
    sum of 1 / log2(2 + rank) over its largest possible value. Ranks may be fractional (ties counted half).
    """
    rank_BT = rank_BT.double().masked_fill(~real_BT, float(NOT_FOUND))
    targets_B = real_BT.sum(1).double()
    best_B = rank_BT.min(1).values
    metrics: dict[str, Tensor] = {}
    for k in ks:
        hit_BT = rank_BT < k
        ideal_k = (1 / torch.log2(torch.arange(k, dtype=torch.float64) + 2)).cumsum(0).to(rank_BT.device)
        ideal_B = ideal_k[(targets_B.clamp(max=k) - 1).long()]
        metrics[f"recall@{k}"] = hit_BT.sum(1) / targets_B
        metrics[f"ndcg@{k}"] = (hit_BT / torch.log2(rank_BT + 2)).sum(1) / ideal_B
        metrics[f"hr@{k}"] = hit_BT.any(1).double()
        metrics[f"mrr@{k}"] = (best_B < k) / (best_B + 1)
    return metrics


def beam_faults(beams: Beams) -> dict[str, Tensor]:
    """Shares (B,) of beams that are no valid SID, and of valid ones that repeat an earlier beam."""
    valid_BK = beams.leaf_BK >= 0
    ordered = torch.where(valid_BK, beams.leaf_BK, -1).sort(1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum(1)
    beams_per_row = valid_BK.shape[1]
    return {
        "invalid_beams": (~valid_BK).sum(1).double() / beams_per_row,
        "duplicate_beams": repeated.double() / beams_per_row,
    }
