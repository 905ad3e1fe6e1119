"""The training loss as loops over targets, levels and negatives."""

import torch


def minus_log_p(scores, chosen):
    """-log softmax(scores)[chosen] of a list of scalars."""
    largest = max(float(score.detach()) for score in scores)
    return torch.log(sum(torch.exp(score - largest) for score in scores)) + largest - scores[chosen]


def next_token_losses(logits, codes):
    """-log p of every code of one target."""
    return [minus_log_p(list(scores), code) for scores, code in zip(logits, codes, strict=True)]


def cosine(x, y):
    return (x * y).sum() / torch.sqrt((x * x).sum() * (y * y).sum())


def contrastive_losses(states, items, item_ids, log_q, options):
    """InfoNCE of every target; targets with the same item are no negatives of each other."""
    losses = []
    for own, state in enumerate(states):
        scores, chosen = [], None
        for other, item in enumerate(items):
            if other != own and item_ids[other] == item_ids[own]:
                continue
            if other == own:
                chosen = len(scores)
            correction = log_q[other] if options.logq else 0.0
            scores.append(cosine(state, item) / options.temperature - correction)
        losses.append(minus_log_p(scores, chosen))
    return losses


def training_loss(outputs, codes, weights, item_ids, log_q, options):
    """Of some targets: sum of weight * (L_main + sum of decay^k L_MTP_k + w L_con + router losses); the sums over
    levels over L.
    """
    levels, total = len(codes[0]), 0.0
    for target, output in enumerate(outputs):
        loss = sum(next_token_losses(output.logits, codes[target]))
        for depth, logits in enumerate(output.mtp_logits, 1):
            loss = loss + options.mtp.decay**depth * sum(next_token_losses(logits, codes[target][depth:]))
        total = total + weights[target] * (loss / levels + output.router_loss)
    if options.contrastive.weight:
        states, items = [output.state for output in outputs], [output.item for output in outputs]
        losses = contrastive_losses(states, items, item_ids, log_q, options.contrastive)
        total = total + options.contrastive.weight * sum(w * x for w, x in zip(weights, losses, strict=True))
    return total
