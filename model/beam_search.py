"""Constrained beam search over the trie of valid semantic IDs.

Legend: B users, K beams, L SID levels, V codes per level, C most children of a beam's prefix.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from onetrain.model.decoder import SidDecoder
from onetrain.model.inputs import Context
from onetrain.model.trie import SidTrie


class Beams(NamedTuple):
    """The best SIDs of each user, best first. A beam whose score is -inf is no SID: fewer valid ones than K existed."""

    codes_BKL: Tensor
    score_BK: Tensor  # log p(SID | context), over the whole vocabulary
    leaf_BK: Tensor  # trie leaf; -1 where the score is -inf


@torch.no_grad()
def beam_search(
    model: SidDecoder,
    context: Context,
    trie: SidTrie,
    beam_size: int,
    request: Mapping[str, Tensor] | None = None,
    state: Any | None = None,
) -> Beams:
    """The `beam_size` most probable valid SIDs of each context row; exact if no level has more prefixes than beams.

    The context is processed once and shared by all beams; keys of earlier tokens are cached. With MTP the main stack
    runs once, and p is the product of what main stack and modules predict. `request` holds ids (B,) of the moment's
    features. `state` is what the model starts from when the context has been processed already.
    """
    if state is None:
        state = model.start(context, request or {})
    rows, device = len(context.length_B), context.length_B.device
    code_BK: Tensor | None = None
    codes_BKL = torch.zeros(rows, 1, 0, dtype=torch.int64, device=device)
    score_BK = torch.zeros(rows, 1, device=device)
    node_BK = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    for level in range(len(trie.sizes)):
        beams = score_BK.shape[1]
        logits_MV, state = model.step(state, level, code_BK)
        next_MC, child_MC, real_MC = trie.next_codes(level, node_BK.flatten())
        # only children's scores are wanted, but over the whole vocabulary
        log_p_MC = logits_MV.float().gather(1, next_MC) - logits_MV.float().logsumexp(-1, keepdim=True)
        total_MC = (score_BK.flatten()[:, None] + log_p_MC).masked_fill(~real_MC, -torch.inf)
        children = next_MC.shape[1]
        short = max(0, beam_size - beams * children) if level + 1 == len(trie.sizes) else 0
        score_BK, choice_BK = total_MC.view(rows, -1).topk(min(beam_size, beams * children), dim=1)
        parent_BK = choice_BK // children
        code_BK = next_MC.view(rows, -1).gather(1, choice_BK)
        node_BK = child_MC.view(rows, -1).gather(1, choice_BK)
        earlier_BKL = codes_BKL.gather(1, parent_BK[..., None].expand(-1, -1, level))
        codes_BKL = torch.cat((earlier_BKL, code_BK[..., None]), dim=-1)
        if level + 1 < len(trie.sizes):
            first_B1 = beams * torch.arange(rows, device=device)[:, None]
            state = model.select(state, (parent_BK + first_B1).flatten())
    score_BK = F.pad(score_BK, (0, short), value=-torch.inf)
    codes_BKL, node_BK = F.pad(codes_BKL, (0, 0, 0, short)), F.pad(node_BK, (0, short))
    return Beams(codes_BKL, score_BK, node_BK.masked_fill(score_BK == -torch.inf, -1))
