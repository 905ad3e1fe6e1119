"""Compiled blocks against the same blocks as they are."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from checkpointing_cases import MODELS, new_model, random_batch, step

from onetrain.parallel import activation_checkpointing
from onetrain.parallel import compile as compilation

TOLERANCE = 1e-5  # of the loss, and of every gradient over its largest element: kernels add in another order


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPU")
def test_loss_and_gradients_are_those_of_plain_blocks():
    """With MTP, which runs the first block again; the second of the three also recomputes its activations; batches of
    two sizes.
    """
    plain = new_model(replace(MODELS["mtp"], dropout=0.0))
    compiled = copy.deepcopy(plain)
    activation_checkpointing.apply(compiled, (1,))
    compilation.apply(compiled)
    torch._dynamo.utils.counters.clear()
    for seed, slots in ((0, 2), (1, 3)):
        batch = random_batch(seed, slots=slots)
        expected, gradients = step(plain, batch)
        parts, own = step(compiled, batch)
        torch.testing.assert_close(parts.loss, expected.loss, rtol=TOLERANCE, atol=0)
        assert own.keys() == gradients.keys()
        for key, gradient in gradients.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(own[key], gradient, rtol=0, atol=TOLERANCE * scale, msg=lambda m, k=key: k + m)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
