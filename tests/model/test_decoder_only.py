"""The naive decoder-only reference against loops: what a target sees, BOS and its codes are one causal sequence."""

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

from onetrain.model.pathway import NEVER


def test_several_moments_of_one_history_in_a_row():
    """Targets of different ends share the sequence; each equals its own sequence cut at its end."""
    check_variant("decoder_only", slots=3)


def test_one_position_per_code_gate_norms_time_and_experts():
    check_variant("decoder_only_flat")


def test_pathways_one_after_the_other():
    check_variant("decoder_only_pathways")


def test_four_levels():
    check_variant("decoder_only", codes=(3, 2, 4, 5), rows=2, slots=1, n_layers=1)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    options=model_options("decoder_only", tuple(TWO_PATHWAYS)),
    codes=st.sampled_from(((4, 5, 3), (3, 2, 4, 5))),
    seed=st.integers(0, 1000),
)
def test_random_options_equal_loops(options, codes, seed):
    check_random_options(options, {"short": 2, "long": 2}, codes, rows=2, slots=2, seed=seed)


def test_a_context_position_reads_only_those_before_it():
    options, vocab = variant("decoder_only")
    model, context = random_model(options, vocab), random_context(vocab, 1)

    def values_of_last_block():
        with torch.no_grad():
            state = model.start(context, {})
        assert (state.index_BP != NEVER).all()
        return state.context[-1].value_BGNK[0]

    before = values_of_last_block()
    item_BN = context.sequences["history"].features["item"]
    item_BN[0, 2] = (item_BN[0, 2] + 1) % 11
    changed_P = (values_of_last_block() - before).abs().amax((0, 2)) > 1e-9
    assert changed_P.tolist() == [False] * 3 + [True] * 4  # the static position is the first
