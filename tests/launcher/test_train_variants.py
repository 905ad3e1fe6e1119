"""Every architecture trains, resumes and is evaluated by the same loop, on one rank and on two."""

import math
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from train_cases import changed, checkpoint, records, train_on

from onetrain.data.errors import DataError
from onetrain.data.options import PathwayOptions
from onetrain.launcher.debug import check_gradients
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.evaluate import evaluate
from onetrain.launcher.train import train
from onetrain.model.options import ContrastiveOptions, MoEOptions, MTPOptions, QueryFormerOptions

STEPS = 15
FORMER = QueryFormerOptions(queries=3, width=16, blocks=1, heads=2)
PATHWAYS = {
    "short": PathwayOptions(length=4),
    "positive": PathwayOptions(length=5, behaviours=("like", "buy")),
    "lifelong": PathwayOptions(length=10, skip=4),
}
VARIANTS = {
    "pathways": {
        "query_formers": {"lifelong": FORMER},
        "features": ("sid", "item", "category", "hour", "age", "watched"),
        "feature_widths": {"item": 24, "hour": 4},
        "hashed": {"item": 50, "user": 64},
        "user_features": ("user",),
        "pathway_projection": "mlp",
        "l_kv": 2,
        "s_kv": 2,
        "g_kv": 1,
    },
    "onemall": {
        "cross_attention": "projected_kv",
        "query_formers": {"history": FORMER},
        "contrastive": ContrastiveOptions(weight=0.5, query_former=FORMER, features=("sid", "item", "category")),
        "moe": MoEOptions(experts=4, shared=1, first_dense=1),
        "scenario_bos": True,
        "scenario_head_bias": True,
    },
    "onelive": {
        "cross_attention": "projected_kv",
        "output_gate": True,
        "qk_norm": True,
        "time_aware": True,
        "mtp": MTPOptions(enabled=True),
    },
    "mtp": {"mtp": MTPOptions(enabled=True, attend_bos=False)},
    "encoder_decoder": {
        "architecture": "encoder_decoder",
        "cross_attention": "projected_kv",
        "encoder_layers": 1,
        "flatten_codes": True,
    },
    "decoder_only": {"architecture": "decoder_only"},
}


@pytest.fixture(params=VARIANTS)
def variant(request, tiny):
    config = changed(tiny, train__steps=STEPS, model=replace(tiny.model, **VARIANTS[request.param]))
    return request.param, changed(config, batch__pathways=PATHWAYS) if request.param == "pathways" else config


def test_it_learns_and_is_evaluated(variant):
    _, config = variant
    check_gradients(config)
    result = train(config)
    first, last = records(config)[0], records(config)[-1]
    assert last["loss"] < first["loss"] - 0.1
    assert all(math.isfinite(value) for value in result.values())
    assert last["model_gflops_per_s"] > 0
    table = evaluate(config, "latest", "test")
    model = table.record["results"]["model"]["all"]
    assert model["requests"] == 240
    assert model["recall@10"] > table.record["results"]["popularity"]["all"]["recall@10"] * 0.5
    assert model["invalid_beams"] == model["duplicate_beams"] == 0


def test_it_resumes_bit_for_bit(variant):
    _, config = variant
    straight, halves = (changed(config, name=name, model__dropout=0.1) for name in ("straight", "halves"))
    train(straight)
    train(halves, stop_after=7)
    train(halves)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (checkpoint(straight, STEPS) / file).read_bytes() == (checkpoint(halves, STEPS) / file).read_bytes()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one(variant, stage, two_ranks):
    """Losses to 1e-5, weights to 2e-4: sums run in another order, and Adam divides by small moments.

    Without the contrastive loss, whose negatives are the targets of one micro batch on one rank.
    """
    _, config = variant
    config = changed(config, model__contrastive=ContrastiveOptions())
    config = changed(config, parallel__deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    alone = changed(config, name="alone", parallel__micro_batch_size=16)
    both = changed(config, name="both", parallel__zero_stage=stage, parallel__micro_batch_size=16)
    train(alone)
    train_on(two_ranks, both)
    expected, found = records(alone), records(both)
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
    one, two = (load_file(checkpoint(run, STEPS) / "model.safetensors") for run in (alone, both))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert (two[key] - value).abs().max() < 2e-4, key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__features": ("sid", "scenrio")}, "'scenrio'.*Did you mean 'scenario'"),
        ({"model__user_features": ("user",)}, "model.hashed.user="),
    ],
)
def test_a_feature_that_cannot_be_embedded_is_refused_by_name(tiny, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        train(changed(tiny, **settings))


def test_a_part_of_the_requests_is_the_same_for_every_model(tiny):
    train(changed(tiny, train__steps=2))
    parts = [evaluate(tiny, "latest", "test", max_requests=50).record["results"] for _ in range(2)]
    assert parts[0] == parts[1]
    assert {subsets["all"]["requests"] for subsets in parts[0].values()} == {50}
