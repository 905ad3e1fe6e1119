"""Next-token loss: the mean over SID levels of the cross-entropy (OneRec-V2, section 3).

Legend: M targets, L SID levels, V codes per level.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LossParts(NamedTuple):
    """Weighted sums, so that ranks and micro batches of any size add up exactly."""

    loss: Tensor  # sum over targets of weight * mean over levels
    weight: Tensor  # sum of weights
    level_loss_L: Tensor  # per level: weighted sum of cross-entropies, detached
    level_hits_L: Tensor  # per level: weighted count of teacher-forced argmax hits, detached


def cross_entropies(logits: list[Tensor], codes_ML: Tensor) -> list[Tensor]:
    """Cross-entropy (M,) of every target at each level, in fp32; their mean over levels is L_Gen."""
    return [
        F.cross_entropy(logits_MV.float(), codes_ML[:, level], reduction="none")
        for level, logits_MV in enumerate(logits)
    ]


def next_token_loss(logits: list[Tensor], codes_ML: Tensor, weight_M: Tensor) -> LossParts:
    """L_Gen of each target times its weight, summed; divide by the global weight for the training loss.

    Args: logits per level (M, V_l); codes (M, L) int64; weights (M,). With M = 0 the loss is 0, still differentiable.
    """
    level_loss_L = torch.stack([(entropy_M * weight_M).sum() for entropy_M in cross_entropies(logits, codes_ML)])
    hits = [((logits_MV.argmax(-1) == codes_ML[:, level]) * weight_M).sum() for level, logits_MV in enumerate(logits)]
    return LossParts(level_loss_L.mean(), weight_M.sum(), level_loss_L.detach(), torch.stack(hits).detach())
