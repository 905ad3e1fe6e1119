import math

import pytest
import torch
from decoder_cases import random_context, random_model, random_targets, variant
from reference_decoder import Outputs
from reference_loss import training_loss as reference_loss

from onetrain.model.decoder import Contrast, Criterion, Predictions
from onetrain.model.loss import cross_entropies, training_loss
from onetrain.model.options import ContrastiveOptions, ModelOptions, MTPOptions


class LogitsAsStates(torch.nn.Module):
    """Heads that return the states: a test makes the logits itself."""

    def __init__(self):
        super().__init__()
        self.criterion = Criterion()

    def logits(self, h_MD, level, request):
        return h_MD

    def losses(self, h_MD, codes_M, level, request):
        return self.criterion(h_MD, codes_M)


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
        None,
        LogitsAsStates(),
        {},
    )


def cut(predictions, part):
    """The targets `part` of predictions without a contrastive side."""
    return predictions._replace(
        states=[level[part] for level in predictions.states],
        codes_ML=predictions.codes_ML[part],
        weight_M=predictions.weight_M[part],
        mtp_states=[[level[part] for level in of_module] for of_module in predictions.mtp_states],
        contrast=None,
    )


@pytest.mark.parametrize("codes", [(5, 4, 6), (3, 7, 2, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_weighted_mean_over_levels_and_its_gradient(codes, seed):
    predictions = random_case(7, codes, seed)
    logits, codes_ML, weight_M = predictions.logits, predictions.codes_ML, predictions.weight_M
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
    assert cross_entropies(predictions)[0].T.flatten().tolist() == pytest.approx(entropies, rel=1e-4)
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
        pairs = zip(of_module, predictions.codes_ML.T[depth:], strict=True)
        entropies = torch.stack([torch.nn.functional.cross_entropy(*pair, reduction="none") for pair in pairs])
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
        states=[level.bfloat16() for level in predictions.states],
        mtp_states=[[level.bfloat16() for level in of_module] for of_module in predictions.mtp_states],
    )
    options = ModelOptions(mtp=MTPOptions(True), contrastive=ContrastiveOptions(1.0))
    parts = training_loss(half, options)
    assert parts.loss.dtype == torch.float32
    wide = half._replace(
        states=[level.float() for level in half.states],
        mtp_states=[[level.float() for level in of_module] for of_module in half.mtp_states],
    )
    torch.testing.assert_close(parts.loss, training_loss(wide, options).loss, rtol=1e-6, atol=1e-6)


CHUNKED = ["onerec_v2_experts", "mtp_contrastive_experts", "onelive", "onemall"]


def loss_and_gradients(model, context, targets, **chunks):
    model.zero_grad()
    parts = training_loss(model(context, targets), model.options, **chunks)
    parts.loss.backward()
    return parts, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize(("chunk", "most_targets"), [(1, 0), (3, 0), (4, 30), (100, 0)])
def test_chunks_change_neither_loss_nor_gradients(name, chunk, most_targets):
    """Of one target, uneven ones, more of them than this rank has targets, and one of all."""
    options, vocab = variant(name)
    model = random_model(options, vocab)
    inputs = random_context(vocab, 4), random_targets(vocab, 4, 3)
    whole, gradients = loss_and_gradients(model, *inputs)
    parts, chunked = loss_and_gradients(model, *inputs, chunk=chunk, most_targets=most_targets)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=0)
    assert parts.stats.keys() == whole.stats.keys()
    for key, stat in whole.stats.items():
        torch.testing.assert_close(parts.stats[key], stat, rtol=1e-12, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(chunked[key], gradient, rtol=1e-10, atol=1e-13)
    assert gradients["tokens.heads.2.weight"].any()


def test_no_more_targets_than_a_chunk_have_logits_at_once():
    """Both while the loss is computed and while its gradient is."""
    options, vocab = variant("onelive")
    model = random_model(options, vocab)
    rows = []
    model.tokens.criterion.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    predictions = model(random_context(vocab, 4), random_targets(vocab, 4, 3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss = training_loss(predictions, options, chunk=3).loss
    targets = len(predictions.codes_ML)
    assert max(rows) <= 3
    assert sum(rows) == 6 * targets  # three levels, and the modules' two and one
    assert not [shape for shape in kept if shape and shape[-1] in vocab.codes and len(shape) == 2]
    loss.backward()
    assert max(rows) <= 3
    assert sum(rows) == 2 * 6 * targets


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_batch_without_targets_costs_nothing_but_has_a_gradient(chunk):
    predictions = random_case(0, (5, 4, 6), 0, mtp=True)
    parts = training_loss(predictions, ModelOptions(mtp=MTPOptions(True)), chunk)
    parts.loss.backward()
    assert parts.loss == 0
    assert all(logits_MV.grad is not None for logits_MV in predictions.states)
