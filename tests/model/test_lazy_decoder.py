"""The lazy decoder against loops over the paper's equations, what it must not see, and targets that share a context."""

import dataclasses

import numpy as np
import pytest
import torch
from decoder_cases import (
    FEATURES,
    random_context,
    random_model,
    random_targets,
    reference_logits,
    vocabulary,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from onetrain.data.batch import BatchBuilder
from onetrain.data.options import BatchOptions, DataOptions, SimulatorOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.samples import Sample, SampleIndex
from onetrain.data.shards import ShardReader
from onetrain.data.sids import SidMap
from onetrain.model.inputs import Context, Targets
from onetrain.model.lazy_decoder import LazyDecoder
from onetrain.model.loss import next_token_loss
from onetrain.model.options import ModelOptions, Vocabulary

PUBLISHED = {  # d_model, layers, heads: millions of block parameters (sections 2.4 and 4)
    "0.1B": (640, 12, 10, 88.5),
    "0.2B": (896, 12, 14, 173.4),
    "0.5B": (1408, 14, 11, 499.6),
    "1B": (1792, 18, 14, 1040.4),
    "2B": (2304, 22, 18, 2102.1),
    "4B": (2944, 26, 23, 4056.2),
    "8B": (3584, 34, 28, 7861.2),
}


@st.composite
def model_options(draw):
    heads = draw(st.sampled_from((1, 2, 4)))
    layers = draw(st.integers(1, 3))
    return ModelOptions(
        d_model=heads * draw(st.sampled_from((2, 3))),
        n_layers=layers,
        n_heads=heads,
        d_ff=draw(st.sampled_from((None, 5))),
        l_kv=draw(st.integers(1, layers)),
        s_kv=draw(st.sampled_from((1, 2))),
        g_kv=draw(st.sampled_from([None, *(g for g in (1, 2, 4) if heads % g == 0)])),
        embed_dim=draw(st.integers(1, 3)),
        features=tuple(draw(st.lists(st.sampled_from(FEATURES), min_size=1, max_size=5, unique=True))),
        position=draw(st.sampled_from(("absolute", "recency", "none"))),
        norm_eps=draw(st.sampled_from((1e-6, 1e-2))),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    options=model_options(),
    codes=st.sampled_from(((4, 5, 3), (3, 2, 4, 5))),
    rows=st.integers(1, 3),
    events=st.integers(0, 4),
    slots=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_logits_and_gradients_equal_the_paper_in_loops(options, codes, rows, events, slots, seed):
    vocab = vocabulary(codes)
    model = random_model(options, vocab, seed)
    context = random_context(vocab, rows, events, seed)
    targets = random_targets(vocab, context, slots, seed)
    parameters = dict(model.named_parameters())
    logits, codes_ML, weight_M = model(context, targets)

    real = [(b, t) for b in range(rows) for t in range(slots) if targets.weight_BT[b, t] > 0]
    assert codes_ML.tolist() == [targets.sid_BTL[b, t].tolist() for b, t in real]
    assert weight_M.tolist() == [float(targets.weight_BT[b, t]) for b, t in real]
    expected = [
        reference_logits(
            parameters, options, len(codes), context, b, int(targets.end_BT[b, t]), targets.sid_BTL[b, t].tolist()
        )
        for b, t in real
    ]
    generator = torch.Generator().manual_seed(seed)
    score = reference_score = 0.0
    for level, logits_MV in enumerate(logits):
        reference_MV = torch.stack([target[level] for target in expected])
        torch.testing.assert_close(logits_MV, reference_MV, rtol=1e-9, atol=1e-10)
        cotangent_MV = torch.randn(logits_MV.shape, generator=generator, dtype=torch.float64)
        score += (logits_MV * cotangent_MV).sum()
        reference_score += (reference_MV * cotangent_MV).sum()
    gradients = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
    references = torch.autograd.grad(reference_score, list(parameters.values()), allow_unused=True)
    for name, gradient, reference in zip(parameters, gradients, references, strict=True):
        zero = torch.zeros_like(parameters[name])
        gradient, reference = (zero if g is None else g for g in (gradient, reference))
        torch.testing.assert_close(gradient, reference, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_without_targets_has_no_logits_and_a_gradient_of_zero():
    vocab = vocabulary()
    model = random_model(ModelOptions(d_model=8, n_layers=2, n_heads=2), vocab)
    context = random_context(vocab, 2, 3)
    targets = dataclasses.replace(random_targets(vocab, context, 2), weight_BT=torch.zeros(2, 2))
    logits, codes_ML, weight_M = model(context, targets)
    assert [tuple(level.shape) for level in logits] == [(0, 5), (0, 4), (0, 6)]
    assert (len(codes_ML), len(weight_M)) == (0, 0)
    parts = next_token_loss(logits, codes_ML, weight_M)
    parts.loss.backward()
    assert parts.loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
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
    """Section 2.5: 512 samples with 512 positions, of which 5 items share one context."""
    options = ModelOptions(d_model=1792, n_layers=18, n_heads=14, l_kv=l_kv, s_kv=s_kv, g_kv=groups, embed_dim=90)
    vocab = vocabulary(max_context=511)
    with torch.device("meta"):
        model = LazyDecoder(options, vocab)
    context = random_context(vocab, 1, 511).to("meta")
    sets = model.context(context)
    tensors = {id(tensor): tensor for kv in sets for tensor in kv}
    assert len(tensors) == l_kv * s_kv
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(1, groups, 512, 128)}
    elements = sum(tensor.numel() for tensor in tensors.values())
    assert 512 / 5 * elements / 1e6 == pytest.approx(millions, abs=0.01)


VARIANTS = [
    {"s_kv": s_kv, "l_kv": l_kv, "g_kv": g_kv, "position": position}
    for s_kv in (1, 2)
    for l_kv in (1, 3)
    for g_kv in (1, 2, 4)
    for position in ("absolute", "recency", "none")
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_nothing_after_its_own_moment_reaches_a_target(variant):
    vocab = vocabulary((5, 4, 6, 3), max_context=8)
    options = ModelOptions(d_model=16, n_layers=3, n_heads=4, embed_dim=4, features=FEATURES, **variant)
    model = random_model(options, vocab)
    context, other_context = random_context(vocab, 3, 8, seed=1), random_context(vocab, 3, 8, seed=2)
    context.length_B[:] = torch.tensor([8, 6, 7])
    end_BT = torch.tensor([[0, 3, 8], [2, 4, 6], [1, 5, 7]])
    targets = dataclasses.replace(random_targets(vocab, context, 3, seed=1), end_BT=end_BT, weight_BT=torch.ones(3, 3))
    other_targets = random_targets(vocab, context, 3, seed=2)

    def logits(context, targets):
        with torch.no_grad():
            return [level.unflatten(0, (3, 3)) for level in model(context, targets)[0]]

    before = logits(context, targets)
    for row, slot in ((0, 1), (1, 0), (1, 2), (2, 2)):
        end = int(end_BT[row, slot])
        keep_BN = torch.zeros(3, 8, dtype=torch.bool)
        keep_BN[row, :end] = True  # everything else changes: later events, padding, other rows
        changed = {
            name: torch.where(keep_BN[..., None] if name == "sid_BNL" else keep_BN, getattr(context, name), new)
            for name, new in vars(other_context).items()
            if name != "length_B"
        }
        keep_BT = torch.zeros(3, 3, dtype=torch.bool)
        keep_BT[row, slot] = True  # and every other target
        sid_BTL = torch.where(keep_BT[..., None], targets.sid_BTL, other_targets.sid_BTL)
        moved = dataclasses.replace(targets, sid_BTL=sid_BTL)
        after = logits(dataclasses.replace(context, **changed), moved)
        for level_before, level_after in zip(before, after, strict=True):
            torch.testing.assert_close(level_after[row, slot], level_before[row, slot], rtol=0, atol=1e-12)
        for level in range(4):  # its own codes: level l sees the ones before l, and the last of those matters
            own = targets.sid_BTL.clone()
            own[row, slot, level] = (own[row, slot, level] + 1) % vocab.codes[level]
            after = logits(context, dataclasses.replace(targets, sid_BTL=own))
            for seen_by in range(4):
                same = torch.allclose(after[seen_by][row, slot], before[seen_by][row, slot], rtol=0, atol=1e-12)
                assert same == (seen_by <= level)
        if end > 0:  # the perturbation would show: the last visible event matters
            item_BN, gap_BN = context.item_BN.clone(), context.gap_BN.clone()
            item_BN[row, end - 1] = (item_BN[row, end - 1] + 1) % vocab.n_items
            gap_BN[row, end - 1] = (gap_BN[row, end - 1] + 1) % 32
            after = logits(dataclasses.replace(context, item_BN=item_BN, gap_BN=gap_BN), targets)
            assert (after[0][row, slot] - before[0][row, slot]).abs().max() > 1e-6


def test_context_dropout_hides_events_alike_for_all_targets_and_only_in_training():
    vocab = vocabulary(max_context=40)
    model = random_model(ModelOptions(d_model=8, n_layers=1, n_heads=2, context_dropout=0.5), vocab)
    context = random_context(vocab, 2, 40)
    context.length_B[:] = torch.tensor([40, 25])
    end_BT = torch.tensor([[10, 40, 40], [25, 3, 0]])
    exact_BTP = torch.arange(-1, 40) < end_BT[..., None]
    assert torch.equal(model.visible(context, end_BT), exact_BTP)
    model.train()
    torch.manual_seed(0)
    hidden_BTP = model.visible(context, end_BT)
    assert hidden_BTP[..., 0].all()
    assert not (hidden_BTP & ~exact_BTP).any()
    assert torch.equal(hidden_BTP[0, 1], hidden_BTP[0, 2])
    assert torch.equal(hidden_BTP[0, 0], hidden_BTP[0, 1] & exact_BTP[0, 0])
    assert 10 <= int(hidden_BTP[0, 1].sum()) <= 31


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A prepared folder of simulated logs, and random SIDs of its items, some shared."""
    folder = tmp_path_factory.mktemp("shop")
    simulator = SimulatorOptions(users=25, items=60, events_per_user=9, themes=9, embedding_dim=4)
    source = SourceOptions(reader="simulator", events=str(folder / "logs"), simulator=simulator)
    manifest = prepare(DataOptions(prepared=str(folder / "prepared"), source=source))
    codes_IL = np.random.default_rng(0).integers(0, (4, 5, 6), (manifest.items.rows, 3))
    sids = SidMap(codes_IL, (4, 5, 6), (), manifest.catalogue_fingerprint)
    return ShardReader(folder / "prepared", manifest), sids


def loss_and_gradients(model, builder, samples, per_batch):
    model.zero_grad()
    total = weight = 0.0
    for start in range(0, len(samples), per_batch):
        batch = builder.build(samples[start : start + per_batch])
        context = Context(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(Context)})
        parts = next_token_loss(*model(context, Targets(batch.target_sid_BTL, batch.end_BT, batch.weight_BT)))
        parts.loss.backward()
        total, weight = total + float(parts.loss.detach()), weight + float(parts.weight)
    return total / weight, {name: p.grad / weight for name, p in model.named_parameters()}


@pytest.mark.parametrize("position", ["absolute", "none"])
@pytest.mark.parametrize("request_by", ["event", "timestamp"])
@pytest.mark.parametrize("max_context", [64, 6])
def test_targets_that_share_a_context_train_as_they_do_one_at_a_time(shop, position, request_by, max_context):
    reader, sids = shop
    shared = BatchOptions(
        max_context=max_context,
        request_by=request_by,
        share_context="user",
        behaviour_weights={"view": 0.5, "buy": 3.0},
    )
    index = SampleIndex(reader, "train", shared)
    samples = [index[number] for number in range(len(index))]
    if max_context == 64:  # a window holds every history, so the two options mean the same
        alone = SampleIndex(reader, "train", dataclasses.replace(shared, share_context="request"))
        singles = [alone[number] for number in range(len(alone))]
    else:  # a later target of a window begins where the window begins
        singles = [Sample(s.user, s.start, (request,)) for s in samples for request in s.requests]
    singles = [
        Sample(s.user, s.start, (dataclasses.replace(request, targets=(target,)),))
        for s in singles
        for request in s.requests
        for target in request.targets
    ]
    assert len(singles) == sum(len(request.targets) for s in samples for request in s.requests) > 2 * len(samples)
    vocab = Vocabulary(
        sids.sizes, len(sids.codes_IL), len(reader.manifest.behaviours), len(reader.manifest.scenarios), max_context
    )
    options = ModelOptions(
        d_model=16, n_layers=2, n_heads=4, g_kv=2, s_kv=2, l_kv=2, embed_dim=8, features=FEATURES, position=position
    )
    model = random_model(options, vocab, dtype=torch.float32).train()
    builder = BatchBuilder(sids, shared, reader.manifest.behaviours)
    loss, gradients = loss_and_gradients(model, builder, samples, per_batch=10)
    loss_alone, gradients_alone = loss_and_gradients(model, builder, singles, per_batch=50)
    assert loss == pytest.approx(loss_alone, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_alone[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)
        assert gradient.abs().max() > 1e-4, name
