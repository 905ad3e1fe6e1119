"""Targets that share a context train as they do one at a time: from prepared logs over batches to gradients."""

import dataclasses

import numpy as np
import pytest
import torch
from decoder_cases import random_model

from onetrain.data.batch import BatchBuilder
from onetrain.data.features import feature_sizes, user_feature_sizes
from onetrain.data.item_table import ItemTable
from onetrain.data.options import BatchOptions, DataOptions, SimulatorOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.samples import SampleIndex, SampleRows
from onetrain.data.shards import ShardReader
from onetrain.data.sids import SidMap
from onetrain.launcher.job import feature_names, model_inputs
from onetrain.model.loss import training_loss
from onetrain.model.options import ContrastiveOptions, ModelOptions, MTPOptions, QueryFormerOptions, Vocabulary

SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 4, "embed_dim": 4}
FORMS = {
    "onerec_v2": {"g_kv": 2, "s_kv": 2, "l_kv": 2, "features": ("sid", "item", "behaviour", "scenario", "gap")},
    "onelive": {
        "cross_attention": "projected_kv",
        "features": ("sid", "watched"),
        "time_aware": True,
        "output_gate": True,
        "qk_norm": True,
        "mtp": MTPOptions(enabled=True),
        "position": "none",
    },
    "contrastive": {
        "contrastive": ContrastiveOptions(weight=1.0, temperature=0.5, query_former=QueryFormerOptions(2, 4, 1, 2)),
        "user_features": ("user",),
        "hashed": {"user": 16},
        "scenario_bos": True,
        "scenario_head_bias": True,
    },
    "decoder_only": {"architecture": "decoder_only", "time_aware": True},
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A prepared folder of simulated logs, and random SIDs of its items, some shared."""
    folder = tmp_path_factory.mktemp("shop")
    simulator = SimulatorOptions(users=20, items=60, events_per_user=8, themes=9, embedding_dim=4)
    source = SourceOptions(reader="simulator", events=str(folder / "logs"), simulator=simulator)
    manifest = prepare(DataOptions(prepared=str(folder / "prepared"), source=source))
    codes_IL = np.random.default_rng(0).integers(0, (4, 5, 6), (manifest.items.rows, 3))
    sids = SidMap(codes_IL, (4, 5, 6), (), manifest.catalogue_fingerprint)
    return ShardReader(folder / "prepared", manifest), sids, ItemTable.load(folder / "prepared")


def one_at_a_time(index):
    """Every target of the index as a sample of its own, whose window begins where it began."""
    samples = [index[number] for number in range(len(index))]
    rows = index.rows(range(len(index)))
    columns = [
        (rows.row_B[place], sample.start, target, target + 1, request.context_end)
        for place, sample in enumerate(samples)
        for request in sample.requests
        for target in request.targets
    ]
    row_B, *columns_B = np.array(columns).T
    return SampleRows(rows.readers, np.zeros_like(row_B), row_B, *columns_B)


def loss_and_gradients(model, builder, samples, batches):
    """Of the samples in about equal batches: loss and gradients per unit of weight."""
    model.zero_grad()
    total = weight = 0.0
    for part in np.array_split(np.arange(len(samples)), batches):
        context, targets = model_inputs(builder.build(samples[part]), torch.device("cpu"))
        parts = training_loss(model(context, targets), model.options)
        parts.loss.backward()
        total, weight = total + float(parts.loss.detach()), weight + float(parts.weight)
    return total / weight, {name: p.grad / weight for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("request_by", "max_context"), [("event", 64), ("timestamp", 64), ("event", 6), ("timestamp", 6)]
)
def test_targets_that_share_a_context_train_as_they_do_one_at_a_time(shop, form, request_by, max_context):
    reader, sids, items = shop
    shared = BatchOptions(
        max_context=max_context,
        request_by=request_by,
        share_context="user",
        behaviour_weights={"view": 0.5, "buy": 3.0},
    )
    index = SampleIndex(reader, "train", shared)
    samples = index.rows(range(len(index)))
    if max_context == 64:  # a window holds every history, so the two options mean the same
        alone = SampleIndex(reader, "train", dataclasses.replace(shared, share_context="request"))
        singles = one_at_a_time(alone)
    else:  # a later target of a window begins where the window begins
        singles = one_at_a_time(index)
    assert len(singles) == int((samples.stop_B - samples.first_B).sum()) > 2 * len(samples)
    options = ModelOptions(**{**SMALL, **FORMS[form]})
    manifest = reader.manifest
    vocab = Vocabulary(sids.sizes, feature_sizes(manifest, items), shared.pathway_lengths, user_feature_sizes(manifest))
    model = random_model(options, vocab).train()
    builder = BatchBuilder(sids, manifest, items, shared, feature_names(options))
    whole = options.contrastive.weight > 0  # its negatives are the targets of the batch
    loss, gradients = loss_and_gradients(model, builder, samples, 1 if whole else 3)
    loss_alone, gradients_alone = loss_and_gradients(model, builder, singles, 1 if whole else 5)
    assert loss == pytest.approx(loss_alone, rel=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_alone[name], rtol=1e-7, atol=1e-10, msg=lambda m, n=name: n + m)
        assert gradient.abs().max() > 1e-5, name
