"""The in-batch contrastive loss and its item tower (OneMall, sections 3.1 and 4) against loops."""

import math

import pytest
import torch
from decoder_cases import check_variant, random_context, random_model, random_targets, variant
from reference_loss import contrastive_losses

from onetrain.model.decoder import Contrast
from onetrain.model.loss import contrastive_loss, training_loss
from onetrain.model.options import ContrastiveOptions


def random_contrast(targets=7, items=4, seed=0):
    """Few items, so that many targets share one."""
    g = torch.Generator().manual_seed(seed)
    return Contrast(
        torch.randn(targets, 5, generator=g, dtype=torch.float64).requires_grad_(),
        torch.randn(targets, 5, generator=g, dtype=torch.float64).requires_grad_(),
        torch.randint(items, (targets,), generator=g),
        -6 * torch.rand(targets, generator=g),
    )


@pytest.mark.parametrize("name", ["contrastive_shared_kv", "mtp_contrastive_experts"])
def test_towers_loss_and_gradients_equal_loops(name):
    check_variant(name)


def test_every_code_has_a_table_where_the_state_after_the_last_one_is_read():
    """Without the contrastive loss nothing reads the last code."""
    options, vocab = variant("contrastive_shared_kv")
    assert len(random_model(options, vocab).tokens.code_embeddings) == 3
    assert len(random_model(*variant("onerec_v2")).tokens.code_embeddings) == 2
    check_variant("contrastive_shared_kv", codes=(3, 2, 4, 5), rows=2, slots=1)


@pytest.mark.parametrize("logq", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 1.5])
@pytest.mark.parametrize("items", [1, 3, 50])
def test_loss_and_gradients_equal_loops(logq, temperature, items):
    """All targets of one item: no negatives, no loss. All different: plain InfoNCE."""
    contrast = random_contrast(items=items)
    options = ContrastiveOptions(1.0, temperature, logq)
    loss_M, hit_M = contrastive_loss(contrast, options)
    expected = contrastive_losses(*contrast, options)
    torch.testing.assert_close(loss_M, torch.stack(expected), rtol=1e-9, atol=1e-12)
    cotangent = torch.randn(7, dtype=torch.float64)
    found = torch.autograd.grad((loss_M * cotangent).sum(), contrast[:2])
    wanted = torch.autograd.grad((torch.stack(expected) * cotangent).sum(), contrast[:2])
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-10)
        assert bool(gradient.abs().max() > 1e-9) == (items > 1)
    assert hit_M.dtype == torch.bool
    assert bool(hit_M.all()) == (items == 1)


def test_own_item_on_top():
    """Cosine decides, not length; a duplicate ahead of the own item is no miss."""
    state_MD = torch.eye(3)[[0, 1, 2, 0]]
    item_MD = torch.tensor([[1.0, 0.0, 0.0], [9.0, 1.0, 0.0], [0.0, 0.0, 0.1], [2.0, 0.1, 0.0]])
    contrast = Contrast(state_MD, item_MD, torch.tensor([4, 5, 6, 4]), torch.zeros(4))
    _, hit_M = contrastive_loss(contrast, ContrastiveOptions(1.0))
    # target 0 by cosine (by length target 1's item would win), target 3 because target 0's item is the same item
    assert hit_M.tolist() == [True, True, True, True]
    swapped = contrast._replace(item_MD=item_MD[[1, 0, 2, 3]])  # now target 1's item is nearest to targets 0 and 3
    assert contrastive_loss(swapped, ContrastiveOptions(1.0))[1].tolist() == [False, False, True, False]


def test_logq_corrects_for_frequent_items():
    """In expectation over batches drawn by q, exp(score) / q sums to the sum over the whole catalogue: a frequent
    negative weighs less, a rare one more."""
    contrast = random_contrast(items=50)
    options, uncorrected = ContrastiveOptions(1.0, 0.5), ContrastiveOptions(1.0, 0.5, logq=False)

    def first_loss(log_q_M):
        with torch.no_grad():
            return float(contrastive_loss(contrast._replace(log_q_M=log_q_M), options)[0][0])

    even = torch.full((7,), math.log(0.01))
    frequent, rare = even.clone(), even.clone()
    frequent[3], rare[3] = math.log(0.5), math.log(0.0001)
    assert first_loss(frequent) < first_loss(even) < first_loss(rare)
    plain_M, _ = contrastive_loss(contrast, uncorrected)
    assert first_loss(even) == pytest.approx(float(plain_M[0].detach()))
    # q cancels where every item of a catalogue is in the batch as often as it is drawn: 0.6 * 10 times, 0.4 * 10 times
    g = torch.Generator().manual_seed(0)
    state, items = torch.randn(1, 5, generator=g), torch.randn(2, 5, generator=g)
    batch = torch.tensor([0] * 6 + [1] * 4)
    drawn = Contrast(
        state.expand(10, -1), items[batch], torch.arange(10), torch.tensor([0.6, 0.4]).log()[batch]
    )  # ten different ids, so that none is left out
    loss = contrastive_loss(drawn, options)[0]
    cosine = torch.nn.functional.cosine_similarity(state, items) / 0.5
    over_catalogue = cosine.logsumexp(0) - cosine
    expected = over_catalogue[batch] + drawn.log_q_M + math.log(10)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_loss_of_a_target_is_weighted_and_added_with_the_options_weight():
    options, vocab = variant("contrastive_shared_kv")
    model = random_model(options, vocab)
    with torch.no_grad():
        predictions = model(random_context(vocab, 3), random_targets(vocab, 3, 3))
    parts = training_loss(predictions, options)
    plain = training_loss(predictions._replace(contrast=None), options)
    loss_M, hit_M = contrastive_loss(predictions.contrast, options.contrastive)
    weighted = sum(float(w) * float(x) for w, x in zip(predictions.weight_M, loss_M, strict=True))
    assert float(parts.loss - plain.loss) == pytest.approx(0.5 * weighted)
    assert float(parts.stats["contrastive_loss"]) == pytest.approx(weighted)
    hits = sum(float(w) for w, hit in zip(predictions.weight_M, hit_M, strict=True) if hit)
    assert float(parts.stats["contrastive_hits"]) == pytest.approx(hits)


def test_padding_slots_are_no_negatives():
    """Slots of weight 0 have no row on either side."""
    options, vocab = variant("contrastive_shared_kv")
    targets = random_targets(vocab, 3, 3, seed=1)
    predictions = random_model(options, vocab)(random_context(vocab, 3), targets)
    real = int((targets.weight_BT > 0).sum())
    assert real < 9
    assert predictions.contrast.item_M.tolist() == targets.item["item"][targets.weight_BT > 0].tolist()
    assert predictions.contrast.log_q_M.tolist() == targets.log_q_BT[targets.weight_BT > 0].tolist()
    assert len(predictions.contrast.state_MD) == len(predictions.contrast.item_MD) == real
