"""Constrained beam search over the trie of valid semantic IDs.

Legend: B users, K beams, L SID levels, V codes per level, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from onetrain.model.attention import KeyValue
from onetrain.model.inputs import Context
from onetrain.model.lazy_decoder import LazyDecoder, TargetLayout
from onetrain.model.trie import SidTrie


class Beams(NamedTuple):
    """The best SIDs of each user, best first. A beam whose score is -inf is no SID: fewer valid ones than K existed."""

    codes_BKL: Tensor
    score_BK: Tensor  # log p(SID | context), over the whole vocabulary
    leaf_BK: Tensor  # trie leaf; -1 where the score is -inf


@torch.no_grad()
def beam_search(model: LazyDecoder, context: Context, trie: SidTrie, beam_size: int) -> Beams:
    """The `beam_size` most probable valid SIDs of each context row; exact if no level has more prefixes than beams.

    The context is processed once and shared by all beams; self-attention keys of earlier levels are cached.
    """
    rows, device = context.length_B.shape[0], context.length_B.device
    kv_sets = model.context(context)
    visible_B1P = model.visible(context, context.length_B[:, None])
    codes_BKS = torch.zeros(rows, 1, 0, dtype=torch.int64, device=device)
    score_BK = torch.zeros(rows, 1, device=device)
    node_BK = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    token_MSD = model.embed_prefix(codes_BKS.flatten(0, 1))
    caches: list[KeyValue] | None = None
    for level, size in enumerate(trie.sizes):
        beams = score_BK.shape[1]
        mask_BKP = visible_B1P.expand(-1, beams, -1)
        h_MSD, caches = model.run_blocks(token_MSD, kv_sets, mask_BKP, TargetLayout(rows, beams, None), caches)
        log_p = model.logits(h_MSD[:, -1], level).float().log_softmax(-1).view(rows, beams, size)
        valid, child = trie.next_codes(level, node_BK.flatten())
        total = (score_BK[..., None] + log_p).masked_fill(~valid.view_as(log_p), -torch.inf).flatten(1)
        score_BK, choice_BK = total.topk(min(beam_size, total.shape[1]), dim=1)
        parent_BK, code_BK = choice_BK // size, choice_BK % size
        node_BK = child.view(rows, -1).gather(1, choice_BK)
        codes_BKS = torch.cat(
            (codes_BKS.gather(1, parent_BK[..., None].expand(-1, -1, level)), code_BK[..., None]), dim=-1
        )
        if level + 1 < len(trie.sizes):
            source_M = (parent_BK + beams * torch.arange(rows, device=device)[:, None]).flatten()
            caches = [KeyValue(*(part.index_select(0, source_M) for part in cache)) for cache in caches]
            token_MSD = model.code_embeddings[level](code_BK.flatten())[:, None]
    return Beams(codes_BKS, score_BK, node_BK.masked_fill(score_BK == -torch.inf, -1))
