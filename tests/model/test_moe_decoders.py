"""Sparse blocks inside the decoders: auxiliary losses of batches and their parts, and what loads are counted of.

Legend: R rows, S tokens per row, D width, E experts, K experts per token.
"""

import copy
import dataclasses

import pytest
import torch
from decoder_cases import random_context, random_model, random_targets, variant
from reference_layers import router_losses, routing

from onetrain.model import moe
from onetrain.model.inputs import Context, Targets
from onetrain.model.loss import training_loss
from onetrain.model.moe import routers, routing_summary
from onetrain.model.pathway import NEVER


def moe_variant(name, **changes):
    options, vocab = variant(name)
    moe_options = dataclasses.replace(options.moe, sequence_loss=0.4, z_loss=0.03, **changes)
    return dataclasses.replace(options, moe=moe_options), vocab


def rows_of(context, targets, rows):
    """Some rows of a batch, trimmed as if they had been collated alone."""
    rows = torch.tensor(rows)
    sequences = {}
    for name, events in context.sequences.items():
        longest = max(int(events.length_B[rows].max()), 1)
        features = {feature: ids[rows, :longest] for feature, ids in events.features.items()}
        sequences[name] = type(events)(
            events.sid_BNL[rows, :longest], events.index_BN[rows, :longest], events.length_B[rows], features
        )
    last = (targets.weight_BT[rows] > 0).nonzero()
    slots = int(last[:, 1].max()) + 1 if len(last) else 1
    return Context(sequences, {name: ids[rows] for name, ids in context.user.items()}), Targets(
        targets.sid_BTL[rows, :slots],
        targets.end_BT[rows, :slots],
        targets.weight_BT[rows, :slots],
        {name: ids[rows, :slots] for name, ids in targets.request.items()},
        {name: ids[rows, :slots] for name, ids in targets.item.items()},
        targets.log_q_BT[rows, :slots],
    )


