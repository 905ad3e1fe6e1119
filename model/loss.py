"""Losses: next-token (OneRec-V2, section 3), multi-token (OneLive, section 4), contrastive (OneMall, section 4).

Legend: M targets, C of them in one piece, L SID levels, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onetrain.model.decoder import Contrast, Predictions
from onetrain.model.options import ContrastiveOptions, ModelOptions
from onetrain.model.precision import wide


class LossParts(NamedTuple):
    """Weighted sums, so that ranks and micro batches of any size add up exactly."""

    loss: Tensor  # what training minimises once it is divided by the global weight
    weight: Tensor  # sum of weights
    stats: dict[str, Tensor]  # detached weighted sums


def cross_entropies(predictions: Predictions, module: int = 0, pieces: int | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropies and hits of every target at the levels of MTP module `module`, (L - module, M) each; 0 is the
    main stack, whose mean over levels is L_Gen.

    With `pieces` the targets are cut into so many parts, and only one part of one level has logits at any time: they
    are thrown away, and made again in the backward pass.
    """
    states = predictions.mtp_states[module - 1] if module else predictions.states
    of_levels = [_level(predictions, h_MD, level, pieces) for level, h_MD in enumerate(states, module)]
    losses, hits = zip(*of_levels, strict=True)
    return torch.stack(losses), torch.stack(hits)


def training_loss(
    predictions: Predictions, options: ModelOptions, chunk: int | None = None, most_targets: int = 0
) -> LossParts:
    """Of each target the mean over levels of the next-token loss, plus w_k times that of every MTP module, plus the
    contrastive loss times its weight, plus the routers' auxiliary losses; times the target's weight and summed.

    The papers' MTP loss sums over the levels that a module predicts; here both it and the main loss are divided by L
    (OneRec-V2's mean), which leaves their ratio as published. With M = 0 the loss is 0, still differentiable.

    Args: `chunk`: targets whose logits exist at once, None for all; `most_targets`: where ranks gather a head before
    each use (ZeRO-3), the most targets of any rank, so that all of them use it equally often.
    """
    codes_ML, contrast, routing = predictions.codes_ML, predictions.contrast, predictions.routing
    levels = codes_ML.shape[1]
    pieces = None if chunk is None else max(-(-max(len(codes_ML), most_targets) // chunk), 1)
    entropy_LM, hit_LM = cross_entropies(predictions, pieces=pieces)
    weight_M = predictions.weight_M.to(entropy_LM.dtype)
    level_loss_L = entropy_LM @ weight_M
    loss = level_loss_L.sum() / levels
    stats = {"level_loss": level_loss_L.detach(), "level_hits": (hit_LM * weight_M).sum(1)}
    if predictions.mtp_states:
        modules = [
            (cross_entropies(predictions, depth, pieces)[0] @ weight_M).sum() / (levels - depth)
            for depth in range(1, len(predictions.mtp_states) + 1)
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
    state_MD, item_MD = (F.normalize(wide(x_MD), dim=-1) for x_MD in (contrast.state_MD, contrast.item_MD))
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


def _level(predictions: Predictions, h_MD: Tensor, level: int, pieces: int | None) -> tuple[Tensor, Tensor]:
    tokens, codes_M, request = predictions.tokens, predictions.codes_ML[:, level], predictions.request
    if pieces is None:
        return tokens.losses(h_MD, codes_M, level, request)
    cut = {name: ids_M.tensor_split(pieces) for name, ids_M in request.items()}
    parts = [
        checkpoint(
            tokens.losses,
            h_CD,
            codes_C,
            level,
            {name: ids[index] for name, ids in cut.items()},
            use_reentrant=False,
            preserve_rng_state=False,  # heads have no dropout
        )
        for index, (h_CD, codes_C) in enumerate(
            zip(h_MD.tensor_split(pieces), codes_M.tensor_split(pieces), strict=True)
        )
    ]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)
