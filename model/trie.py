"""The trie of valid semantic IDs, as flat tensors that beam search can gather from.

Legend: I items, L levels, V codes per level, R rows (any batch of nodes), C children, U distinct SIDs (leaves).
"""

import torch
from torch import Tensor, nn


class SidTrie(nn.Module):
    """Compressed-sparse-row children of every prefix, level by level.

    Node ids of level l count the distinct prefixes of length l in lexicographic order; level 0 has one node, the root;
    the nodes of level L are the leaves. A leaf holds its items in the stated order for items that share a SID: higher
    `priority` (training count) first, then lower item index.

    Args: codes_IL int64 codes of every item; sizes codes per level; priority_I the order inside a shared SID.
    Raises: ValueError if a code is outside its level.
    """

    leaf_I: Tensor  # leaf of each item
    rank_in_leaf_I: Tensor  # place among the items that share its SID
    leaf_size_U: Tensor
    leaf_first_U: Tensor
    items_by_leaf_I: Tensor

    def __init__(self, codes_IL: Tensor, sizes: tuple[int, ...], priority_I: Tensor | None = None) -> None:
        super().__init__()
        items, levels = codes_IL.shape
        if levels != len(sizes):
            raise ValueError(f"the SIDs have {levels} levels, the trie was asked for {len(sizes)}")
        if bool((codes_IL < 0).any()) or bool((codes_IL >= torch.tensor(sizes)).any()):
            raise ValueError(f"a SID code lies outside its level's range; codes per level are {list(sizes)}")
        self.sizes = sizes
        node_I = torch.zeros(items, dtype=torch.int64)
        for level, size in enumerate(sizes):
            edges, next_node_I = torch.unique(node_I * size + codes_IL[:, level], return_inverse=True)
            parents = edges // size
            nodes = int(node_I.max()) + 1
            counts = torch.bincount(parents, minlength=nodes)
            self.register_buffer(f"start_{level}", _row_starts(counts), persistent=False)
            self.register_buffer(f"codes_{level}", edges % size, persistent=False)
            node_I = next_node_I
        self.n_leaves = int(node_I.max()) + 1
        priority_I = torch.zeros(items) if priority_I is None else priority_I
        by_priority = torch.argsort(priority_I, descending=True, stable=True)
        order = by_priority[torch.argsort(node_I[by_priority], stable=True)]
        group_U = torch.bincount(node_I, minlength=self.n_leaves)
        first_U = _row_starts(group_U)[:-1]
        rank_I = torch.empty(items, dtype=torch.int64)
        rank_I[order] = torch.arange(items) - first_U[node_I[order]]
        self.register_buffer("leaf_I", node_I, persistent=False)
        self.register_buffer("rank_in_leaf_I", rank_I, persistent=False)
        self.register_buffer("leaf_size_U", group_U, persistent=False)
        self.register_buffer("leaf_first_U", first_U, persistent=False)
        self.register_buffer("items_by_leaf_I", order, persistent=False)

    def next_codes(self, level: int, node_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Valid next codes of prefixes, padded to C, the most that one of them has.

        Returns codes (R, C), child node ids (R, C), and which entries are real (R, C), bool; the others are 0.
        """
        start: Tensor = getattr(self, f"start_{level}")
        codes: Tensor = getattr(self, f"codes_{level}")
        first_R, count_R = start[node_R], start[node_R + 1] - start[node_R]
        within_C = torch.arange(int(count_R.max()), device=node_R.device)
        real_RC = within_C < count_R[:, None]
        edge_RC = torch.where(real_RC, first_R[:, None] + within_C, 0)
        return torch.where(real_RC, codes[edge_RC], 0), edge_RC, real_RC


def _row_starts(counts: Tensor) -> Tensor:
    """[0, c0, c0 + c1, ...]: row starts of a compressed-sparse-row table."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))
