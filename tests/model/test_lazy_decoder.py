"""The lazy decoder, in the forms of all three papers, against loops over their equations."""

import dataclasses
import math

import pytest
import torch
from decoder_cases import (
    BEYOND,
    ONE_PATHWAY,
    TWO_PATHWAYS,
    check_random_options,
    check_variant,
    model_options,
    random_context,
    random_model,
    random_targets,
    variant,
    vocabulary,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from onetrain.model.attention import OutputGate
from onetrain.model.build import build
from onetrain.model.lazy_decoder import LazyDecoder
from onetrain.model.loss import training_loss
from onetrain.model.options import ModelOptions, MTPOptions, QueryFormerOptions
from onetrain.model.pathway import ALWAYS, NEVER

PUBLISHED = {  # d_model, layers, heads: millions of block parameters (OneRec-V2, sections 2.4 and 4)
    "0.1B": (640, 12, 10, 88.5),
    "0.2B": (896, 12, 14, 173.4),
    "0.5B": (1408, 14, 11, 499.6),
    "1B": (1792, 18, 14, 1040.4),
    "2B": (2304, 22, 18, 2102.1),
    "4B": (2944, 26, 23, 4056.2),
    "8B": (3584, 34, 28, 7861.2),
}


@pytest.mark.parametrize(
    "name",
    [
        "onerec_v2",
        "onerec_v2_key_and_value",
        "onerec_v2_experts",
        "deepseek_v3_routing",
        "onerec_v1_features",
        "gate_and_norm_shared_kv",
    ],
)
def test_every_attention_form_equals_the_paper_in_loops(name):
    check_variant(name)


def test_time_and_scenario_of_events_and_bos():
    """Hour, weekday and weekend of every event and of the request; the request's scenario at BOS and every head."""
    check_variant("onerec_v2", time_aware=True, scenario_bos=True, scenario_head_bias=True)


def test_gate_norm_and_projected_keys_without_mtp():
    check_variant("onelive_gate_bias", codes=(3, 2, 4, 5), mtp=MTPOptions())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    options=model_options(pathways=tuple(TWO_PATHWAYS)),
    codes=st.sampled_from(((4, 5, 3), (3, 2, 4, 5))),
    pathways=st.sampled_from((ONE_PATHWAY, {"history": 2}, {"short": 2, "long": 3})),
    rows=st.integers(1, 2),
    slots=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_random_options_equal_the_papers_in_loops(options, codes, pathways, rows, slots, seed):
    formers = {name: former for name, former in options.query_formers.items() if name in pathways}
    options = dataclasses.replace(options, query_formers=formers)
    check_random_options(options, pathways, codes, rows, slots, seed)


@pytest.mark.parametrize(
    "name", ["onerec_v2_experts", "deepseek_v3_routing", "onemall", "onelive", "mtp_contrastive_experts"]
)
def test_a_batch_without_targets_has_no_logits_and_a_gradient_of_zero(name):
    options, vocab = variant(name)
    model = random_model(options, vocab)
    targets = dataclasses.replace(random_targets(vocab, 2, 2), weight_BT=torch.zeros(2, 2))
    predictions = model(random_context(vocab, 2), targets)
    assert [tuple(level.shape) for level in predictions.logits] == [(0, 5), (0, 4), (0, 6)]
    assert (len(predictions.codes_ML), len(predictions.weight_M)) == (0, 0)
    parts = training_loss(predictions, options)
    parts.loss.backward()
    assert parts.loss == 0
    assert all(not stat.any() for stat in parts.stats.values())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.blocks[0].cross.query.weight.grad is not None


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_block_has_18_d_squared_parameters_at_every_published_size(size):
    d, layers, heads, millions = PUBLISHED[size]
    with torch.device("meta"):
        model = LazyDecoder(ModelOptions(d_model=d, n_layers=layers, n_heads=heads), vocabulary())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert matrices == 18 * d * d * layers
    assert round(matrices / 1e6, 1) == pytest.approx(millions, abs=0.101)


@pytest.mark.parametrize(
    ("groups", "l_kv", "s_kv", "millions"),
    [(14, 1, 1, 93.95), (7, 1, 1, 46.98), (2, 1, 1, 13.42), (1, 1, 1, 6.71), (14, 3, 1, 3 * 93.95), (14, 1, 2, 187.9)],
)
def test_kv_elements_of_the_1b_model_as_published(groups, l_kv, s_kv, millions):
    """OneRec-V2, section 2.5: 512 samples with 512 positions, of which 5 items share one context."""
    options = ModelOptions(d_model=1792, n_layers=18, n_heads=14, l_kv=l_kv, s_kv=s_kv, g_kv=groups, embed_dim=90)
    vocab = vocabulary(pathways={"history": 511})
    with torch.device("meta"):
        model = LazyDecoder(options, vocab)
    kv = model.remember(random_context(vocab, 1).to("meta")).kv
    assert len(kv) == 18
    tensors = {id(tensor): tensor for of_block in kv for tensor in of_block}
    assert len(tensors) == l_kv * s_kv
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(1, groups, 512, 128)}
    elements = sum(tensor.numel() for tensor in tensors.values())
    assert 512 / 5 * elements / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("bias", [None, -1.5])