@pytest.mark.parametrize("name", ["onerec_v2_experts", "decoder_only_flat"])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 0], [3], [1, 2]]])
def test_parts_of_a_batch_add_up_with_router_losses(name, parts):
    """Loss, statistics and gradients, whatever rows share a batch and however much padding that gives them."""
    options, vocab = moe_variant(name)
    model = random_model(options, vocab)
    context, targets = random_context(vocab, 5), random_targets(vocab, 5, 3)
    targets.weight_BT[3] = 0  # a row without targets
    targets.weight_BT[1, 1:] = 0
    wanted = list(model.parameters())
    whole = training_loss(model(context, targets), options)
    assert whole.stats["router_loss"] > 0
    pieces = [training_loss(model(*rows_of(context, targets, rows)), options) for rows in parts]
    torch.testing.assert_close(sum(piece.loss for piece in pieces), whole.loss, rtol=1e-11, atol=0)
    assert whole.stats.keys() >= {"expert_load", "router_entropy", "router_loss"}
    for stat, value in whole.stats.items():
        torch.testing.assert_close(sum(piece.stats[stat] for piece in pieces), value, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(whole.loss, wanted, allow_unused=True)
    found = torch.autograd.grad(sum(piece.loss for piece in pieces), wanted, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def seen_by_routers(model, context, targets):
    """Predictions, and the inputs of every router."""
    inputs = []
    hooks = [router.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for router in routers(model)]
    predictions = model(context, targets)
    for hook in hooks:
        hook.remove()
    return predictions, inputs


def test_nothing_keeps_the_graph_after_the_forward():
    """A model can be copied between forward and backward: no router holds a loss."""
    options, vocab = moe_variant("onerec_v2_experts")
    model = random_model(options, vocab)
    predictions = model(random_context(vocab, 2), random_targets(vocab, 2, 2))
    assert predictions.routing.loss_R.requires_grad
    assert [router.record for router in routers(model)] == [None, None]
    copy.deepcopy(model)


def test_routing_of_the_lazy_decoder_is_by_sid_level():
    """Position s of a target's tokens predicts level s; a loss for every target that counts."""
    options, vocab = moe_variant("onerec_v2_experts")
    model = random_model(options, vocab)
    context, targets = random_context(vocab, 4), random_targets(vocab, 4, 3)
    predictions, inputs = seen_by_routers(model, context, targets)
    M, routing_found = len(predictions.weight_M), predictions.routing
    assert [x_RSD.shape for x_RSD in inputs] == [(M, 3, 8)] * 2  # blocks 1 and 2; block 0 is dense
    assert routing_found.load_ZSE.shape == (2, 3, 4)
    assert routing_found.load_ZSE.sum(2).tolist() == [[2 * M] * 3] * 2
    p = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    loss, load = 0.0, torch.zeros(2, 3, 4, dtype=torch.int64)
    for sparse, x_RSD in enumerate(inputs):
        name = f"blocks.{sparse + 1}.ffn"
        loss = loss + torch.stack([router_losses(p, name, list(x_SD), options.moe) for x_SD in x_RSD])
        for x_SD in x_RSD:
            for position, x in enumerate(x_SD):
                load[sparse, position, routing(p, name, x, options.moe)[1]] += 1
    assert routing_found.load_ZSE.tolist() == load.tolist()
    torch.testing.assert_close(routing_found.loss_R, loss)
    parts = training_loss(predictions, options)
    torch.testing.assert_close(parts.stats["router_loss"], loss.detach() @ predictions.weight_M.double())
    assert parts.stats["expert_load"] is routing_found.load_ZSE
    plain = dataclasses.replace(options, moe=dataclasses.replace(options.moe, sequence_loss=0.0, z_loss=0.0))
    without = training_loss(predictions._replace(routing=routing_found._replace(loss_R=None)), plain)
    torch.testing.assert_close(parts.loss - without.loss, parts.stats["router_loss"])
    assert "router_loss" not in without.stats


def test_routing_of_the_decoder_only_counts_real_tokens_of_rows():
    """One position in all; every target of a row has the row's loss, over its real events and targets."""
    options, vocab = moe_variant("decoder_only_flat", first_dense=0)
    model = random_model(options, vocab)
    context, targets = random_context(vocab, 3), random_targets(vocab, 3, 2)
    predictions, inputs = seen_by_routers(model, context, targets)
    _, index_BP = model.context(context)
    p = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    slots_BQ = (targets.weight_BT > 0).repeat_interleave(3, dim=1)
    real_BX = torch.cat((index_BP != NEVER, slots_BQ), dim=1)
    assert not real_BX.all()
    assert predictions.routing.load_ZSE.shape == (2, 1, 3)
    assert predictions.routing.load_ZSE.sum((1, 2)).tolist() == [2 * int(real_BX.sum())] * 2
    loss_B = 0.0
    for block, x_RSD in enumerate(inputs):
        rows = [[x for x, real in zip(*row, strict=True) if real] for row in zip(x_RSD, real_BX, strict=True)]
        losses = [router_losses(p, f"blocks.{block}.ffn", tokens, options.moe) for tokens in rows]
        loss_B = loss_B + torch.stack(losses)
    row_M = (targets.weight_BT > 0).nonzero()[:, 0]
    torch.testing.assert_close(predictions.routing.loss_R, loss_B[row_M])


@pytest.mark.parametrize("name", ["onerec_v2_experts", "decoder_only_flat"])
def test_rows_without_a_target_that_counts_change_nothing(name):
    """Such rows fill a micro batch that would be empty."""
    options, vocab = moe_variant(name)
    model = random_model(options, vocab)
    context, targets = random_context(vocab, 4), random_targets(vocab, 4, 2)
    targets.weight_BT[:, 0] = 0.5
    targets.weight_BT[[0, 2]] = 0
    whole, alone = (
        training_loss(model(*batch), options) for batch in ((context, targets), rows_of(context, targets, [1, 3]))
    )
    assert whole.stats["expert_load"].sum() > 0
    assert torch.equal(whole.stats["expert_load"], alone.stats["expert_load"])
    for statistic in ("router_entropy", "router_loss", "level_loss"):
        torch.testing.assert_close(whole.stats[statistic], alone.stats[statistic])
    torch.testing.assert_close(whole.loss, alone.loss)


def test_decoding_after_training_counts_no_stale_padding():
    """Beams have other shapes than the batch before them."""
    options, vocab = variant("decoder_only_flat")
    model = random_model(options, vocab)
    context, targets = random_context(vocab, 3), random_targets(vocab, 3, 2)
    model(context, targets)
    request = {name: ids_BT[:, 0] for name, ids_BT in targets.request.items()}
    logits_MV, state = model.step(model.start(context, request), 0, None)
    assert logits_MV.shape == (3, 5)
    logits_MV, _ = model.step(state, 1, logits_MV.argmax(1, keepdim=True))
    assert logits_MV.shape == (3, 4)


def test_a_dense_model_has_no_routing():
    options, vocab = variant("onerec_v2")
    model = random_model(options, vocab)
    predictions = model(random_context(vocab, 2), random_targets(vocab, 2, 2))
    assert predictions.routing is None
    assert not training_loss(predictions, options).stats.keys() & {"expert_load", "router_entropy", "router_loss"}
    assert routing_summary(model, by_position=True) is None
    assert moe.routers(model) == []
