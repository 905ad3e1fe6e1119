"""Query-Formers of pathways and items against loops over queries, heads and positions."""

import dataclasses

import pytest
import torch
from decoder_cases import check_variant, random_context, random_model, random_targets, variant
from reference_layers import query_former
from torch import nn

from onetrain.model.options import QueryFormerOptions
from onetrain.model.query_former import QueryFormer

FORMS = [
    QueryFormerOptions(queries=1, width=4, blocks=1, heads=1),
    QueryFormerOptions(queries=3, width=6, blocks=2, heads=3, d_ff=5),
    QueryFormerOptions(queries=4, width=8, blocks=3, heads=2),
]


def random_query_former(form, eps=1e-3):
    torch.manual_seed(0)
    module = QueryFormer(form, eps).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.5)
    return module


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.queries}-{form.width}-{form.blocks}-{form.heads}")
def test_outputs_and_gradients_equal_loops(form):
    """Ragged rows, also holes and a row that sees nothing."""
    module = random_query_former(form)
    x_BNW = torch.randn(4, 5, form.width, dtype=torch.float64, requires_grad=True)
    seen_BN = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    parameters = {f"qf.{name}": p for name, p in module.named_parameters()}
    f_BMW = module(x_BNW, seen_BN)
    expected_BMW = torch.stack(
        [
            torch.stack(query_former(parameters, "qf", [x for x, s in zip(xs, seen, strict=True) if s], form, 1e-3))
            for xs, seen in zip(x_BNW, seen_BN, strict=True)
        ]
    )
    torch.testing.assert_close(f_BMW, expected_BMW, rtol=1e-9, atol=1e-10)
    wanted, cotangent = [x_BNW, *parameters.values()], torch.randn_like(f_BMW)
    found = torch.autograd.grad(f_BMW, wanted, cotangent)
    for gradient, other in zip(found, torch.autograd.grad(expected_BMW, wanted, cotangent), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9)
        assert gradient.any()
    assert not found[0][~seen_BN].any()  # padding has no gradient


@pytest.mark.parametrize("positions", [0, 3])
def test_a_batch_in_which_nobody_has_events(positions):
    module = random_query_former(FORMS[1])
    x_BNW = torch.randn(2, positions, 6, dtype=torch.float64)
    f_BMW = module(x_BNW, torch.zeros(2, positions, dtype=torch.bool))
    parameters = {f"qf.{name}": p for name, p in module.named_parameters()}
    expected_MW = torch.stack(query_former(parameters, "qf", [], FORMS[1], 1e-3))
    torch.testing.assert_close(f_BMW, expected_MW.expand(2, -1, -1), rtol=1e-9, atol=1e-10)


def test_hidden_positions_may_hold_anything():
    module = random_query_former(FORMS[2])
    x_BNW = torch.randn(2, 6, 8, dtype=torch.float64)
    seen_BN = torch.arange(6) < torch.tensor([[4], [2]])
    other_BNW = torch.where(seen_BN[..., None], x_BNW, 1e6 * torch.randn_like(x_BNW))
    assert torch.equal(module(x_BNW, seen_BN), module(other_BNW, seen_BN))
    torch.testing.assert_close(module(x_BNW, seen_BN)[1], module(x_BNW[1:, :2], seen_BN[1:, :2])[0])


def test_the_decoder_over_compressed_pathways_equals_loops():
    """OneMall: a Query-Former for each pathway, W_k and W_v over their queries, experts, contrastive loss."""
    check_variant("onemall")


def test_one_pathway_compressed_beside_a_plain_one():
    former = QueryFormerOptions(queries=2, width=4, blocks=1, heads=2)
    check_variant(
        "onerec_v1_features", l_kv=2, s_kv=2, query_formers={"long": former}, time_aware=True, position="absolute"
    )


def test_the_context_holds_the_queries_in_place_of_the_events():
    options, vocab = variant("onemall")
    model, context = random_model(options, vocab), random_context(vocab, 3)
    x_BPD, _ = model.context(context)
    assert x_BPD.shape[1] == 1 + 2 + 3
    emptied = {
        name: dataclasses.replace(events, length_B=torch.zeros_like(events.length_B))
        for name, events in context.sequences.items()
    }
    nothing_BPD = model.context(dataclasses.replace(context, sequences=emptied)).x_BPD
    assert nothing_BPD.shape[1] == 6
    assert nothing_BPD.isfinite().all()
    logits = model(context, random_targets(vocab, 3, 1, one_request=True)).logits
    assert all(level.isfinite().all() for level in logits)