def test_initial_weights(bias):
    """Normal(0, init_std); smaller onto the residual stream; the gate's bias at its value; gains 1."""
    options = ModelOptions(
        d_model=96,
        n_layers=3,
        n_heads=4,
        cross_attention="projected_kv",
        output_gate=True,
        gate_bias=bias,
        query_formers={"history": QueryFormerOptions(queries=32, width=96)},
    )
    torch.manual_seed(0)
    model = build(options, vocabulary((300, 300, 300)))
    std = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.dim() > 1 and p.numel() > 2000}
    ends = ("self_attention.out.weight", "cross.out.weight", "ffn.down.weight")
    small = {name for name in std if name.startswith("blocks.") and name.endswith(ends)}
    assert len(small) == 9
    for name, value in std.items():
        assert value == pytest.approx(0.02 / (math.sqrt(9) if name in small else 1), rel=0.1), name
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith("norm.weight"))
    gates = [module for module in model.modules() if isinstance(module, OutputGate)]
    assert len(gates) == 6
    for gate in gates:
        assert gate.score.bias is None if bias is None else (gate.score.bias == bias).all()


def test_context_dropout_hides_events_alike_for_all_targets_and_only_in_training():
    vocab = vocabulary(pathways={"history": 40})
    model = random_model(ModelOptions(d_model=8, n_layers=1, n_heads=2, context_dropout=0.5), vocab)
    context = random_context(vocab, 2)
    context.sequences["history"].length_B[:] = torch.tensor([40, 25])
    exact_BP = torch.where(torch.arange(40) < torch.tensor([[40], [25]]), torch.arange(40), NEVER)
    assert torch.equal(model.context(context).index_BP[:, 1:], exact_BP)
    model.train()
    torch.manual_seed(0)
    index_BP = model.context(context).index_BP
    assert (index_BP[:, 0] == ALWAYS).all()
    hidden_BP = index_BP[:, 1:] == NEVER
    assert torch.equal(index_BP[:, 1:], torch.where(hidden_BP, NEVER, exact_BP))
    assert 10 <= int(hidden_BP[0].sum()) <= 31


def test_hidden_events_are_as_absent():
    """What dropout hides no target sees, not even through a Query-Former: all but one event hidden = a row of one."""
    options, vocab = variant("onemall", position="none", context_dropout=0.9)
    model = random_model(options, vocab)
    context, targets = random_context(vocab, 1), random_targets(vocab, 1, 1, one_request=True)
    model.train()
    for seed in range(100):
        torch.manual_seed(seed)
        hidden = [torch.rand(1, n) < 0.9 for n in vocab.pathways.values()]
        if sum(int((~h).sum()) for h in hidden) == 1:
            break
    torch.manual_seed(seed)
    with torch.no_grad():
        dropped = model(context, targets).logits
        sequences = {}
        for (name, events), h in zip(context.sequences.items(), hidden, strict=True):
            kept = (~h[0]).nonzero().flatten()
            order = torch.cat((kept, h[0].nonzero().flatten()))
            sequences[name] = dataclasses.replace(
                events,
                sid_BNL=events.sid_BNL[:, order],
                length_B=torch.tensor([len(kept)]),
                features={key: ids[:, order] for key, ids in events.features.items()},
            )
        alone = model.eval()(dataclasses.replace(context, sequences=sequences), targets).logits
    assert int(targets.end_BT[0, 0]) == BEYOND
    for level, other in zip(dropped, alone, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-9, atol=1e-10)
