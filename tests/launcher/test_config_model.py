"""Contradictions between the model and its batches are told before anything starts."""

import dataclasses

import pytest

from onetrain.data.options import BatchOptions, DataOptions, PathwayOptions
from onetrain.launcher.config_model import model_problems
from onetrain.launcher.options import RunConfig
from onetrain.model.options import ContrastiveOptions, KSAOptions, ModelOptions, MoEOptions, QueryFormerOptions

STACK = {"ksa": {"history": KSAOptions(chunk=4)}}
ENCODER = {"architecture": "encoder_decoder", "cross_attention": "projected_kv", "encoder_layers": 1}


def problems(model=None, batch=None):
    config = RunConfig("job", data=DataOptions(prepared="/prepared"))
    config = dataclasses.replace(config, model=ModelOptions(**(model or {})), batch=BatchOptions(**(batch or {})))
    return list(model_problems(config))


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        ({"query_formers": {"histroy": QueryFormerOptions()}}, {}, "model.query_formers: there is no 'histroy'"),
        (
            {"hashed": {"itm": 3}, "features": ("sid", "item")},
            {},
            "model.hashed: there is no 'itm'; the model reads item",
        ),
        ({"hashed": {"sid": 3}}, {}, "model.hashed: there is no 'sid'"),
        ({"feature_widths": {"sidd": 3}}, {}, "model.feature_widths: there is no 'sidd'"),
        ({"time_aware": True, "time_features": ("gap",)}, {}, "model.time_features: there is no 'gap'"),
        ({"scenario_bos": True}, {"request_by": "timestamp"}, "batch.request_by: timestamp"),
        ({"position": "recency"}, {"share_context": "user"}, "model.position is recency"),
        ({"features": ("sid", "age")}, {"share_context": "user"}, "model.features has age"),
        (ENCODER, {"share_context": "user"}, "model.architecture is encoder_decoder"),
        (
            {"query_formers": {"history": QueryFormerOptions()}},
            {"share_context": "user"},
            "model.query_formers compress",
        ),
        ({"ksa": {"histroy": KSAOptions()}}, {}, "model.ksa: there is no 'histroy'"),
        (STACK, {"share_context": "user"}, "model.ksa reads all of a history"),
        (STACK, {"pathways": {"history": PathwayOptions(align=6)}}, "leave it out, which means 4"),
        (
            {**STACK, **ENCODER, "flatten_codes": True},  # 4 codes begin an event every 4 events of 3 codes
            {"pathways": {"history": PathwayOptions(align=6)}},
            "leave it out, which means 4",
        ),
    ],
)
def test_it_is_named(model, batch, message):
    found = problems(model, batch)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        ({}, {}),
        ({"feature_widths": {"sid": 8, "user": 4}, "hashed": {"user": 9}, "user_features": ("user",)}, {}),
        ({"time_aware": True, "feature_widths": {"hour": 3}}, {"share_context": "user"}),
        (STACK, {"pathways": {"history": PathwayOptions(align=8), "other": PathwayOptions(align=3)}}),
        (STACK, {"pathways": {"history": PathwayOptions(align=1)}}),
        (
            {**ENCODER, "flatten_codes": True, "ksa": {"history": KSAOptions(chunk=6)}},
            {"pathways": {"history": PathwayOptions(align=2)}},
        ),
        ({"contrastive": ContrastiveOptions(weight=1), "hashed": {"item": 5}}, {"request_by": "timestamp"}),
    ],
)
def test_what_fits_is_accepted(model, batch):
    assert problems(model, batch) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ("sid", "gap", "gap")}, "model.features names gap more than once"),
        ({"user_features": ("user", "user")}, "model.user_features names user more than once"),
        ({"n_layers": 2, "moe": MoEOptions(experts=4, first_dense=2)}, "leaves none of model.n_layers 2 to experts"),
    ],
)
def test_options_that_would_silently_do_something_else_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelOptions(**options)
