"""The FLOP counter against torch's, which sees the matrix products of the math kernel but not of a fused CPU one."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from random_models import full_inputs, random_options
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from onetrain.model.activations import context_positions
from onetrain.model.build import build
from onetrain.model.flops import PARTS, forward_flops
from onetrain.model.loss import training_loss
from onetrain.model.options import ModelOptions, Vocabulary
from onetrain.model.presets import PRESETS, preset, vocabulary


class SummaryAttention:
    """In place of the attention of text rows, whose products torch does not all count, and of which kernels compute
    more than is seen: counts the pairs of its ranges, and gives every input a gradient without a matrix product.
    """

    def __init__(self):
        self.flops = 0

    def __call__(self, q_HTK, text, summary, ranges, kernel):
        seen = ranges.text_end_T - ranges.text_begin_T + ranges.summary_end_T - ranges.summary_begin_T
        self.flops += 4 * q_HTK.shape[0] * q_HTK.shape[2] * int(seen.sum())
        return q_HTK + sum(part.sum() for part in (*text, *summary))


def computed_but_not_seen(options, vocab, rows):
    """FLOPs of the pairs that summary tokens compute with later summary tokens of their chunk, and mask."""
    total, per_event = 0, vocab.levels if options.flatten_codes else 1
    for name, ksa in options.ksa.items():
        layers = sum(kind == "ksa" or not ksa.bypass_full for kind in ksa.layers)
        chunks = vocab.pathways[name] * per_event // ksa.chunk
        total += rows * layers * chunks * math.comb(ksa.summaries, 2) * 4 * ksa.width
    return total


def counted_by_torch(options, vocab, rows, slots):
    """(forward, forward and backward) FLOPs of one micro batch, in the loss too.

    In float64: torch counts nothing for the grouped products of other types.
    """
    summary_attention = SummaryAttention()
    with mock.patch("onetrain.model.ksa.part.attention", summary_attention):
        forward, backward = matrix_products(options, vocab, rows, slots)
    seen = summary_attention.flops - computed_but_not_seen(options, vocab, rows)
    return forward + seen, forward + backward + 3 * seen


def matrix_products(options, vocab, rows, slots):
    torch.manual_seed(0)
    model = build(options, vocab).double()
    context, targets = full_inputs(options, vocab, rows, slots)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = training_loss(model(context, targets), options).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def counts_of(options, vocab, rows, slots):
    """The arguments of `training` for the inputs above."""
    positions = context_positions(options, vocab)
    return {
        "targets": rows * slots,
        "target_positions": rows * slots * positions,
        "rows": rows,
        "events": {name: rows * length for name, length in vocab.pathways.items()},
    }


def assert_equal(options, vocab, rows=3, slots=2):
    flops = forward_flops(options, vocab)
    counts = counts_of(options, vocab, rows, slots)
    forward, both = counted_by_torch(options, vocab, rows, slots)
    assert sum(flops.forward(flops.work(**counts)).values()) == pytest.approx(forward, rel=0.01)
    assert flops.training(**counts) == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_small_presets_equal_what_torch_counts(name):
    assert_equal(preset(name, 0.05), vocabulary(name, 0.05))


@pytest.mark.parametrize("seed", range(60))
def test_random_options_equal_what_torch_counts(seed):
    assert_equal(*random_options(seed))


def test_the_parts_add_up_and_scale_with_the_work():
    options, vocab = preset("onemall_0.5b_a0.1b"), vocabulary("onemall_0.5b_a0.1b")
    flops = forward_flops(options, vocab)
    counts = counts_of(options, vocab, rows=7, slots=5)
    forward = flops.forward(flops.work(**counts))
    assert tuple(forward) == PARTS
    assert flops.training(**counts) == 3 * sum(forward.values())
    assert forward["ksa"] == forward["encoder"] == forward["mtp"] == 0
    assert all(forward[part] > 0 for part in PARTS if part not in ("ksa", "encoder", "mtp"))
    one = flops.training(**counts_of(options, vocab, rows=1, slots=5), micro_batches=1)
    assert flops.training(**counts, micro_batches=7) == pytest.approx(7 * one)


def test_no_work_costs_nothing():
    options, vocab = random_options(0)
    flops = forward_flops(options, vocab)
    nothing = {"targets": 0, "target_positions": 0, "rows": 0, "events": dict.fromkeys(vocab.pathways, 0)}
    assert flops.training(**nothing) == 0


def test_the_published_1b_model_within_the_parts_that_both_count():
    """18.89 GFLOPs a target: nominal 1e9 weights, 512 positions whose context linear 5 targets share."""
    options = preset("onerec_v2_1b")
    vocab = Vocabulary(codes=(8192,) * 3, features={}, pathways={"history": 511})
    flops = forward_flops(replace(options, position="none"), vocab)
    work = flops.work(targets=5, target_positions=5 * 512, rows=1, events={"history": 511})
    parts = {part: 3 * count / 5 for part, count in flops.forward(work).items()}
    blocks = 18 * 1792**2 * 18
    self_scores = 3 * 18 * 3 * 4 * 3 * 1792
    assert parts["cross_scores"] == 36 * 512 * 1792 * 18
    assert parts["context"] == pytest.approx(6 * 511 / 5 * 3 * 90 * 1792)
    assert parts["cross"] + parts["self"] + parts["ffn"] == pytest.approx(6 * 3 * blocks + self_scores)
    assert parts["heads"] == 6 * 3 * 8192 * 1792
    assert parts["cross_kv"] == parts["encoder"] == 0
    published = sum(parts.values()) - parts["heads"] - self_scores + 6 * 3 * (1e9 - blocks)
    assert published == pytest.approx(18.89e9, rel=1e-3)


def test_sharing_a_context_costs_only_the_targets_more():
    options = ModelOptions(cross_attention="projected_kv")
    vocab = Vocabulary(codes=(16, 16), features={}, pathways={"history": 30})
    flops = forward_flops(options, vocab)
    one, five = (flops.forward(flops.work(**counts_of(options, vocab, 1, slots))) for slots in (1, 5))
    for part in PARTS:
        assert five[part] == (one[part] if part in ("context", "cross_kv") else 5 * one[part])
