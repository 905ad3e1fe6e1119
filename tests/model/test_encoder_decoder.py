"""The encoder-decoder of OneRec-V1 and TIGER against loops: bidirectional encoder, then projected cross-attention."""

import torch
from decoder_cases import (
    TWO_PATHWAYS,
    check_random_options,
    check_variant,
    model_options,
    random_context,
    random_model,
    variant,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def test_two_pathways():
    check_variant("encoder_decoder")


def test_one_position_per_code():
    check_variant("tiger")


def test_gate_and_norms_are_in_the_encoder_too():
    check_variant("tiger", rows=2, slots=1, output_gate=True, gate_bias=1.0, qk_norm=True, flatten_codes=False)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    options=model_options("encoder_decoder", tuple(TWO_PATHWAYS)),
    codes=st.sampled_from(((4, 5, 3), (3, 2, 4, 5))),
    seed=st.integers(0, 1000),
)
def test_random_options_equal_loops(options, codes, seed):
    check_random_options(options, {"short": 2, "long": 2}, codes, rows=2, slots=1, seed=seed)


def test_every_position_reads_every_other_and_no_padding():
    """Unlike the lazy context, in which a position depends on its own event alone."""
    options, vocab = variant("encoder_decoder")
    model, context = random_model(options, vocab), random_context(vocab, 1)
    context.sequences["long"].length_B[:] = 3

    def states():
        with torch.no_grad():
            x_BPD, index_BP = model.context(context)
            return x_BPD, model.encoder(x_BPD, index_BP < 2**62)

    plain, encoded = states()
    real_P = torch.tensor([True] * 8 + [False] * 3)
    events = context.sequences["long"]
    events.features["item"][0, 1] = (events.features["item"][0, 1] + 1) % 11
    other_plain, other_encoded = states()
    changed_P = (plain - other_plain).abs().amax(-1)[0] > 1e-9
    assert changed_P.tolist() == [False] * 6 + [True] + [False] * 4
    assert ((encoded - other_encoded).abs().amax(-1)[0] > 1e-9)[real_P].all()
    events.features["item"][0, 3:] = (events.features["item"][0, 3:] + 1) % 11
    _, third = states()
    torch.testing.assert_close(third[0, real_P], other_encoded[0, real_P], rtol=0, atol=0)
