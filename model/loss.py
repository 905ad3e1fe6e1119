"""Losses: next-token (OneRec-V2, section 3), multi-token (OneLive, section 4), contrastive (OneMall, section 4).

Legend: M targets, L SID levels, V codes per level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from onetrain.model.decoder import Contrast, Predictions
from onetrain.model.options import ContrastiveOptions, ModelOptions


class LossParts(NamedTuple):
    """Weighted sums, so that ranks and micro batches of any size add up exactly."""

    loss: Tensor  # what training minimises once it is divided by the global weight
    weight: Tensor  # sum of weights
    stats: dict[str, Tensor]  # detached weighted sums


def cross_entropies(logits: Sequence[Tensor], codes_ML: Tensor) -> Tensor:
    """Cross-entropy (L, M) of every target at each level, in fp32 at least; the mean over levels is L_Gen."""
    return torch.stack(
        [
            F.cross_entropy(_wide(logits_MV), codes_ML[:, level], reduction="none")
            for level, logits_MV in enumerate(logits)
        ]
    )


def training_loss(predictions: Predictions, options: ModelOptions) -> LossParts:
    """Of each target the mean over levels of the next-token loss, plus w_k times that of every MTP module, plus the
    contrastive loss times its weight, plus the routers' auxiliary losses; times the target's weight and summed.

    The papers' MTP loss sums over the levels that a module predicts; here both it and the main loss are divided by L
    (OneRec-V2's mean), which leaves their ratio as published. With M = 0 the loss is 0, still differentiable.
    """
    logits, codes_ML, weight_M, mtp_logits, contrast, routing = predictions
    levels = codes_ML.shape[1]
    entropy_LM = cross_entropies(logits, codes_ML)
    weight_M = weight_M.to(entropy_LM.dtype)
    level_loss_L = entropy_LM @ weight_M
    hits = [((logits_MV.argmax(-1) == codes_ML[:, level]) * weight_M).sum() for level, logits_MV in enumerate(logits)]
    loss = level_loss_L.sum() / levels
    stats = {"level_loss": level_loss_L.detach(), "level_hits": torch.stack(hits).detach()}
    if mtp_logits:
        modules = [
            (cross_entropies(of_module, codes_ML[:, depth:]) @ weight_M).sum() / (levels - depth)
            for depth, of_module in enumerate(mtp_logits, 1)
        ]
        for depth, module_loss in enumerate(modules, 1):
            loss = loss + options.mtp.decay**depth * module_loss * (levels - depth) / levels
        stats["mtp_loss"] = torch.stack(modules).detach()
    if contrast is not None:
        contrastive_M, hit_M = contrastive_loss(contrast, options.contrastive)
        loss = loss + options.contrastive.weight * (contrastive_M @ weight_M)
        stats["contrastive_loss"] = (contrastive_M @ weight_M).detach()
        stats["contrastive_hits"] = (hit_M * weight_M).sum()
    if routing is not None:
        stats["expert_load"], stats["router_entropy"] = routing.load_ZSE, routing.entropy_Z
        if routing.loss_R is not None:
            router_loss = routing.loss_R.to(weight_M.dtype) @ weight_M
            loss = loss + router_loss
            stats["router_loss"] = router_loss.detach()
    return LossParts(loss, weight_M.sum(), stats)


def contrastive_loss(contrast: Contrast, options: ContrastiveOptions) -> tuple[Tensor, Tensor]:
    """InfoNCE of every target against the items of the batch: losses (M,), and whether its own item is on top (M,).

    Score = cosine / temperature, minus log q of the item (sampled-softmax correction: frequent items are drawn as
    negatives more often). Another target with the same item is no negative and is left out. Negatives are the targets
    of one micro batch on one rank.
    """
    state_MD, item_MD = (F.normalize(_wide(x_MD), dim=-1) for x_MD in (contrast.state_MD, contrast.item_MD))
    score_MM = state_MD @ item_MD.T / options.temperature
    if options.logq:
        score_MM = score_MM - contrast.log_q_M
    targets = len(contrast.item_M)
    own_MM = torch.eye(targets, dtype=torch.bool, device=score_MM.device)
    duplicate_MM = (contrast.item_M[:, None] == contrast.item_M) & ~own_MM
    score_MM = score_MM.masked_fill(duplicate_MM, -torch.inf)
    own_M = torch.arange(targets, device=score_MM.device)
    loss_M = F.cross_entropy(score_MM, own_M, reduction="none") if targets else score_MM.sum(1)
    return loss_M, (score_MM.argmax(1) == own_M).detach() if targets else own_M.bool()


def _wide(x: Tensor) -> Tensor:
    """fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()
