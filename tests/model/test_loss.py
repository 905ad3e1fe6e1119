import math

import pytest
import torch

from onetrain.model.loss import cross_entropies, next_token_loss


def random_case(targets, codes, seed):
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(targets, size, generator=g).mul_(3).requires_grad_() for size in codes]
    codes_ML = torch.stack([torch.randint(size, (targets,), generator=g) for size in codes], dim=1)
    return logits, codes_ML, torch.rand(targets, generator=g) + 0.1


@pytest.mark.parametrize("codes", [(5, 4, 6), (3, 7, 2, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_weighted_mean_over_levels_and_its_gradient(codes, seed):
    logits, codes_ML, weight_M = random_case(7, codes, seed)
    parts = next_token_loss(logits, codes_ML, weight_M)
    level_loss, hits, entropies = [0.0] * len(codes), [0.0] * len(codes), []
    for m in range(7):
        for level in range(len(codes)):
            scores = logits[level][m].tolist()
            code, weight = int(codes_ML[m, level]), float(weight_M[m])
            entropy = math.log(sum(math.exp(score) for score in scores)) - scores[code]
            entropies.append(entropy)
            level_loss[level] += weight * entropy
            hits[level] += weight * (max(scores) == scores[code])
    assert float(parts.loss.detach()) == pytest.approx(sum(level_loss) / len(codes), rel=1e-5)
    assert float(parts.weight) == pytest.approx(float(weight_M.double().sum()), rel=1e-6)
    assert parts.level_loss_L.tolist() == pytest.approx(level_loss, rel=1e-5)
    assert parts.level_hits_L.tolist() == pytest.approx(hits, rel=1e-5)
    assert torch.stack(cross_entropies(logits, codes_ML), dim=1).flatten().tolist() == pytest.approx(
        entropies, rel=1e-4
    )
    parts.loss.backward()
    for level, logits_MV in enumerate(logits):
        one_hot = torch.nn.functional.one_hot(codes_ML[:, level], codes[level])
        expected = (logits_MV.softmax(-1) - one_hot) * weight_M[:, None] / len(codes)
        torch.testing.assert_close(logits_MV.grad, expected)
    assert not parts.level_loss_L.requires_grad
    assert not parts.level_hits_L.requires_grad


def test_parts_of_uneven_batches_add_up():
    logits, codes_ML, weight_M = random_case(9, (5, 4, 6), 0)
    whole = next_token_loss(logits, codes_ML, weight_M)
    cuts = [slice(0, 1), slice(1, 1), slice(1, 7), slice(7, 9)]
    pieces = [next_token_loss([level[cut] for level in logits], codes_ML[cut], weight_M[cut]) for cut in cuts]
    for name, total in whole._asdict().items():
        torch.testing.assert_close(sum(getattr(piece, name) for piece in pieces), total)
