"""The FLOP counter against torch's, which sees the matrix products of the math kernel but not of a fused CPU one."""

import pytest
import torch
from decoder_cases import random_context, random_model, random_targets, vocabulary
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from onetrain.model.flops import forward_flops
from onetrain.model.inputs import Targets
from onetrain.model.options import ModelOptions

CASES = [
    ({}, (16, 8, 32)),
    ({"s_kv": 2, "l_kv": 3, "g_kv": 2, "d_ff": 40}, (16, 8, 32, 4)),
    ({"features": ("sid", "item", "behaviour", "scenario", "gap"), "l_kv": 2, "position": "none"}, (16, 8, 32)),
    ({"features": ("gap", "item"), "g_kv": 1, "embed_dim": 7}, (64,)),
]


@pytest.mark.parametrize(("variant", "codes"), CASES)
def test_equals_the_operations_that_torch_counts(variant, codes):
    rows, slots, events = 3, 2, 12
    options = ModelOptions(**{"d_model": 32, "n_layers": 3, "n_heads": 4, "embed_dim": 8, **variant})
    vocab = vocabulary(codes, max_context=events)
    model = random_model(options, vocab)
    context = random_context(vocab, rows, events)
    context.length_B[:] = events  # padding is computed but is no model FLOP
    end_BT = torch.full((rows, slots), events)
    targets = Targets(random_targets(vocab, context, slots).sid_BTL, end_BT, torch.ones(rows, slots))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits, _, _ = model(context, targets)
        with FlopCounterMode(display=False) as backward:
            sum(level.sum() for level in logits).backward()
    flops = forward_flops(options, vocab)
    n_targets = rows * slots
    counts = {"targets": n_targets, "target_positions": n_targets * (events + 1), "events": rows * events}
    predicted = flops.training(**counts)
    assert predicted / 3 == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert predicted == pytest.approx(forward.get_total_flops() + backward.get_total_flops(), rel=0.01)


def test_the_published_1b_model_within_the_parts_that_both_count():
    """Section 2.5: 18.89 GFLOPs a sample, nominal 1B weights, 512 positions whose context linear 5 items share."""
    options = ModelOptions(d_model=1792, n_layers=18, n_heads=14, embed_dim=90)
    flops = forward_flops(options, vocabulary((8192, 8192, 8192), max_context=511))
    blocks = 18 * 1792**2 * 18
    scores = 36 * 512 * 1792 * 18
    assert 3 * flops.target_position * 512 == scores
    assert 3 * flops.event == 6 * 3 * 90 * 1792
    heads = 6 * 3 * 8192 * 1792  # one head per token, where the nominal count has 1e9 weights for each token
    self_scores = 3 * 18 * 3 * 4 * 3 * 1792
    assert 3 * flops.target == 6 * 3 * blocks + heads + self_scores
    published = 6 * 1e9 * 3 + scores + 6 * 512 / 5 * 3 * 90 * 1792
    assert published == pytest.approx(18.89e9, rel=1e-3)
    counted = flops.training(1, 512, 512 / 5) - heads - self_scores + 6 * 3 * (1e9 - blocks)
    assert counted == pytest.approx(published, rel=1e-9)
