import math

import pytest
import torch
from reference_decoder import Outputs
from reference_loss import training_loss as reference_loss

from onetrain.model.decoder import Contrast, Predictions
from onetrain.model.loss import cross_entropies, training_loss
from onetrain.model.options import ContrastiveOptions, ModelOptions, MTPOptions


def random_case(targets, codes, seed, mtp=False, contrastive=False):
    g = torch.Generator().manual_seed(seed)

    def logits(sizes):
        return [torch.randn(targets, size, generator=g).mul_(3).requires_grad_() for size in sizes]

    contrast = None
    if contrastive:
        state_MD, item_MD = (torch.randn(targets, 4, generator=g).requires_grad_() for _ in range(2))
        contrast = Contrast(state_MD, item_MD, torch.randint(3, (targets,), generator=g), -torch.rand(targets))
    return Predictions(
        logits(codes),
        torch.stack([torch.randint(size, (targets,), generator=g) for size in codes], dim=1),
        torch.rand(targets, generator=g) + 0.1,
        [logits(codes[depth:]) for depth in range(1, len(codes))] if mtp else [],
        contrast,
    )


def cut(predictions, part):
    """The targets `part` of predictions without a contrastive side."""
    return Predictions(
        [level[part] for level in predictions.logits],
        predictions.codes_ML[part],
        predictions.weight_M[part],
        [[level[part] for level in of_module] for of_module in predictions.mtp_logits],
        None,
    )


@pytest.mark.parametrize("codes", [(5, 4, 6), (3, 7, 2, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_weighted_mean_over_levels_and_its_gradient(codes, seed):
    predictions = random_case(7, codes, seed)
    logits, codes_ML, weight_M, _, _ = predictions
    parts = training_loss(predictions, ModelOptions())
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
    assert parts.stats.keys() == {"level_loss", "level_hits"}
    assert parts.stats["level_loss"].tolist() == pytest.approx(level_loss, rel=1e-5)
    assert parts.stats["level_hits"].tolist() == pytest.approx(hits, rel=1e-5)
    assert cross_entropies(logits, codes_ML).T.flatten().tolist() == pytest.approx(entropies, rel=1e-4)
    parts.loss.backward()
    for level, logits_MV in enumerate(logits):
        one_hot = torch.nn.functional.one_hot(codes_ML[:, level], codes[level])
        expected = (logits_MV.softmax(-1) - one_hot) * weight_M[:, None] / len(codes)
        torch.testing.assert_close(logits_MV.grad, expected)
    assert not any(stat.requires_grad for stat in parts.stats.values())


@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("codes", [(5, 4, 6), (3, 7, 2, 5)])
def test_all_losses_together_equal_loops(codes, decay):
    """L_main + decay^k L_MTP_k, sums over levels over L, plus the contrastive loss times its weight."""
    options = ModelOptions(mtp=MTPOptions(True, decay), contrastive=ContrastiveOptions(0.3, 0.2))
    predictions = random_case(7, codes, 0, mtp=True, contrastive=True)
    parts = training_loss(predictions, options)
    contrast = predictions.contrast
    outputs = [
        Outputs(
            [level[m] for level in predictions.logits],
            [[level[m] for level in of_module] for of_module in predictions.mtp_logits],
            contrast.state_MD[m],
            contrast.item_MD[m],
        )
        for m in range(7)
    ]
    codes_ML, weight_M = predictions.codes_ML.tolist(), predictions.weight_M.tolist()
    expected = reference_loss(outputs, codes_ML, weight_M, contrast.item_M.tolist(), contrast.log_q_M.tolist(), options)
    torch.testing.assert_close(parts.loss, expected)
    of_modules = [level for of_module in predictions.mtp_logits for level in of_module]
    leaves = [*predictions.logits, *of_modules, contrast.state_MD, contrast.item_MD]
    for gradient, other in zip(
        torch.autograd.grad(parts.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
        assert gradient.any()
    means = []  # of a module: over the levels that it predicts
    for depth, of_module in enumerate(predictions.mtp_logits, 1):
        entropies = cross_entropies(of_module, predictions.codes_ML[:, depth:])
        means.append(float((entropies.mean(0) * predictions.weight_M).sum().detach()))
    assert parts.stats["mtp_loss"].tolist() == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("mtp", [False, True])
def test_parts_of_uneven_batches_add_up(mtp):
    """One of them is empty."""
    predictions, options = random_case(9, (5, 4, 6), 0, mtp), ModelOptions(mtp=MTPOptions(mtp))
    whole = training_loss(predictions, options)
    cuts = [slice(0, 1), slice(1, 1), slice(1, 7), slice(7, 9)]
    pieces = [training_loss(cut(predictions, part), options) for part in cuts]
    torch.testing.assert_close(sum(piece.loss for piece in pieces), whole.loss)
    torch.testing.assert_close(sum(piece.weight for piece in pieces), whole.weight)
    for name, total in whole.stats.items():
        torch.testing.assert_close(sum(piece.stats[name] for piece in pieces), total)


def test_losses_of_half_precision_logits_are_in_fp32():
    predictions = random_case(7, (5, 4, 6), 0, mtp=True, contrastive=True)
    half = predictions._replace(
        logits=[level.bfloat16() for level in predictions.logits],
        mtp_logits=[[level.bfloat16() for level in of_module] for of_module in predictions.mtp_logits],
    )
    options = ModelOptions(mtp=MTPOptions(True), contrastive=ContrastiveOptions(1.0))
    parts = training_loss(half, options)
    assert parts.loss.dtype == torch.float32
    wide = half._replace(
        logits=[level.float() for level in half.logits],
        mtp_logits=[[level.float() for level in of_module] for of_module in half.mtp_logits],
    )
    torch.testing.assert_close(parts.loss, training_loss(wide, options).loss, rtol=1e-6, atol=1e-6)
