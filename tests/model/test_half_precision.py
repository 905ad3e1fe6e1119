"""Every variant in bf16: no dtype is lost on the way, and outputs stay near those of the same weights in float64."""

import copy

import pytest
import torch
from decoder_cases import (
    REQUEST,
    VARIANTS,
    one_request_per_row,
    outputs_of,
    random_context,
    random_model,
    random_targets,
    variant,
)

from onetrain.model.beam_search import beam_search
from onetrain.model.loss import training_loss
from onetrain.model.trie import SidTrie


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_gradients_and_beams_in_bf16(name):
    options, vocab = variant(name)
    model = random_model(options, vocab, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    context, targets = random_context(vocab, 3), random_targets(vocab, 3, 2, 0, one_request_per_row(options, vocab))
    predictions = model(context, targets)
    loss = training_loss(predictions, options).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    expected = outputs_of(exact(context, targets))
    for output, tensor in outputs_of(predictions).items():
        assert tensor.dtype == torch.bfloat16
        error = (tensor.double() - expected[output]).norm() / expected[output].norm()
        assert float(error.detach()) < 0.15, output
    trie = SidTrie(torch.cartesian_prod(*[torch.arange(size) for size in vocab.codes]), vocab.codes)
    beams = beam_search(model, context, trie, 4, {key: targets.request[key][:, 0] for key in REQUEST})
    assert beams.score_BK.dtype == torch.float32
    assert beams.score_BK.isfinite().all()
